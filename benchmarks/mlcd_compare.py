"""What a trunk learns from a collection without labels: MLCD, its rivals and its settings, over several seeds.

    python -m benchmarks.mlcd_compare --out runs/mlcd --jobs 2

Every trunk learns from the same scenes, without their labels (`cliplet train mlcd`); what it then knows is measured by a
linear probe and by nearest neighbours (`cliplet train probe`), which do see labels, of other scenes. Then CCD teaches
students that start from nothing, from single drawings with their names (as ImageNet's models start), and from MLCD.
Each run is a process of one thread; the program continues where it was stopped. mAP does not depend on the machine's
speed.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.records import write_record
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world

log = logging.getLogger("cliplet")
TRUNK, SIDE = "test_resnet", 128
SCENES = {"train": 4000, "test-seen": 2000}
CLUSTERS = 200
BASE = {"loss": "mlcd", "positives": 8, "negative_rate": 0.1, "scale": 8}
# Small batches: of 4,000 images an epoch has few steps.
BATCH, LEARNING_RATE = 32, 0.003
# Settings with a flag of their own; the others go through --set.
FLAGS = {"positives": "--positives", "negative_rate": "--negative-rate"}
# What is told of the clusters, whose images have a labels.csv beside them.
QUALITY = ("purity", "conflict", "nmi")
UNTRAINED = "random weights, own statistics"
# Rows by name: what differs from BASE.
ROWS: dict[str, dict[str, Any]] = {
    "MLCD": {},
    "MLC": {"loss": "mlc"},
    "UNICOM-style": {"loss": "unicom", "positives": 1},
    **{f"MLCD, {n} positives": {"positives": n} for n in (1, 2, 4, 16)},
    **{f"MLCD, {rate:g} of the negatives": {"negative_rate": rate} for rate in (0.01, 0.5, 1.0)},
    **{f"MLCD, scale {scale}": {"scale": scale} for scale in (4, 16)},
}
NOTHING, SINGLES, LEARNED = "from nothing", "from single drawings", "from MLCD"
STUDENTS = (NOTHING, SINGLES, LEARNED)


@dataclass(frozen=True)
class Place:
    """Where a comparison lies, and how large it is."""

    out: Path
    epochs: int
    seeds: int

    @property
    def scenes(self) -> Path:
        """Scenes of several drawings, both parts."""
        return self.out / "scenes"

    @property
    def singles(self) -> Path:
        """Scenes of one drawing each, both parts."""
        return self.out / "singles"

    def run(self, row: str, seed: int) -> Path:
        return self.out / "runs" / f"{row.replace(' ', '_').replace(',', '')}-{seed}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mlcd"), help="folder of all runs; continues there"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--epochs", type=int, default=6, help="of each trunk")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--rows", default="|".join(ROWS), help="rows separated by | (default: all)")
    parser.add_argument("--no-students", action="store_true", help="leave out the CCD students")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    unknown = [name for name in options.rows.split("|") if name not in ROWS]
    if unknown:
        parser.error(f"no rows {unknown}; known: {' | '.join(ROWS)}")
    if not options.no_students and "MLCD" not in options.rows.split("|"):
        parser.error("students start from the row MLCD: name it too, or pass --no-students")
    place = Place(options.out, options.epochs, options.seeds)
    rows = [UNTRAINED, *options.rows.split("|")]
    for folder, most in ((place.scenes, 5), (place.singles, 1)):
        for part, count in SCENES.items():
            # Written again they would be the same, but newer than the embeddings made of them.
            if len(list((folder / "JPEGImages").glob(f"{part}_*.jpg"))) < count:
                write_scenes(scene_world(part, seed=0, max_objects=most), folder, count, workers=2)
    reports = _all(options.jobs, [_probed(place, row, seed) for row in rows for seed in range(options.seeds)])
    students: dict[str, list[dict[str, Any]]] = {}
    if not options.no_students:
        reports_of = _all(
            options.jobs, [_taught(place, start, seed) for start in STUDENTS for seed in range(options.seeds)]
        )
        students = {
            s: list(part) for s, part in zip(STUDENTS, _chunks(reports_of, options.seeds), strict=True)
        }
    found = dict(zip(rows, _chunks(reports, options.seeds), strict=True))
    record = write_record("mlcd-compare_scenes", described(place, found, students))
    print(f"wrote {record}")
    return 0


def described(
    place: Place, found: dict[str, Sequence[dict[str, Any]]], students: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """What the record says."""
    return {
        "what": "mAP of a linear probe and of nearest neighbours on trunks that learned without labels",
        "model": f"{TRUNK}, {SIDE} px, from random weights; teacher tiny; {CLUSTERS} clusters",
        "images": f"{SCENES['train']:,} scenes to learn from, {SCENES['test-seen']:,} others to measure",
        "epochs": place.epochs,
        "batch": BATCH,
        "base": BASE,
        "seeds": place.seeds,
        "rows": {
            row: {
                "linear": _mean([r["linear"]["mAP"] for r in reports]),
                "linear_11_point": _mean([r["linear"]["mAP_11_point"] for r in reports]),
                "knn": _mean([max(q["mAP"] for q in r["knn"].values()) for r in reports]),
                "retrieval": _mean([r["retrieval"]["mAP_at_R"] for r in reports]),
                "clusters": _quality([r["clusters"] for r in reports]),
            }
            for row, reports in found.items()
        },
        "students": {
            start: _mean([r["measured"]["map"] for r in reports]) for start, reports in students.items()
        },
    }


def _quality(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the clusters agree with the labels: shares of 1; empty for runs of before it was told."""
    shares = {name: [one[name] for one in found if one.get(name) is not None] for name in QUALITY}
    # A single positive leaves no conflict to speak of.
    return {name: _mean(values) for name, values in shares.items() if values}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": mean(values),
        "deviation": stdev(values) if len(values) > 1 else None,
        "all": list(values),
    }


def _probed(place: Place, row: str, seed: int) -> Callable[[], dict[str, Any]]:
    """Work that trains the trunk of a row, probes it, and gives what was measured."""

    def work() -> dict[str, Any]:
        out = place.run(row, seed)
        trunk = out / "mlcd" / "trunk"
        settings = BASE | ({} if row == UNTRAINED else ROWS[row])
        # `--loss` sets what belongs to a loss, too.
        given = [f"--loss={settings.pop('loss')}"]
        for name, value in settings.items():
            given += [FLAGS[name], str(value)] if name in FLAGS else ["--set", f"{name}={value}"]
        # A rate of 0 leaves the weights where the seed put them; batch norm still learns its statistics.
        epochs, rate = (1, 0.0) if row == UNTRAINED else (place.epochs, LEARNING_RATE)
        _cliplet(
            *("train", "mlcd", "--data", str(place.scenes / "JPEGImages" / "train_*.jpg")),
            *("--out", str(out / "mlcd"), "--embeddings", str(place.out / "embeddings")),
            *("--clusters", str(CLUSTERS), "--trunk", TRUNK, "--image-size", str(SIDE)),
            *("--epochs", str(epochs), "--batch-size", str(BATCH), "--learning-rate", str(rate)),
            *("--seed", str(seed), *given),
        )
        _cliplet(
            *("train", "probe", str(trunk), "--data", "scenes", "--root", str(place.scenes)),
            *("--out", str(out / "probe"), "--measures", "linear,knn,retrieval", "--seed", "0"),
        )
        report: dict[str, Any] = json.loads((out / "probe" / "report.json").read_text())["measured"]
        clusters = json.loads((out / "mlcd" / "report.json").read_text())["clusters"]
        log.info("%s, seed %d: linear probe %.1f", row, seed, report["linear"]["mAP"])
        return report | {"clusters": clusters.get("quality", {})}

    return work


def _taught(place: Place, start: str, seed: int) -> Callable[[], dict[str, Any]]:
    """Work that teaches a student by CCD, and gives the report of it."""

    def work() -> dict[str, Any]:
        out = place.run(f"student {start}", seed)
        begins: tuple[str, ...] = ("--set", f"trunk={TRUNK}", "--set", "trunk_weights=random")
        if start == LEARNED:
            begins = ("--trunk", f"mlcd:{place.run('MLCD', seed) / 'mlcd' / 'trunk'}")
        elif start == SINGLES:
            _student("scenes_bce", place.singles, out / "singles", seed, *begins)
            _keep_trunk(out / "singles" / "classifier", out / "trunk")
            begins = ("--trunk", f"mlcd:{out / 'trunk'}")
        _student("scenes_ccd", place.scenes, out / "ccd", seed, *begins, "--banks", str(place.out / "banks"))
        report: dict[str, Any] = json.loads((out / "ccd" / "report.json").read_text())
        log.info("student %s, seed %d: %.1f", start, seed, report["measured"]["map"])
        return report

    return work


def _student(recipe: str, root: Path, out: Path, seed: int, *more: str) -> None:
    side = ("--set", f"image_size={SIDE}")
    _cliplet("train", recipe, "--root", str(root), "--out", str(out), "--seed", str(seed), *side, *more)


def _keep_trunk(classifier: Path, folder: Path) -> None:
    """Write the trunk of a trained classifier, so that another can start from it."""
    from cliplet.classifier import load_classifier
    from cliplet.trunk_files import TrunkConfig, save_trunk, trunk_width

    learned = load_classifier(classifier)
    config = TrunkConfig(
        trunk=TRUNK, preprocessing=learned.config.preprocessing, width=trunk_width(learned.trunk, SIDE)
    )
    save_trunk(folder, learned.trunk, config, {"from": "a supervised classifier of single drawings"})


def _cliplet(*arguments: str) -> None:
    command = [sys.executable, "-m", "cliplet.cli", *arguments, "--threads", "1", "--workers", "1", "--quiet"]
    subprocess.run(command, check=True)


def _all(jobs: int, work: Sequence[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The results of all, several at a time, in order."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda one: one(), work))


def _chunks(values: Sequence[dict[str, Any]], size: int) -> Iterator[Sequence[dict[str, Any]]]:
    return (values[i : i + size] for i in range(0, len(values), size))


if __name__ == "__main__":
    sys.exit(main())

"""How fast images are scored by cliplet and by what users would take otherwise, side by side in one run.

    python -m benchmarks.peers --photos FOLDER --photos-are "128 photographs" --rounds 3

open_clip loop          what a user writes first: one image after the other, Pillow crops, open_clip's own transform
open_clip + DataLoader  the same model and transform; worker processes prepare the views, batches are scored
clip-retrieval          its inference loop: whole images, and embeddings instead of scores
cliplet ...             `cliplet label` with one engine; OpenVINO in fp32 is what it takes by itself where it can

All get the same files, weights, classes and views, and are timed from files to scores. Each measurement is a process
of its own, and they take turns, so that a drift of the machine meets all. Weights are random: they change no time.

clip-retrieval cannot live in cliplet's environment (it pins numpy<2, open_clip<3 and others), so it has its own:

    python -m venv peer && peer/bin/pip install clip-retrieval 'setuptools<81'
    python -m benchmarks.peers --clip-retrieval-python peer/bin/python
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import random_weights
from benchmarks.records import PRECISIONS, spread, write_record
from benchmarks.watched import MeasurementError, watched
from cliplet.deploy.bench import machine_limits, merged_limits
from cliplet.deploy.bench_limits import lowest_precision
from cliplet.machine import usable_cores
from cliplet.model_spec import ModelSpec, parse_model_spec
from cliplet.plan import VIEWS_PER_BATCH
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world
from cliplet.views import Views

LOOP, LOADER, RETRIEVAL = "open_clip loop", "open_clip + DataLoader", "clip-retrieval"
# Runtime and precision that `cliplet label` is asked for.
CLIPLET = {
    "cliplet onnx fp32": ("onnx", "fp32"),
    "cliplet openvino fp32": ("openvino", "fp32"),
    "cliplet openvino bf16": ("openvino", "bf16"),
}
CONTENDERS = (LOOP, LOADER, RETRIEVAL, *CLIPLET)
WHOLE = "1"
EMBEDS = "whole images only; writes embeddings in float16, scores no classes"
RETRIEVAL_SCRIPT = Path(__file__).with_name("peers_clip_retrieval.py")


@dataclass
class Setting:
    """What is the same in all measurements: the model, and the interpreter that has clip-retrieval.

    Attributes:
        bundle: with cliplet's engines, once they are prepared.
    """

    spec: ModelSpec
    retrieval_python: str
    bundle: str = ""

    def prepare(self, contenders: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """What is known of each contender before it is timed, and why some of them cannot be.

        Raises:
            MeasurementError: none of cliplet's engines can be built.
        """
        facts: dict[str, dict[str, Any]] = {contender: {} for contender in contenders}
        own = {contender: CLIPLET[contender] for contender in contenders if contender in CLIPLET}
        if own:
            task = {"part": "prepare", "engines": list(own.values())}
            found = _held(watched(self._worker(task)).found)
            self.bundle = found["bundle"]
            facts |= {contender: found["engines"]["-".join(pair)] for contender, pair in own.items()}
        if RETRIEVAL in facts:
            facts[RETRIEVAL] = {"note": EMBEDS, **self._retrieval()}
        skipped = {contender: known["why"] for contender, known in facts.items() if "why" in known}
        return {contender: known for contender, known in facts.items() if contender not in skipped}, skipped

    def measure(self, contender: str, views: str, images: Path) -> dict[str, Any]:
        """One measurement: images a second, peak memory, and whether other processes disturbed it.

        Raises:
            MeasurementError: it failed, or did not score every image of the folder `images`.
        """
        seen = watched(self._command(contender, views, images))
        found, count = _held(seen.found), len(list(images.iterdir()))
        if found["images"] != count:
            raise MeasurementError(f"scored {found['images']} of {count} images")
        return {
            **found,
            "images_per_s": found["images"] / found["seconds"],
            "peak_mb": seen.peak_bytes / 1e6,
            "disturbed": seen.disturbed,
        }

    def gflop_per_view(self) -> float:
        """Arithmetic of the image tower for one view."""
        work: float = _held(watched(self._worker({"part": "gflop"})).found)["gflop_per_view"]
        return work

    def _retrieval(self) -> dict[str, Any]:
        """Versions of clip-retrieval and what it stands on, or `why` it cannot run."""
        if self.spec.is_folder:
            return {"why": "it takes an architecture with a file of weights, and no folder"}
        return watched([self.retrieval_python, str(RETRIEVAL_SCRIPT), "{}"]).found

    def _command(self, contender: str, views: str, images: Path) -> list[str]:
        if contender == RETRIEVAL:
            task = {
                "folder": str(images),
                "model": f"open_clip:{self.spec.open_clip_name}/{self.spec.pretrained or ''}",
                "batch_size": VIEWS_PER_BATCH,
                "workers": usable_cores(),
            }
            return [self.retrieval_python, str(RETRIEVAL_SCRIPT), json.dumps(task)]
        same = {"views": views, "images": str(images)}
        if contender in CLIPLET:
            runtime, precision = CLIPLET[contender]
            engine = {"model": self.bundle, "runtime": runtime, "precision": precision}
            return self._worker({"part": "cliplet", **same, **engine})
        return self._worker({"part": {LOOP: "loop", LOADER: "loader"}[contender], **same})

    def _worker(self, task: Mapping[str, Any]) -> list[str]:
        told = json.dumps({"model": str(self.spec), **task})
        return [sys.executable, "-m", "benchmarks.peers_workers", told]


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    setting = Setting(_spec(options.model), options.clip_retrieval_python)
    facts, skipped = setting.prepare(options.contenders)
    for contender, why in skipped.items():
        print(f"{contender}: skipped, {why}", flush=True)
    work = setting.gflop_per_view()
    measured: dict[str, tuple[dict[str, list[Any]], int]] = {}
    limits: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos, told = _photos(options, Path(folder))
        for views in options.views:
            found = machine_limits(PRECISIONS)
            limits = merged_limits(limits, {} if "why" in found else found)
            count = Views.parse(views).count
            images = _first(photos, Path(folder) / f"images-{views}", max(1, options.limit // count))
            runs, failed = turns(
                setting, [c for c in options.contenders if c in facts], images, views, options.rounds
            )
            skipped |= failed
            measured[views] = runs, count
    peaks = limits.get("gop_per_s", {})
    rows = {views: table(runs, facts, count, work, peaks) for views, (runs, count) in measured.items()}
    record = write_record(
        f"peers_{re.sub('[^A-Za-z0-9-]+', '-', Path(setting.spec.open_clip_name).name)}",
        {
            "what": "images scored per second, from files to scores, by cliplet and by what users would take otherwise",
            "model": _told(options.model),
            "images": told,
            "rounds": options.rounds,
            "gflop_per_view": work,
            "limits": limits,
            "rows": rows,
            "skipped": skipped,
        },
    )
    print(f"wrote {record}")
    return 0


def turns(
    setting: Setting, contenders: Sequence[str], images: Path, views: str, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """All measurements of each contender, one a round, forwards and then backwards; and who failed, with the reason.

    Raises:
        MeasurementError: the loop failed, against which all others are held.
    """
    there = [c for c in contenders if c != RETRIEVAL or views == WHOLE]
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in there}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for contender in there if number % 2 == 0 else reversed(there):
            if contender in failed:
                continue
            try:
                runs[contender].append(setting.measure(contender, views, images))
            except MeasurementError as error:
                if contender == LOOP:
                    raise
                failed[contender] = str(error)
                print(f"{contender}, views {views}: failed, {error}", flush=True)
                continue
            print(
                f"{contender}, views {views}: {runs[contender][-1]['images_per_s']:.2f} images/s", flush=True
            )
    return {contender: found for contender, found in runs.items() if contender not in failed}, failed


def table(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    facts: Mapping[str, Mapping[str, Any]],
    views: int,
    gflop_per_view: float,
    peaks: Mapping[str, float],
) -> dict[str, Any]:
    """The rows of one number of views: rates, ratios to the loop of the same round, and shares of the machine's peak.

    Args:
        peaks: products of matrices in GOP/s by precision.
    """
    rows = {}
    for contender, found in runs.items():
        rates = [run["images_per_s"] for run in found]
        loop = [run["images_per_s"] for run in runs[LOOP]]
        known = facts.get(contender, {})
        read = known.get("precision") or found[0]["precision"]
        peak = peaks.get(lowest_precision(read))
        rows[contender] = {
            "images_per_s": spread(rates),
            "views_per_s": spread([views * rate for rate in rates]),
            "ratio_to_loop": spread([own / other for own, other in zip(rates, loop, strict=True)]),
            "share_of_peak": views * spread(rates)["median"] * gflop_per_view / peak if peak else None,
            "precision_read": read,
            "peak_mb": spread([run["peak_mb"] for run in found]),
            "images": found[0]["images"],
            "disturbed_rounds": sum(run["disturbed"] for run in found),
            **{name: known[name] for name in ("note", "versions", "parity") if name in known},
        }
    return rows


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", type=Path, help="folder of images (default: scenes made for this run)")
    add("--photos-are", default="", help="what the record says of them")
    add("--model", default="ViT-B-32", help="an architecture of open_clip, or open_clip:... with its weights")
    add("--views", type=_listed, default=["1", "1+3x3"], help="of an image; a table each")
    add("--limit", type=int, default=90, help="views that each contender scores in a round")
    add("--rounds", type=int, default=2)
    add("--contenders", type=_listed, default=list(CONTENDERS), help=f"some of {', '.join(CONTENDERS)}")
    add("--clip-retrieval-python", default=sys.executable, help="interpreter that has it (default: this one)")
    options = parser.parse_args(argv)
    unknown = set(options.contenders) - set(CONTENDERS)
    if unknown or LOOP not in options.contenders:
        parser.error(f"--contenders: {LOOP!r}, and some of {', '.join(CONTENDERS[1:])}")
    if shutil.which(options.clip_retrieval_python) is None:
        parser.error(f"--clip-retrieval-python: there is no program {options.clip_retrieval_python}")
    if options.photos is not None and not _images_in(options.photos):
        parser.error(f"--photos: no images in {options.photos}")
    return options


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _spec(model: str) -> ModelSpec:
    known = model == "tiny" or model.startswith("open_clip:")
    return parse_model_spec(model if known else f"open_clip:{model}/{random_weights(model)}")


def _told(model: str) -> str:
    """The model as the record names it, without this machine's folders."""
    if model == "tiny":
        return model
    return Path(model).name if model.startswith("open_clip:") else f"{model}, random weights"


def _held(found: dict[str, Any]) -> dict[str, Any]:
    if "why" in found:
        raise MeasurementError(found["why"])
    return found


def _photos(options: argparse.Namespace, folder: Path) -> tuple[list[Path], str]:
    """The images, and what the record says of them."""
    if options.photos is not None:
        return _images_in(options.photos), options.photos_are or f"the images of {options.photos.name}"
    made = write_scenes(scene_world("test-seen", seed=1), folder, options.limit).images
    return _images_in(made), f"up to {options.limit} scenes of the scene world, 320 x 240"


def _images_in(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if p.suffix.lower() in (".jpg", ".jpeg", ".png"))


def _first(photos: Sequence[Path], folder: Path, count: int) -> Path:
    """A folder with links to the first images: some contenders take a folder and nothing else."""
    folder.mkdir()
    for photo in photos[:count]:
        (folder / photo.name).symlink_to(photo.resolve())
    return folder


if __name__ == "__main__":
    sys.exit(main())

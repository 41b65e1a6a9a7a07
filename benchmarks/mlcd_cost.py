"""What clusters cost against their number: finding them, the loss against them, and the training of a trunk.

    python -m benchmarks.mlcd_cost
    python -m benchmarks.mlcd_cost --only ranks    # memory against the number of processes alone, in minutes

Embeddings, features and labels are made, since what they are changes no number of operations; images are scenes. Every
point is a process of its own; points take turns, forwards and then backwards, so that a drift of the machine meets both
ends. Which trunk learns what is asked elsewhere, in `benchmarks.mlcd_compare`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import spread, write_record
from benchmarks.watched import watched
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world

CLUSTERS = (100, 1_000, 10_000, 100_000)
# Shares of the negatives; the others have the loss without sampling beside them.
RATES = (0.01, 0.1, 1.0)
WIDTH, BATCH, POSITIVES = 512, 128, 8
TRUNK, SIDE = "resnet18", 128
ITERATIONS, STEPS = 3, 10
# What can be measured alone, each with a record of its own, and its kinds of points.
RECORDS = {"cost": ("clusters", "loss", "training"), "ranks": ("ranks",)}
# Processes over which the centres are divided, and how many steps tell what a process needs.
WORLDS, RANK_STEPS, RANK_RATE = (1, 2, 4), 3, 0.1
# Of the C library: blocks from 64 KiB on go back to the system when they are freed, so that what a process holds is what
# it needs and not what it once needed.
RETURNS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=list(RECORDS), help="cost against the clusters, or memory against processes"
    )
    parser.add_argument("--most", type=int, default=CLUSTERS[-1], help="largest number of clusters")
    parser.add_argument("--rows", type=int, default=200_000, help="embeddings that are clustered")
    parser.add_argument("--images", type=int, default=1_024, help="scenes of an epoch of training")
    parser.add_argument("--rounds", type=int, default=2, help="times that each point is measured")
    options = parser.parse_args(argv)
    wanted = [options.only] if options.only else list(RECORDS)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder)
        if "cost" in wanted:
            world = scene_world("train", seed=0)
            images = write_scenes(world, Path(folder), options.images, workers=2).images
        kinds = [kind for name in wanted for kind in RECORDS[name]]
        points = [point for point in _points(options, images) if point["part"] in kinds]
        runs: list[list[dict[str, Any]]] = [[] for _ in points]
        for number in range(options.rounds):
            order = range(len(points))
            for i in order if number % 2 == 0 else reversed(order):
                runs[i].append(measured(points[i]))
                print(f"{_told(points[i])}: {_told(runs[i][-1])}", flush=True)
    rows = described(points, runs)
    for name in wanted:
        own = {kind: rows[kind] for kind in RECORDS[name]}
        print(f"wrote {write_record(f'mlcd-{name}', told_of(name, options) | {'rows': own})}")
    return 0


def _points(options: argparse.Namespace, images: Path) -> Iterator[dict[str, Any]]:
    """Every point, as what its process is given."""
    counts = [k for k in CLUSTERS if k <= min(options.most, options.rows)]
    for k in counts:
        yield {
            "part": "clusters",
            "clusters": k,
            "rows": options.rows,
            "width": WIDTH,
            "iterations": ITERATIONS,
        }
    for k in counts:
        for rate in RATES:
            yield {
                "part": "loss",
                "clusters": k,
                "rate": rate,
                "width": WIDTH,
                "batch": BATCH,
                "positives": POSITIVES,
                "steps": STEPS,
            }
    for k in counts:
        for rate in (0.1, 1.0):
            yield {
                "part": "training",
                "clusters": k,
                "rate": rate,
                "images": str(images),
                "trunk": TRUNK,
                "side": SIDE,
                "batch": BATCH,
            }
    for world in WORLDS:
        yield {
            "part": "ranks",
            "clusters": options.most,
            "world": world,
            "rate": RANK_RATE,
            "width": WIDTH,
            # Of all processes together, as `--batch-size` counts.
            "batch": BATCH,
            "positives": POSITIVES,
            "steps": RANK_STEPS,
        }


def measured(point: dict[str, Any]) -> dict[str, Any]:
    """What its process found, and whether others disturbed it."""
    command = [sys.executable, "-m", "benchmarks.mlcd_cost_parts", json.dumps(point)]
    if point["part"] == "ranks":
        settings = [f"{name}={value}" for name, value in RETURNS_FREED.items()]
        command = ["env", *settings, *command]
    run = watched(command)
    return run.found | {"disturbed": run.disturbed}


def described(
    points: Sequence[dict[str, Any]], runs: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of the records, by kind of point."""
    rows: dict[str, list[dict[str, Any]]] = {point["part"]: [] for point in points}
    for point, found in zip(points, runs, strict=True):
        row: dict[str, Any] = {key: point[key] for key in ("clusters", "rate", "world") if key in point}
        for key, value in found[0].items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            row[key] = spread([run[key] for run in found]) if numeric else value
        rows[point["part"]].append(row | {"disturbed": sum(run["disturbed"] for run in found)})
    return rows


def told_of(record: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a record says besides its rows."""
    if record == "ranks":
        return {
            "what": "memory of a process with its share of the class centres, against the number of processes",
            "model": f"class centres of {WIDTH} numbers, AdamW, {RANK_STEPS} steps",
            "rounds": options.rounds,
            "batch": BATCH,
            "positives": POSITIVES,
            "environment": RETURNS_FREED,
        }
    return {
        "what": "k-means, the loss of class centres and training of a trunk, against the number of clusters",
        "model": f"{TRUNK}, {SIDE} px; class centres of {WIDTH} numbers",
        "images": f"{options.rows:,} made embeddings of {WIDTH} numbers; {options.images:,} scenes",
        "rounds": options.rounds,
        "batch": BATCH,
        "positives": POSITIVES,
    }


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if key not in ("images", "trunk"))


if __name__ == "__main__":
    sys.exit(main())

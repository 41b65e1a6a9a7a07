"""How the cost of labelling grows: with the number of images, views and classes, the canvas, and decoding threads.

    make bench
    python -m benchmarks.scale --axes images,views --most 10000

Every point is `label` with the embedded CLIP, in a process of its own. Points take turns, forwards and then backwards,
so that a drift of the machine meets both ends of an axis. Beside each measured slope (least squares between logarithms,
over the upper half of the axis) stands the one that is expected.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import log
from pathlib import Path
from statistics import linear_regression
from time import perf_counter
from typing import Any

from PIL import Image
from PIL.Image import Transpose

from benchmarks import records
from benchmarks.records import spread, write_record
from benchmarks.scale_plot import plot
from benchmarks.watched import watched
from cliplet.deploy.bench_whole import name_again
from cliplet.machine import usable_cores
from cliplet.scene_files import JPEG_QUALITY
from cliplet.scenes import SceneWorld, scene_world
from cliplet.views import Views

# Each scene is drawn as it is and mirrored: images that are alike would make tables that compress too well.
SCENES, DIFFERENT_IMAGES = 300, 1200
MIRRORED = (None, Transpose.FLIP_LEFT_RIGHT, Transpose.FLIP_TOP_BOTTOM, Transpose.ROTATE_180)
# Sides of images, in pixels: small ones, so that decoding is not what is measured, and large ones, so that it is.
SMALL, LARGE = (160, 120), (1280, 960)
# Points that take so many seconds are measured once, whatever the rounds: that averages over a drift by itself.
LONG_S = 12.0
# The usual batch of one view.
FIRST_BATCH = 32
VIEWS = ("1", "1+2x2", "1+2x2+3x3", "1+2x2+3x3+4x4", "1+2x2+3x3+4x4+5x5")
# Cells enough for a canvas of 640 pixels; tiny's whole image alone is never given more than 128.
CANVAS_VIEWS = "1+5x5"
# A canvas on which resizing costs next to nothing: what an engine takes beyond it is what resizing takes.
LEAST_CANVAS = 32
# The exit code of a run that was stopped; whole axes that were measured until then are kept.
INTERRUPTED = 130
SYLLABLES = tuple(map("".join, product("bdfgklmnprstvz", "aeiou")))

Measurements = dict[str, float]


@dataclass
class Bench:
    """Makes the images and bundles of one benchmark in a folder, and labels them.

    Attributes:
        limit: of the images of a point, but on the axis of images.
    """

    folder: Path
    limit: int | None = None
    _scenes: dict[int, Image.Image] = field(default_factory=dict)
    _exports: dict[int, Measurements] = field(default_factory=dict)

    def label(self, size: tuple[int, int], images: int, **options: Any) -> dict[str, Any]:
        """What a traced run over so many scenes of that size took."""
        count = min(images, self.limit or images)
        return self.label_folder(self.images(size, count), traced=True, **options)

    def label_folder(self, images: Path, **options: Any) -> dict[str, Any]:
        """What a run over a folder took."""
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            return in_process(**{"images": images, "out": f"{out}/labels", **options})

    def images(self, size: tuple[int, int], count: int) -> Path:
        """A folder with `count` names for at most DIFFERENT_IMAGES scenes of `size` (width, height)."""
        folder = self.folder / f"{size[0]}x{size[1]}-{count}"
        if not folder.exists():
            name_again(self._drawn(size, min(count, DIFFERENT_IMAGES)), folder, count)
        return folder

    def bundle(self, classes: int) -> tuple[Path, Measurements]:
        """A bundle of tiny with so many classes, built once, and what building it took."""
        folder = self.folder / f"bundle-{classes}"
        if classes not in self._exports:
            names = self.folder / f"classes-{classes}.txt"
            names.write_text("".join(f"{name}\n" for name in class_names(classes)))
            self._exports[classes] = in_process(export=True, classes=names, out=folder)
        return folder, self._exports[classes]

    def _drawn(self, size: tuple[int, int], count: int) -> list[Path]:
        folder = self.folder / f"{size[0]}x{size[1]}"
        folder.mkdir(exist_ok=True)
        files = [folder / f"{number:04d}.jpg" for number in range(count)]
        for number, file in enumerate(files):
            if not file.exists():
                mirror = MIRRORED[number // SCENES]
                scene = self._scene(number % SCENES).resize(size)
                shown = scene if mirror is None else scene.transpose(mirror)
                shown.save(file, quality=JPEG_QUALITY)
        return files

    @cached_property
    def _world(self) -> SceneWorld:
        return scene_world("test-seen", seed=1)

    def _scene(self, number: int) -> Image.Image:
        if number not in self._scenes:
            self._scenes[number] = Image.fromarray(self._world.scene(number).image)
        return self._scenes[number]


def images_axis(bench: Bench, images: int) -> Measurements:
    """A whole run, without a trace, whose memory would grow; one that ends after a batch; one with nothing to do."""
    folder = bench.images(SMALL, images)
    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        first = in_process(images=folder, out=f"{out}/first", limit=min(images, FIRST_BATCH), traced=True)
        whole = in_process(images=folder, out=f"{out}/whole")
        again = in_process(images=folder, out=f"{out}/whole")
    return {
        **_cost(whole),
        "seconds": whole["call_s"],
        "first_batch_s": first["first_batch_s"],
        "again_s": again["call_s"],
    }


def views_axis(bench: Bench, views: int) -> Measurements:
    """Small images, seen in so many views."""
    written = next(text for text in VIEWS if Views.parse(text).count == views)
    found = bench.label(SMALL, max(48, 1600 // views), views=written)
    return _cost(found) | {"engine_ms": found["stages_ms"]["engine"]}


def classes_axis(bench: Bench, classes: int) -> Measurements:
    """Small images, scored for so many classes."""
    bundle, export = bench.bundle(classes)
    found = bench.label(SMALL, 1024, model=bundle)
    return {
        **_cost(found),
        "engine_ms": found["stages_ms"]["engine"],
        "write_ms": found["stages_ms"]["write"],
        "disk_bytes": found["disk_bytes"] / found["images"],
        "text_s": export["text_s"],
        "export_s": export["export_s"],
        "export_mb": export["peak_mb"],
    }


def canvas_axis(bench: Bench, side: int) -> Measurements:
    """Images of that longer side, which is their canvas."""
    found = bench.label((side, side * 3 // 4), 48, views=CANVAS_VIEWS)
    return _cost(found) | {f"{name}_ms": found["stages_ms"][name] for name in ("decode", "engine")}


def workers_axis(bench: Bench, workers: int) -> Measurements:
    """Large images, decoded in so many threads."""
    found = bench.label(LARGE, 200, workers=workers)
    return _cost(found) | {"wait_ms": found["stages_ms"]["wait for decode"]}


@dataclass(frozen=True)
class Curve:
    """One quantity of an axis.

    Attributes:
        title: with its unit.
        expected: the slope between logarithms; None where none in particular is.
        at_most: it is a bound, because what grows lies on top of what does not.
    """

    title: str
    expected: float | None = None
    at_most: bool = False


@dataclass(frozen=True)
class Axis:
    """What is varied.

    Attributes:
        title: of the values.
        curves: beside the rate, the time of an image and the peak memory; in the plot if a slope is expected.
        beyond: the slopes hold from this value on.
    """

    title: str
    values: tuple[int, ...]
    measure: Callable[[Bench, int], Measurements]
    curves: Mapping[str, Curve]
    beyond: int = 0


def axes() -> dict[str, Axis]:
    """All axes, by name."""
    return {
        "images": Axis(
            "images",
            (100, 1_000, 10_000, 100_000),
            images_axis,
            {
                "seconds": Curve("whole run, s", 1),
                "first_batch_s": Curve("first batch scored after, s", 1, at_most=True),
                "again_s": Curve("same command again, s", 1, at_most=True),
                "peak_mb": Curve("peak memory, MB", 0),
            },
        ),
        "views": Axis(
            "views of an image",
            tuple(Views.parse(text).count for text in VIEWS),
            views_axis,
            {"ms_per_image": Curve("ms an image", 1, at_most=True), "engine_ms": Curve("engine, ms", 1)},
        ),
        "classes": Axis(
            "classes",
            (20, 200, 2_000, 20_000),
            classes_axis,
            {
                "ms_per_image": Curve("ms an image", 1, at_most=True),
                "engine_ms": Curve("engine, ms", 0),
                "write_ms": Curve("writing, ms", 1, at_most=True),
                "disk_bytes": Curve("bytes on disk", 1),
                "text_s": Curve("embedding the class names, s", 1),
                "export_s": Curve("whole export, s"),
                "export_mb": Curve("peak memory of the export, MB"),
            },
        ),
        "canvas": Axis(
            "longer side of the canvas, pixels",
            (LEAST_CANVAS, 160, 224, 320, 448, 640),
            canvas_axis,
            {
                "decode_ms": Curve("decoding, ms", 2, at_most=True),
                "engine_ms": Curve("engine, ms", 2, at_most=True),
                "resize_ms": Curve("resizing, ms", 2),
            },
        ),
        "workers": Axis(
            "decoding threads",
            (1, 2, 4, 8),
            workers_axis,
            {"ms_per_image": Curve("ms an image", 0), "wait_ms": Curve("engine waits for it, ms")},
            beyond=usable_cores(),
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    known = axes()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", default=",".join(known), help=f"some of {', '.join(known)}")
    parser.add_argument("--most", type=int, default=100_000, help="largest number of images, and of classes")
    parser.add_argument("--limit", type=int, help="images of a point at most, but on the axis of images")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(argv)
    chosen = [name for name in known if name in options.axes.split(",")]
    if unknown := set(options.axes.split(",")) - set(known):
        parser.error(f"no axis {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.limit)
        # Exports tiny where that was never done.
        bench.label_folder(bench.images(SMALL, FIRST_BATCH))
        rows: dict[str, Any] = {}
        with suppress(KeyboardInterrupt):
            for name in chosen:
                rows[name] = measured(bench, name, known[name], options)
    if not rows:
        return INTERRUPTED
    record = write_record(
        "scale" if len(rows) == len(known) else f"scale_{'-'.join(rows)}",
        {
            "what": "cost of `cliplet label` against what it is given",
            "model": "tiny, fp32",
            "images": f"scenes of the scene world, at most {DIFFERENT_IMAGES:,} different ones under many names",
            "rounds": options.rounds,
            "rows": rows,
        },
    )
    plot(rows, records.RESULTS / f"{record.stem}.svg")
    print(f"wrote {record}")
    return 0 if len(rows) == len(chosen) else INTERRUPTED


def measured(bench: Bench, name: str, axis: Axis, options: argparse.Namespace) -> dict[str, Any]:
    """The points of an axis, each with the spread of all that was measured, and the slopes between them."""
    values = [v for v in axis.values if name not in ("images", "classes") or v <= options.most]
    runs: dict[int, list[Measurements]] = {value: [] for value in values}
    long = set[int]()
    for number in range(options.rounds):
        for value in values if number % 2 == 0 else reversed(values):
            if value in long:
                continue
            if name == "classes":
                bench.bundle(value)  # exported once, which is no part of how long labelling takes
            began = perf_counter()
            runs[value].append(axis.measure(bench, value))
            if perf_counter() - began > LONG_S:
                long.add(value)
            print(f"{name} {value:,}: {runs[value][-1]['images_per_s']:.1f} images/s", flush=True)
    if LEAST_CANVAS in runs and name == "canvas":
        least = min(run["engine_ms"] for run in runs[LEAST_CANVAS])
        for value in values[1:]:
            for run in runs[value]:
                run["resize_ms"] = run["engine_ms"] - least
    points = {
        str(value): {key: spread([run[key] for run in found]) for key in found[0]}
        for value, found in runs.items()
    }
    slopes = {
        key: {"expected": curve.expected, "at_most": curve.at_most, **_slope(points, key, axis.beyond)}
        for key, curve in axis.curves.items()
        if curve.expected is not None
    }
    titles = {key: curve.title for key, curve in axis.curves.items()}
    return {"axis": axis.title, "titles": titles, "points": points, "slopes": slopes}


def _slope(points: Mapping[str, Any], key: str, beyond: int) -> dict[str, Any]:
    """The slope over the upper half of the points, or those from `beyond` on; None where they are fewer than two."""
    known = [(int(value), point[key]["median"]) for value, point in points.items() if key in point]
    upper = [p for p in known if p[0] >= beyond] if beyond else known[-max(2, -(-len(known) // 2)) :]
    fitted = [(value, y) for value, y in upper if y > 0]
    logarithms = [list(map(log, column)) for column in zip(*fitted, strict=True)]
    slope = linear_regression(*logarithms).slope if len(fitted) > 1 else None
    return {"measured": slope, "over": [value for value, _ in fitted]}


def _cost(found: Mapping[str, Any]) -> Measurements:
    return {
        "images_per_s": found["images"] / found["seconds"],
        "ms_per_image": 1000 * found["seconds"] / found["images"],
        "peak_mb": found["peak_mb"],
        "disturbed": float(found["disturbed"]),
    }


def class_names(count: int) -> list[str]:
    """Names of two made-up words, all different."""
    size = len(SYLLABLES)
    parts = ((n % size, n // size % size, n // size**2) for n in range(count))
    return [f"{SYLLABLES[a]}{SYLLABLES[b]} {SYLLABLES[c]}" for a, b, c in parts]


def in_process(**options: Any) -> dict[str, Any]:
    """What `benchmarks.scale_label` printed, and whether other processes disturbed it.

    Raises:
        MeasurementError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.scale_label"]
    for name, value in options.items():
        command += [f"--{name}", *([] if value is True else [str(value)])]
    seen = watched(command)
    return seen.found | {"disturbed": seen.disturbed}


if __name__ == "__main__":
    sys.exit(main())

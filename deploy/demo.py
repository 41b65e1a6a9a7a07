"""The main job in one go: scenes whose contents are known, labelled twice, measured and shown.

cliplet demo --out runs/demo
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cliplet.labels import read_labels, read_run
from cliplet.metrics import mean_average_precision, micro_f1
from cliplet.plan import DEFAULT_VIEWS, TaggerSettings
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world

from .gallery import GalleryOptions, GallerySummary, write_gallery
from .label import LabelJob, LabelResult, label

# Both parts of the scene world's test images, in this order.
PARTS = ("test-seen", "test-unseen")


@dataclass(frozen=True)
class Measured:
    """How well one way to look did on one part of the scenes.

    Attributes:
        part: `test-seen` (drawings that training knew, in new scenes) or `test-unseen` (a drawing set that
            it never saw).
        mean_average_precision: in percent.
        micro_f1: of the labels at the model's threshold, in percent.
    """

    views: str
    part: str
    images: int
    mean_average_precision: float
    micro_f1: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies."""

    measured: tuple[Measured, ...]
    runs: Mapping[str, LabelResult]
    gallery: GallerySummary


def demo(out: Path, count: int = 300, seed: int = 2026, *, quiet: bool = False) -> DemoResult:
    """Make `count` scenes, label them with `tiny` from the whole image and from views, and write a gallery."""
    truth: dict[str, set[str]] = {}
    sources = []
    for part, size in zip(PARTS, (count - count // 2, count // 2), strict=True):
        written = write_scenes(scene_world(part, seed=seed), out / "scenes" / part, size)
        sources.append(str(written.images))
        with open(out / "scenes" / part / "labels.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                truth[str(written.images / row["file"])] = set(row["classes"].split(";"))
    measured, runs = [], {}
    for views in ("1", DEFAULT_VIEWS):
        folder = out / f"labels-{views}"
        job = LabelJob(
            sources=tuple(sources),
            out=folder,
            tagger=TaggerSettings(views=views),
            overwrite=True,
            quiet=quiet,
        )
        runs[views] = label(job)
        if runs[views].interrupted:
            raise KeyboardInterrupt
        measured += [measure(folder, truth, source, views) for source in sources]
    gallery = write_gallery(
        out / f"labels-{DEFAULT_VIEWS}",
        out / "gallery.html",
        GalleryOptions(title="cliplet demo", truth=truth),
    )
    return DemoResult(tuple(measured), runs, gallery)


def measure(labels: Path, truth: Mapping[str, set[str]], source: str, views: str) -> Measured:
    """The agreement of the rows below `source` with the known classes of their images."""
    classes = read_run(labels)["classes"]
    rows = [row for row in read_labels(labels) if row.path.startswith(source + os.sep)]
    scores_NC = np.stack([row.scores for row in rows])
    truth_NC = np.array([[name in truth[row.path] for name in classes] for row in rows])
    tagged_NC = np.array([[name in row.labels for name in classes] for row in rows])
    return Measured(
        views=views,
        part=next(part for part in PARTS if part in Path(source).parts),
        images=len(rows),
        mean_average_precision=mean_average_precision(scores_NC, truth_NC),
        micro_f1=100 * micro_f1(tagged_NC, truth_NC),
    )

"""Images that a finished engine is compared on and INT8 is calibrated on: files of one's own, or scenes.

Both are decoded from compressed bytes as `label` decodes them, so that a comparison sees the whole path.

Legend: N images, C classes.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from cliplet.contract import GraphContract
from cliplet.dataset_folders import LABELS_FILE
from cliplet.datasets import open_dataset
from cliplet.errors import ClipletError, DataError
from cliplet.images import ImageError, Picture, decode_image, read_image
from cliplet.listing import find_images
from cliplet.plan import DEFAULT_VIEWS
from cliplet.remote_files import is_remote
from cliplet.scene_files import JPEG_QUALITY
from cliplet.scenes import scene_world
from cliplet.views import Preprocessing, Views, place_on_canvas
from cliplet.vocabulary import NO_CLASSES, Vocabulary

log = logging.getLogger("cliplet")
# Worlds that neither training nor the demo draws from.
COMPARISON_SEED, CALIBRATION_SEED = 7001, 7002
FINEST = Views.parse(DEFAULT_VIEWS)
# Where the views of a number that no grids add up to come from.
ALL_GRIDS = Views(tuple(range(2, 10)))


@dataclass(frozen=True, eq=False)
class Samples:
    """Decoded images.

    Attributes:
        truth_NC: which classes they hold, bool [N, C] in the order of a vocabulary, where that is known.
        described: what they are, in words.
        failed: files that could not be decoded, each with its reason.
    """

    pictures: tuple[Picture, ...]
    described: str
    truth_NC: np.ndarray | None = None
    failed: tuple[tuple[str, str], ...] = ()

    def batches(
        self,
        size: int,
        views: Views | int,
        preprocessing: Preprocessing,
        contract: GraphContract,
        filled: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Feeds of a graph for all images, `size` at a time.

        Args:
            views: or how many of them: the whole image, and cells of grids from the coarsest on.
            filled: fill the last batch up with the first images, over and over: an engine may take no smaller one.
        """
        for start in range(0, len(self.pictures), size):
            chosen = self.pictures[start : start + size]
            if filled:
                chosen += tuple(islice(cycle(self.pictures), size - len(chosen)))
            sizes = [(p.width, p.height) for p in chosen]
            pixels = [p.pixels for p in chosen]
            if isinstance(views, Views):
                feeds = place_on_canvas(pixels, views, preprocessing, full_sizes=sizes)
            else:
                boxes = [_cells(image.shape[1], image.shape[0], views - 1) for image in pixels]
                feeds = place_on_canvas(pixels, Views(), preprocessing, boxes, full_sizes=sizes)
            yield contract.of_views(feeds)


def _cells(width: int, height: int, count: int) -> np.ndarray:
    """The first boxes float32 [count, 4] of all grids in an image of `width` x `height`; after the last, again."""
    boxes = ALL_GRIDS.cells(width, height)
    return boxes[np.arange(count) % len(boxes)]


def scene_samples(names: Sequence[str], preprocessing: Preprocessing, count: int, seed: int) -> Samples:
    """The first `count` scenes of a world, through JPEG; with their truth if `names` are among their classes."""
    world = scene_world("test-seen", seed=seed)
    pictures, present = [], []
    for index in range(count):
        scene = world.scene(index)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "JPEG", quality=JPEG_QUALITY)
        pictures.append(decode_image(file.getvalue(), **FINEST.room(preprocessing)))
        present.append(set(scene.classes))
    known = bool(names) and set(names) <= set(world.classes)
    truth_NC = np.array([[name in classes for name in names] for classes in present]) if known else None
    return Samples(tuple(pictures), f"{count} scenes of seed {seed}", truth_NC)


def file_samples(
    sources: Sequence[str],
    preprocessing: Preprocessing,
    limit: int,
    vocabulary: Vocabulary = NO_CLASSES,
) -> Samples:
    """Of `limit` images that sources such as a folder hold, those that can be decoded.

    Their truth is that of the `labels.csv` beside them, where every one of them has a row in classes of `vocabulary`.

    Raises:
        UsageError, DataError: see `find_images`; or none of them can be decoded.
    """
    listed = find_images(sources).images
    # Evenly from all of them: folders are often sorted by class.
    chosen = [
        listed[i] for i in np.unique(np.linspace(0, len(listed) - 1, min(limit, len(listed))).astype(int))
    ]
    truth_of = _truth_of_images(sources, vocabulary)
    pictures, rows, failed = [], [], []
    for ref in chosen:
        try:
            pictures.append(decode_image(read_image(ref), **FINEST.room(preprocessing)))
            rows.append(truth_of.get(ref.path))
        except ImageError as error:
            failed.append((ref.path, error.reason))
    if not pictures:
        raise DataError(
            f"none of {len(chosen)} images in {', '.join(sources)} could be decoded; {failed[0][0]}: {failed[0][1]}",
            "images that can be read",
            "name a folder of other images",
        )
    named = ", ".join(Path(source).name for source in sources)
    known = [row for row in rows if row is not None]
    truth_NC = np.stack(known) if len(known) == len(rows) else None
    described = f"{len(pictures)} of {len(listed)} images in {named}"
    return Samples(tuple(pictures), described, truth_NC, tuple(failed))


def _truth_of_images(sources: Sequence[str], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """The truth, bool [C] by an image's name, that the `labels.csv` files beside the sources tell.

    Labels of other classes, or that cannot be read, are named in a warning: a comparison does without the truth.
    """
    found: dict[str, np.ndarray] = {}
    for source in sources if vocabulary.names else ():
        path = Path(source)
        if is_remote(source) or not ((path if path.is_dir() else path.parent) / LABELS_FILE).is_file():
            continue
        try:
            labelled = open_dataset("folder", path, "all", vocabulary=vocabulary)
        except ClipletError as error:
            log.warning("mAP is not compared on %s: %s", source, error.happened)
            continue
        if labelled.truth_NC is not None:
            found |= dict(zip(labelled.paths, labelled.truth_NC, strict=True))
    return found

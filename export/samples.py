"""Images that a finished engine is compared on and INT8 is calibrated on: files of one's own, or scenes.

Both are decoded from compressed bytes as `label` decodes them, so that a comparison sees the whole path.

Legend: N images, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cliplet.contract import GraphContract
from cliplet.errors import DataError
from cliplet.images import ImageError, Picture, decode_image, read_image
from cliplet.listing import find_images
from cliplet.plan import DEFAULT_VIEWS
from cliplet.scene_files import JPEG_QUALITY
from cliplet.scenes import scene_world
from cliplet.views import Preprocessing, Views, place_on_canvas

# Worlds that neither training nor the demo draws from.
COMPARISON_SEED, CALIBRATION_SEED = 7001, 7002
FINEST = Views.parse(DEFAULT_VIEWS)


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
        self, size: int, views: Views, preprocessing: Preprocessing, contract: GraphContract
    ) -> Iterator[dict[str, np.ndarray]]:
        """Feeds of a graph for all images, `size` at a time."""
        for start in range(0, len(self.pictures), size):
            chosen = self.pictures[start : start + size]
            sizes = [(p.width, p.height) for p in chosen]
            feeds = place_on_canvas([p.pixels for p in chosen], views, preprocessing, full_sizes=sizes)
            yield contract.of_views(feeds)


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


def file_samples(sources: Sequence[str], preprocessing: Preprocessing, limit: int) -> Samples:
    """The first `limit` images that sources such as a folder hold and that can be decoded.

    Raises:
        UsageError, DataError: see `find_images`; or none of them can be decoded.
    """
    listed = find_images(sources).images
    # Evenly from all of them: folders are often sorted by class.
    chosen = [
        listed[i] for i in np.unique(np.linspace(0, len(listed) - 1, min(limit, len(listed))).astype(int))
    ]
    pictures, failed = [], []
    for ref in chosen:
        try:
            pictures.append(decode_image(read_image(ref), **FINEST.room(preprocessing)))
        except ImageError as error:
            failed.append((ref.path, error.reason))
    if not pictures:
        raise DataError(
            f"none of {len(chosen)} images in {', '.join(sources)} could be decoded; {failed[0][0]}: {failed[0][1]}",
            "images that can be read",
            "name a folder of other images",
        )
    named = ", ".join(Path(source).name for source in sources)
    return Samples(
        tuple(pictures), f"{len(pictures)} of {len(listed)} images in {named}", None, tuple(failed)
    )

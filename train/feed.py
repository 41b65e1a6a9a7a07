"""Images to batches: decoded and squashed by threads ahead of the optimiser, in an order that a seed decides.

An image that cannot be read or decoded is missing from its batch and named in it; nothing is replaced.

Legend: N images, B images of a batch, S side of the classifier's input.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import numpy as np
from PIL import Image

from cliplet.images import ImageError, decode_image, read_image
from cliplet.listing import ImageRef
from cliplet.views import OVERSAMPLING

T = TypeVar("T")
R = TypeVar("R")
BATCHES_AHEAD = 2  # for each thread, so that one slow file stalls nobody
SMALLEST_BATCH = 2  # images: the statistics of batch normalisation need more than one


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images of one batch that could be decoded, and those that could not.

    Attributes:
        indices_B: int64 [B], positions in the data set.
        pixels_BSS3: uint8 [B, S, S, 3], RGB.
        places_B: int64 [B], the images' places in the batch that was asked for.
        failed: (position, reason) of the others.
    """

    indices_B: np.ndarray
    pixels_BSS3: np.ndarray
    places_B: np.ndarray
    failed: tuple[tuple[int, str], ...]


class PixelCache:
    """Squashed images that were decoded before, as long as they fit into some bytes of memory; for small data sets.

    Shared by threads: an entry is written once and never changed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._lock = Lock()

    def squashed(self, ref: ImageRef, size: int) -> np.ndarray:
        """The image as `squashed` gives it, decoded at the first time only."""
        key = (ref.path, size)
        found = self._kept.get(key)
        if found is None:
            found = squashed(read_image(ref), size)
            with self._lock:
                if key not in self._kept and self._used_bytes + found.nbytes <= self._limit_bytes:
                    self._kept[key] = found
                    self._used_bytes += found.nbytes
        return found


def ahead(make: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`make` of every item, in order, made by threads a little ahead of whoever takes them; 0 workers means none."""
    if workers == 0:
        yield from map(make, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > BATCHES_AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def squashed(data: bytes, size: int) -> np.ndarray:
    """An encoded image as uint8 [size, size, 3], RGB, its aspect ignored (bilinear, antialiased).

    Raises:
        ImageError: the bytes are not a whole image.
    """
    picture = decode_image(data, fit=OVERSAMPLING * size, short=OVERSAMPLING * size)
    if picture.pixels.shape[:2] == (size, size):
        return picture.pixels
    return np.asarray(Image.fromarray(picture.pixels).resize((size, size), Image.Resampling.BILINEAR))


def load_batch(
    images: Sequence[ImageRef], indices: np.ndarray, size: int, cache: PixelCache | None = None
) -> ImageBatch:
    """The images at `indices`, squashed to `size`."""
    found, places, failed = [], [], []
    for place, index in enumerate(indices.tolist()):
        try:
            ref = images[index]
            found.append(cache.squashed(ref, size) if cache else squashed(read_image(ref), size))
            places.append(place)
        except ImageError as error:
            failed.append((index, f"{error.stage}: {error.reason}"))
    pixels = np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)
    at = np.asarray(places, np.int64)
    return ImageBatch(np.asarray(indices)[at], pixels, at, tuple(failed))


def image_batches(
    images: Sequence[ImageRef],
    batches: Sequence[np.ndarray],
    size: int,
    workers: int,
    cache: PixelCache | None = None,
) -> Iterator[ImageBatch]:
    """The batches of the given positions, in order, decoded ahead."""
    return ahead(lambda indices: load_batch(images, indices, size, cache), batches, workers)


def epoch_batches(
    indices_N: np.ndarray, batch: int, seed: int, epoch: int, least: int = SMALLEST_BATCH
) -> list[np.ndarray]:
    """The batches of an epoch: a permutation that seed and epoch decide, cut into pieces; the last may be smaller.

    If fewer than `least` images are left for the last, they join the batch before it.
    """
    order = np.random.default_rng([seed, epoch]).permutation(indices_N)
    starts = list(range(batch, len(order), batch))
    if starts and len(order) - starts[-1] < least:
        starts.pop()
    return np.split(order, starts)


def share_of(indices: np.ndarray, rank: int, world: int) -> np.ndarray:
    """What process `rank` of `world` takes of a batch: every world-th image."""
    return indices[rank::world]

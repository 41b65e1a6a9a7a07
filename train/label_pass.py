"""The teacher's pass over a data set: every image decoded once, its views or regions scored, its row in a bank.

    with open_teacher("tiny", vocabulary, views="1+3x3") as tagger:
        with LabelBank.open(folder, paths=paths, classes=..., views=10, provenance=provenance(tagger)) as bank:
            report = score_images(tagger, images, bank)

Images are decoded in threads while the engine scores the chunk before, and batches are made inside a chunk: of
images of like size, and of crops of many images. A chunk is always the same stretch of the images and is scored
whole or not at all, so a run that was killed and started again ends with the very rows of an undisturbed one,
for any number of threads that decode.

Legend: n images of a chunk, V views, C classes, r regions of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from cliplet.errors import ClipletError, EnvironmentError_, UsageError
from cliplet.images import ImageError, ImageRef, Picture, decode_image, read_image
from cliplet.machine import usable_cores
from cliplet.plan import VIEWS_PER_BATCH
from cliplet.pseudo_labels import crop_maximum
from cliplet.tagger import Tagger
from cliplet.views import MAX_CANVAS, place_on_canvas

from .label_bank import LabelBank
from .teacher_tagger import open_teacher, provenance

__all__ = ["Boxes", "PassReport", "open_teacher", "provenance", "score_images"]

# A chunk in which the engine refuses at least so many images and takes none means that the engine is broken.
ENGINE_REFUSALS = 8
# For the images of a chunk, by their rows in the bank: float32 [r, 4] each, (x0, y0, x1, y1) from 0 to 1 of the
# full image's width and height.
Boxes = Callable[[np.ndarray, list[Picture]], list[np.ndarray]]
Progress = Callable[[int], None]  # images settled since the last call


@dataclass(frozen=True)
class PassReport:
    """How a pass ended.

    Attributes:
        done, failed: images that this run scored, and that it could not.
        seconds: from the first chunk to the last row.
        views: views that it scored; regions, in a pass over regions.
    """

    done: int
    failed: int
    seconds: float
    views: int


@dataclass(frozen=True)
class _Item:
    """What the engine scores of one image in one go: its own views, or boxes in its pixels."""

    position: int
    picture: Picture
    boxes: np.ndarray | None = None


def score_images(
    tagger: Tagger,
    images: Sequence[ImageRef],
    bank: LabelBank,
    *,
    boxes: Boxes | None = None,
    workers: int = 0,
    chunk: int = 256,
    progress: Progress | None = None,
) -> PassReport:
    """Score all images whose chunk is not settled in the bank, and write their rows.

    Without `boxes`, a row is the probabilities [V, C] of the tagger's views. With them, it is the class-wise
    maximum [1, C] over the regions that they name for the image, and 0 if they name none; the whole image is
    not looked at. At most two chunks of decoded images are in memory.

    Args:
        bank: opened for writing, with a row for each image, and as many views as rows will have.
        boxes: is called in this thread, chunk by chunk, with rows in the bank and the pictures that belong to them.
        workers: threads that decode; 0 means one a core.
        chunk: images of a chunk; a pass that is continued keeps its number.

    Raises:
        UsageError: bank and tagger, images or boxes do not fit together.
        EnvironmentError_: the engine fails on all images of a chunk, or the bank cannot be written. What was
            scored before is kept.
    """
    _check_fit(tagger, images, bank, boxes)
    room = tagger.room if boxes is None else {**tagger.room, "fit": MAX_CANVAS}
    settled = np.ones(len(images), bool)
    settled[bank.pending()] = False
    starts = [s for s in range(0, len(images), chunk) if not settled[s : s + chunk].all()]
    stretches = [images[s : s + chunk] for s in starts]
    done = failed = views = 0
    began = perf_counter()
    for start, loaded in zip(starts, _decoded(stretches, room, workers or usable_cores()), strict=True):
        rows, errors, scored = _score_chunk(tagger, start, loaded, boxes)
        if rows:
            bank.write(start + np.array(list(rows)), np.stack(list(rows.values())))
        for position, error in errors.items():
            bank.fail(start + position, error.stage, error.reason)
        bank.flush()
        done, failed, views = done + len(rows), failed + len(errors), views + scored
        if progress is not None:
            progress(len(loaded))
    return PassReport(done, failed, perf_counter() - began, views)


def _check_fit(tagger: Tagger, images: Sequence[ImageRef], bank: LabelBank, boxes: Boxes | None) -> None:
    wanted = tagger.plan.views.count if boxes is None else 1
    if bank.classes != tagger.classes or bank.views != wanted:
        raise UsageError(
            f"{bank.folder} is a bank of {bank.views} views and the classes {', '.join(bank.classes[:8])}, …",
            f"{wanted} views and the teacher's classes {', '.join(tagger.classes[:8])}, …",
            "open a bank with the teacher's own views and classes",
        )
    if [ref.path for ref in images] != list(bank.paths):
        raise UsageError(
            f"the images are not those of {bank.folder}", "the bank's paths, in its order", "list them again"
        )


def _decoded(
    stretches: Sequence[Sequence[ImageRef]], room: dict[str, int], workers: int
) -> Iterator[list[Picture | ImageError]]:
    """Decoded stretches in order; the next one is under way while one is being used."""
    pool = ThreadPoolExecutor(workers, "decode")
    under_way: list[list[Future[Picture | ImageError]]] = []
    try:
        for ahead in range(len(stretches) + 1):
            if ahead < len(stretches):
                under_way.append([pool.submit(_load, ref, room) for ref in stretches[ahead]])
            if ahead:
                yield [future.result() for future in under_way.pop(0)]
    finally:
        pool.shutdown(cancel_futures=True)


def _load(ref: ImageRef, room: dict[str, int]) -> Picture | ImageError:
    try:
        return decode_image(read_image(ref), **room)
    except ImageError as error:
        return error


def _score_chunk(
    tagger: Tagger, start: int, loaded: Sequence[Picture | ImageError], boxes: Boxes | None
) -> tuple[dict[int, np.ndarray], dict[int, ImageError], int]:
    """Rows [V, C] and errors by position in the chunk, and how many views were scored."""
    errors = {i: image for i, image in enumerate(loaded) if isinstance(image, ImageError)}
    pictures = {i: image for i, image in enumerate(loaded) if not isinstance(image, ImageError)}
    if boxes is None:
        items = [_Item(i, picture) for i, picture in pictures.items()]
        score = partial(_score_views, tagger)
        views = tagger.plan.views.count * len(items)
    else:
        items = _regions(boxes, start, pictures)
        score = partial(_score_regions, tagger)
        views = sum(len(item.boxes) for item in items if item.boxes is not None)
    found, refused = _score_batches(score, _batches(items, tagger.plan.images_per_batch))
    errors |= refused
    rows = {}
    for position in pictures.keys() - refused.keys():
        rows[position] = _row(found.get(position, []), len(tagger.classes))
    return dict(sorted(rows.items())), errors, views


def _row(parts: list[np.ndarray], classes: int) -> np.ndarray:
    """An image's row [V, C]: as scored, or the maximum over the parts that its regions were scored in."""
    if len(parts) == 1:
        return parts[0]
    stacked = np.concatenate(parts) if parts else np.zeros((0, classes), np.float32)
    return crop_maximum(stacked, np.zeros(len(stacked), int), 1)


def _regions(boxes: Boxes, start: int, pictures: dict[int, Picture]) -> list[_Item]:
    """Pieces of at most VIEWS_PER_BATCH regions of one image each."""
    positions = list(pictures)
    named = boxes(start + np.array(positions, np.int64), list(pictures.values()))
    if len(named) != len(positions):
        raise UsageError(f"{len(named)} lists of boxes for {len(positions)} images", "one for each image")
    items = []
    for position, shares in zip(positions, named, strict=True):
        picture = pictures[position]
        height, width = picture.pixels.shape[:2]
        sides = np.array([width, height, width, height], np.float32)
        pixels = np.asarray(shares, np.float32).reshape(-1, 4) * sides
        for begin in range(0, len(pixels), VIEWS_PER_BATCH):
            items.append(_Item(position, picture, pixels[begin : begin + VIEWS_PER_BATCH]))
    return items


def _batches(items: Sequence[_Item], images_per_batch: int) -> Iterator[list[_Item]]:
    """Items that are like each other, so that little is padded: in number of regions, then in size."""

    def likeness(item: _Item) -> tuple[int, ...]:
        count = 0 if item.boxes is None else len(item.boxes)
        return (-count, *item.picture.pixels.shape[:2], item.position)

    waiting = sorted(items, key=likeness)
    while waiting:
        most = waiting[0].boxes
        size = images_per_batch if most is None else max(1, VIEWS_PER_BATCH // len(most))
        yield waiting[:size]
        waiting = waiting[size:]


def _score_batches(
    score: Callable[[Sequence[_Item]], list[np.ndarray]], batches: Iterator[list[_Item]]
) -> tuple[dict[int, list[np.ndarray]], dict[int, ImageError]]:
    """What each image's items scored, and the images that the engine refuses even alone.

    Raises:
        EnvironmentError_: it refuses all of many; then it is broken, and the images are not to blame.
    """
    found: dict[int, list[np.ndarray]] = {}
    refused: dict[int, ImageError] = {}
    for batch in batches:
        try:
            scored = score(batch)
        except ClipletError:
            batch, scored = _score_alone(score, batch, refused)
        for item, probs in zip(batch, scored, strict=True):
            found.setdefault(item.position, []).append(probs)
    if len(refused) >= ENGINE_REFUSALS and not found.keys() - refused.keys():
        raise EnvironmentError_(
            f"the engine refused all {len(refused)} images of a chunk: {next(iter(refused.values())).reason}",
            "an engine that works; nothing was recorded about these images",
            "mend it (`cliplet doctor` looks at it), then the same pass continues",
        )
    return found, refused


def _score_alone(
    score: Callable[[Sequence[_Item]], list[np.ndarray]], batch: list[_Item], refused: dict[int, ImageError]
) -> tuple[list[_Item], list[np.ndarray]]:
    """Those items of a batch that the engine takes one by one, and what they scored."""
    passed, scored = [], []
    for item in batch:
        try:
            scored += score([item])
            passed.append(item)
        except ClipletError as error:
            refused[item.position] = ImageError("infer", error.happened)
    return passed, scored


def _score_views(tagger: Tagger, batch: Sequence[_Item]) -> list[np.ndarray]:
    """Probabilities [V, C] of each image's own views."""
    return list(tagger.score([item.picture for item in batch])["view_probs"])


def _score_regions(tagger: Tagger, batch: Sequence[_Item]) -> list[np.ndarray]:
    """Class-wise maximum [1, C] over each item's regions."""
    pictures = [item.picture for item in batch]
    feeds = place_on_canvas(
        [p.pixels for p in pictures],
        tagger.plan.views,
        tagger.preprocessing,
        [item.boxes for item in batch if item.boxes is not None],
        [(p.width, p.height) for p in pictures],
    )
    # The whole image, which stands before the regions, was scored in a pass of its own.
    feeds["boxes"] = feeds["boxes"][:, 1:]
    probs_nrC = tagger.runner.infer(feeds)["view_probs"]
    return list(probs_nrC.max(axis=1, keepdims=True))

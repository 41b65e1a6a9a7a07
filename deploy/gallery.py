"""One HTML file that shows a labelled collection: thumbnails, tags, scores, errors.

    cliplet gallery LABELS --out gallery.html        about 13 MB for 1,000 photographs

The page opens from the disk without a network: thumbnails are data URIs, and its Content-Security-Policy
allows no request and no script but its own. It holds the scores of every class, so its threshold slider tags
again without a model. A large collection is shown by a sample spread evenly over its rows, and the page says
so. Rows are streamed and thumbnails written chunk by chunk: memory grows with the sample, not with the
collection.

Legend: N images shown, C classes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from cliplet.archives import archive_of
from cliplet.errors import ClipletError, DataError, UsageError, explained_os_errors
from cliplet.images import ImageError, ImageRef, decode_image, find_images, read_image
from cliplet.labels import ErrorRecord, LabelRecord, read_errors, read_labels, read_run
from cliplet.listing import system_name
from cliplet.machine import usable_cores
from cliplet.remote_files import located

T = TypeVar("T")
TEMPLATE = Path(__file__).with_name("gallery.html")
# Where the template lets the data in. What follows the second mark closes the page.
DATA_MARK = "<!-- cliplet: data -->"
THUMBNAILS_MARK = "<!-- cliplet: thumbnails -->"
# Thumbnails the page parses at once: few enough that the first screen does not wait for the last.
CHUNK = 64
JPEG_QUALITY = 74
# Scores travel as uint16 over [0, 1]: two bytes each, finer than any threshold a person would set.
SCORE_STEPS = 65535


@dataclass(frozen=True, kw_only=True)
class GalleryOptions:
    """What the page shows.

    Attributes:
        limit: images on the page at most; a larger collection is sampled evenly.
        thumb: longer side of a thumbnail, in pixels.
        title: heading of the page; the name of the folder of labels if empty.
        truth: the right classes of images, by path; where given, tags are marked correct, false or missed.
        workers: threads that make thumbnails; 0 means one for each core this process may use.
    """

    limit: int = 1000
    thumb: int = 256
    title: str = ""
    truth: Mapping[str, set[str]] | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UsageError(f"a limit of {self.limit} images", "1 or more", "--limit 1000")
        if not 32 <= self.thumb <= 1024:
            raise UsageError(f"thumbnails of {self.thumb} pixels", "32 to 1024", "--thumb 256")


@dataclass(frozen=True)
class GallerySummary:
    """What was written, and how much of the collection it shows."""

    file: Path
    bytes: int
    shown: int
    total: int
    errors_shown: int
    errors: int
    without_thumbnail: int

    @property
    def statement(self) -> str:
        """How many images the page shows, of how many, as it says itself."""
        return shown_statement(self.shown, self.total)


@dataclass(frozen=True)
class _Selection:
    """The rows to show, with what was counted on the way through all rows."""

    rows: list[LabelRecord]
    total: int
    models: tuple[str, ...]
    errors: list[ErrorRecord]


def write_gallery(labels: Path, out: Path, options: GalleryOptions | None = None) -> GallerySummary:
    """The page written to `out` for the folder of labels `labels`, and a summary of it.

    Raises:
        DataError: `labels` holds no labels, or rows that do not fit its run.json.
        EnvironmentError_: `out` cannot be written.
    """
    options = options or GalleryOptions()
    run = read_run(labels)
    classes, thresholds = _vocabulary(run, labels)
    selection = _select(labels, options.limit)
    for row in selection.rows:
        _check_row(row, classes, labels)
    data = _page_data(selection, classes, thresholds, options.title or labels.resolve().name)
    data |= _truth_data(selection.rows, classes, options.truth)
    head, tail = _page(data)
    paths = [located(str(run.get("cwd", "")), row.path) for row in selection.rows]
    thumbnails = _thumbnails(paths, options)

    temporary = out.with_name(out.name + ".tmp")
    with explained_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(head)
                missing = _write_thumbnails(file, thumbnails)
                file.write(tail)
                size = file.tell()
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    return GallerySummary(
        file=out,
        bytes=size,
        shown=len(selection.rows),
        total=selection.total,
        errors_shown=len(data["errors"]),
        errors=len(selection.errors),
        without_thumbnail=missing,
    )


def shown_statement(shown: int, total: int) -> str:
    """How much of the collection is on the page, in words.

    >>> shown_statement(1000, 52310)
    '1,000 of 52,310 images shown, spread evenly over the collection'
    """
    if shown < total:
        return f"{shown:,} of {total:,} images shown, spread evenly over the collection"
    return "1 image, shown" if total == 1 else f"{total:,} images, all shown"


def spread(items: Iterable[T], limit: int) -> tuple[list[T], int]:
    """At most `limit` items spread evenly over `items`, and how many there were; holds 2 x `limit` at most.

    >>> spread(range(10), 5)
    ([0, 2, 4, 6, 8], 10)
    """
    kept: list[T] = []
    stride, total = 1, 0
    for item in items:
        if total % stride == 0:
            kept.append(item)
            if len(kept) == 2 * limit:
                kept = kept[::2]
                stride *= 2
        total += 1
    if len(kept) > limit:
        kept = [kept[i * len(kept) // limit] for i in range(limit)]
    return kept, total


def quantised_scores(
    rows: Sequence[LabelRecord], classes: Sequence[str], thresholds: np.ndarray
) -> np.ndarray:
    """uint16 [N,C]: the scores in steps of 1/65535, each on the side of its threshold that its row says."""
    scores_NC = np.stack([row.scores for row in rows]).astype(np.float64)
    scores_NC = np.clip(np.nan_to_num(scores_NC), 0, 1)
    steps_NC = np.floor(scores_NC * SCORE_STEPS).astype(np.int64)
    floor_C = np.ceil(thresholds * SCORE_STEPS).astype(np.int64)
    index = {name: c for c, name in enumerate(classes)}
    tagged_NC = np.zeros(steps_NC.shape, bool)
    for n, row in enumerate(rows):
        tagged_NC[n, [index[name] for name in row.labels]] = True
    # Rounding may carry a score that lies on its threshold to the other side: by one step, never more.
    near_NC = np.abs(steps_NC - floor_C) <= 1
    steps_NC = np.where(near_NC & tagged_NC, np.maximum(steps_NC, floor_C), steps_NC)
    steps_NC = np.where(near_NC & ~tagged_NC, np.minimum(steps_NC, floor_C - 1), steps_NC)
    return np.clip(steps_NC, 0, SCORE_STEPS).astype(np.uint16)


def _vocabulary(run: Mapping[str, Any], labels: Path) -> tuple[list[str], np.ndarray]:
    classes, thresholds = run.get("classes") or [], run.get("thresholds") or []
    if not classes or len(thresholds) != len(classes):
        raise DataError(
            f"{labels / 'run.json'} names {len(classes)} classes and {len(thresholds)} thresholds",
            "one threshold for each class",
            "label again with --overwrite",
        )
    return [str(name) for name in classes], np.asarray(thresholds, np.float64)


def _select(labels: Path, limit: int) -> _Selection:
    errors = {e.path: e for e in read_errors(labels)}
    models: dict[str, None] = {}

    def rows() -> Iterator[LabelRecord]:
        for row in read_labels(labels):
            # A path in both tables was labelled by a later try.
            errors.pop(row.path, None)
            models[row.model] = None
            yield row

    # Not sorted here: in this order the images of a compressed archive are read front to back.
    shown, total = spread(rows(), limit)
    return _Selection(shown, total, tuple(models), list(errors.values()))


def _check_row(row: LabelRecord, classes: Sequence[str], labels: Path) -> None:
    strangers = sorted(set(row.labels) - set(classes))
    if row.scores.shape != (len(classes),) or strangers:
        raise DataError(
            f"{labels}: the row of {row.path} has {row.scores.size} scores and the unknown classes {strangers}",
            f"a score for each of the {len(classes)} classes of run.json, and no other class",
            "label again with --overwrite",
        )


def _page_data(
    selection: _Selection, classes: list[str], thresholds: np.ndarray, title: str
) -> dict[str, Any]:
    rows = selection.rows
    errors = sorted(selection.errors, key=lambda e: e.path)
    shown_errors, _ = spread(errors, max(len(rows), 1000))
    scores = quantised_scores(rows, classes, thresholds) if rows else np.zeros((0, len(classes)), np.uint16)
    return {
        "title": title,
        "model": ", ".join(selection.models),
        "statement": shown_statement(len(rows), selection.total),
        "classes": classes,
        "thresholds": thresholds.tolist(),
        "rows": [[row.path, row.width, row.height] for row in rows],
        "scores": base64.b64encode(scores.astype("<u2").tobytes()).decode(),
        "errors": [[e.path, e.stage, e.reason] for e in shown_errors],
        "errorsTotal": len(errors),
        "chunk": CHUNK,
    }


def _truth_data(
    rows: Sequence[LabelRecord], classes: Sequence[str], truth: Mapping[str, set[str]] | None
) -> dict[str, Any]:
    """The right classes of each row as indices (null where unknown), and names the run did not look for."""
    if truth is None:
        return {"truth": None, "truthUnknown": []}
    index = {name: c for c, name in enumerate(classes)}
    known = [truth.get(row.path) for row in rows]
    unknown = sorted({name for names in known for name in names or () if name not in index})
    indices = [None if names is None else sorted(index[n] for n in names if n in index) for names in known]
    return {"truth": indices, "truthUnknown": unknown}


def _page(data: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The page up to its thumbnails, and what follows them."""
    template = TEMPLATE.read_text(encoding="utf-8").replace("\r\n", "\n")
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        template = template.replace(f"'{tag}-hash'", f"'sha256-{digest}'")
    head, tail = template.split(THUMBNAILS_MARK)
    block = f'<script type="application/json" id="gallery-data">{_inert_json(data)}</script>'
    # A path may hold half a surrogate pair; as an escape it is JSON again.
    return head.replace(DATA_MARK, block).encode(errors="backslashreplace"), tail.encode()


def _inert_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write_thumbnails(file: BinaryIO, thumbnails: Iterator[list[bytes | str]]) -> int:
    """How many images have no thumbnail; each chunk becomes one data block of base64 or {"missing": reason}."""
    missing = 0
    for number, chunk in enumerate(thumbnails):
        entries = [
            {"missing": made} if isinstance(made, str) else base64.b64encode(made).decode() for made in chunk
        ]
        missing += sum(isinstance(made, str) for made in chunk)
        block = f'<script type="application/json" id="thumbs-{number}">{_inert_json(entries)}</script>\n'
        file.write(block.encode(errors="backslashreplace"))
    return missing


def _thumbnails(paths: Sequence[str], options: GalleryOptions) -> Iterator[list[bytes | str]]:
    """For each chunk of images, a JPEG each, or the reason why there is none."""
    members = _archive_members(paths)
    workers = options.workers or usable_cores()

    def thumbnail(path: str) -> bytes | str:
        source = members.get(path) or ImageRef(path, system_name(path))
        return source if isinstance(source, str) else _thumbnail(source, options.thumb)

    with ThreadPoolExecutor(workers, thread_name_prefix="thumbnail") as pool:
        for start in range(0, len(paths), CHUNK):
            yield list(pool.map(thumbnail, paths[start : start + CHUNK]))


def _archive_members(paths: Sequence[str]) -> dict[str, ImageRef | str]:
    """Where those of the images that lie in archives are, or the reason why they cannot be had."""
    wanted: dict[str, list[str]] = {}
    for path in paths:
        archive = archive_of(path)
        if archive and not os.path.lexists(path):
            wanted.setdefault(archive, []).append(path)
    found: dict[str, ImageRef | str] = {}
    for archive, members in wanted.items():
        reason = "not in the archive any more"
        there: dict[str, ImageRef] = {}
        try:
            there = {ref.path: ref for ref in find_images([system_name(archive)]).images}
        except ClipletError as error:
            reason = error.happened
        found |= {path: there.get(path, reason) for path in members}
    return found


def _thumbnail(ref: ImageRef, side: int) -> bytes | str:
    try:
        picture = decode_image(read_image(ref), fit=side)
    except ImageError as error:
        return error.reason
    jpeg = io.BytesIO()
    Image.fromarray(picture.pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return jpeg.getvalue()

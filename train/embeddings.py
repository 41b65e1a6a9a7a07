"""Where a teacher sees every image of a collection, on disk: written once, read by clustering and by probes.

    FOLDER/embeddings.json   schema, embedder, views, width, digest of the images, when and with which versions
    FOLDER/paths.parquet     the images, in order, with size and time of change; row i of all else belongs to path i
    FOLDER/embeddings.npy    float16 or float32 [N, D], rows of length 1; 0 where an image is not done
    FOLDER/state.npy         uint8 [N]: 0 pending, 1 done, 2 failed
    FOLDER/errors.jsonl      index, path, stage and reason of failures; only those of failed images count

A run that was killed is continued, and with the same batch ends with the very rows of an undisturbed one, because
a batch is always the same stretch of the images and is embedded whole. A collection that has changed is refused.

Legend: N images, B images of a batch, D width of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, Self

import numpy as np

from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.images import ImageError, ImageRef, Picture, decode_image, read_image
from cliplet.labels import ErrorRecord
from cliplet.machine import usable_cores
from cliplet.progress import ProgressBar

from . import bank_files
from .bank_files import BankKind
from .collection import collection_table, differences, facts_of
from .feed import ahead
from .image_rows import ImageRows, held_lock

EMBEDDINGS = BankKind("embeddings", "embedding", "embeddings.json", "embeddings.npy")
DTYPES = ("float16", "float32")
# Embedders that refuse so many images, and have taken none between them, are broken.
REFUSALS = 8
# How far a row's length may be from 1; rounding to float16 moves it by less than 0.0005.
LENGTH_TOLERANCE = 1e-3
# Seconds after which rows are brought to the disk: what a kill costs at most, and a batch being embedded.
FLUSH_EVERY_S = 2.0


class Embedder(Protocol):
    """What gives pictures their embeddings; `cliplet.train.embedder` has some.

    Attributes:
        identity: all that a row depends on, ready for JSON; `model` is only how its user calls it.
        width: D.
        room: how far images may be shrunk: arguments of `decode_image`.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def width(self) -> int: ...

    @property
    def room(self) -> Mapping[str, int]: ...

    def embed(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Float32 [B, D], rows of length 1.

        Raises:
            DataError: a picture is to blame; the others are then given one by one.
            EnvironmentError_: it is not.
        """


@dataclass(frozen=True)
class EmbedOptions:
    """How to embed.

    Attributes:
        workers: threads that decode; 0 means one a core.
        batch: images that are embedded at once.
        dtype: of the file: `float16` or `float32`.
        overwrite: forget embeddings that are there, even those of another collection.
        retry_failed: try images again that failed in an earlier run.
    """

    workers: int = 0
    batch: int = 64
    quiet: bool = False
    dtype: str = "float16"
    overwrite: bool = False
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.workers < 0 or self.dtype not in DTYPES:
            raise UsageError(
                f"batches of {self.batch}, {self.workers} workers and {self.dtype}",
                f"1 image a batch or more, 0 workers or more, and one of {', '.join(DTYPES)}",
            )


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The embeddings of a collection.

    Attributes:
        features_ND: float16 or float32 [N, D], mapped read-only; rows of length 1, 0 where an image is not done.
        done_N: bool [N].
        paths: the images, in the order of the rows.
        failed: images without an embedding, and why.
        provenance: what tells these embeddings from others, ready for JSON.
        embedded, seconds: images that this call embedded, and the time that it took.
    """

    features_ND: np.ndarray
    done_N: np.ndarray
    paths: Sequence[str]
    failed: Sequence[ErrorRecord]
    provenance: Mapping[str, Any]
    embedded: int = 0
    seconds: float = 0.0


class EmbeddingFile(ImageRows):
    """The embeddings in a folder; a context manager when it was opened for writing.

    Attributes:
        description: what embeddings.json says.
    """

    kind = EMBEDDINGS

    def __init__(self, folder: Path, paths: Sequence[str], description: Mapping[str, Any]) -> None:
        super().__init__(folder, paths, (description["width"],))
        self.description = description

    @classmethod
    def open(
        cls,
        folder: Path,
        images: Sequence[ImageRef],
        embedder: Embedder,
        *,
        dtype: str = "float16",
        overwrite: bool = False,
    ) -> Self:
        """The embeddings in `folder`, for writing: new ones, or those of an earlier run to be continued.

        Raises:
            UsageError: they are of another collection or embedder, another run is writing them, or no images.
            DataError: what is there cannot be read.
            EnvironmentError_: the folder cannot be written.
        """
        if not images:
            raise UsageError("no images to embed", "one or more", "choose a folder with images in it")
        table = collection_table(images)
        identity = json.loads(json.dumps(dict(embedder.identity)))
        wanted = {
            "embedder": identity,
            "views": "1",
            "width": embedder.width,
            "dtype": dtype,
            "images": facts_of(table),
        }
        # Runs that share embeddings wait for the one that makes them.
        with held_lock(folder, wait=True) as lock:
            if overwrite or not (folder / EMBEDDINGS.description).exists():
                bank_files.clear(folder, EMBEDDINGS)
            else:
                changed = _changed_facts(folder, wanted) + differences(
                    bank_files.read_images(folder, EMBEDDINGS), table
                )
                if changed:
                    raise _other_embeddings(folder, changed)
            bank_files.lay_out(folder, EMBEDDINGS, table, (embedder.width,), np.dtype(dtype), wanted)
            file = cls(folder, [ref.path for ref in images], wanted)
        file._lock = lock
        return file

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The embeddings in `folder`, for reading only.

        Raises:
            DataError: there are none, or a file is missing or cut off.
            ArtifactError: a version with another layout wrote them.
        """
        description = bank_files.read_description(folder, EMBEDDINGS)
        return cls(folder, bank_files.read_paths(folder, EMBEDDINGS), description)

    def write(self, indices: np.ndarray, features_BD: np.ndarray) -> None:
        """Embeddings float32 [B, D] of some images, each named once; safe from a kill after the next `flush`.

        Raises:
            EnvironmentError_: the disk is full or cannot be written.
        """
        self._write(indices, features_BD)


def embed_images(
    images: Sequence[ImageRef], folder: Path, embedder: Embedder, options: EmbedOptions | None = None
) -> Embeddings:
    """The embeddings of `images`, from `folder` as far as they are there, and written there.

    Images that cannot be read, decoded or embedded (a row that is not finite, or of length 0) are recorded as
    failed; they are not tried again unless `retry_failed` is set.

    Raises:
        UsageError: the folder holds the embeddings of other files or of another embedder, or no images.
        DataError: what is there cannot be read, or not one image could be embedded.
        EnvironmentError_: the embedder refuses everything, or the folder cannot be written. What was embedded
            before is kept.
    """
    options = options or EmbedOptions()
    began = perf_counter()
    with EmbeddingFile.open(
        folder, images, embedder, dtype=options.dtype, overwrite=options.overwrite
    ) as file:
        before = int(file.done.sum())
        if options.retry_failed:
            file.retry_failed()
        _embed_pending(file, images, embedder, options)
        embedded = int(file.done.sum()) - before
    found = read_embeddings(folder)
    if not found.done_N.any():
        first = found.failed[0]
        raise DataError(
            f"not one of {len(images)} images could be embedded; {first.path}: {first.reason}",
            "images that can be decoded",
            "choose another folder of images",
        )
    return Embeddings(**{**vars(found), "embedded": embedded, "seconds": perf_counter() - began})


def read_embeddings(folder: Path) -> Embeddings:
    """The embeddings in `folder` as far as they have come. `DataError`, `ArtifactError`: as `EmbeddingFile.read`."""
    file = EmbeddingFile.read(folder)
    facts = {key: file.description[key] for key in ("embedder", "views", "dtype", "images")}
    provenance = {**facts, "done": int(file.done.sum())}
    return Embeddings(file.rows, file.done, file.paths, file.errors, provenance)


def _embed_pending(
    file: EmbeddingFile, images: Sequence[ImageRef], embedder: Embedder, options: EmbedOptions
) -> None:
    pending = np.zeros(len(images), bool)
    pending[file.pending()] = True
    size = options.batch
    starts = [s for s in range(0, len(images), size) if pending[s : s + size].any()]
    load = partial(_load, embedder.room)
    loads = ahead(load, (images[s : s + size] for s in starts), options.workers or usable_cores())
    flushed = perf_counter()
    # What the embedder has refused since it took an image last; perhaps it is broken, and they are not to blame.
    held: dict[int, ImageError] = {}
    done = len(images) - int(pending.sum())
    with ProgressBar("embeddings", len(images), done=done, quiet=options.quiet) as bar:
        for start, loaded in zip(starts, loads, strict=True):
            rows, errors = _embed_batch(embedder, loaded)
            held |= {start + place: error for place, error in errors.items()}
            if rows:
                file.write(start + np.array(list(rows)), np.stack(list(rows.values())))
            else:
                _refuse_broken(held)
            if rows or start == starts[-1]:
                for index, error in held.items():
                    file.fail(index, error.stage, error.reason)
                held = {}
            if perf_counter() - flushed > FLUSH_EVERY_S:
                file.flush()
                flushed = perf_counter()
            bar.advance(int(pending[start : start + size].sum()))


def _load(room: Mapping[str, int], refs: Sequence[ImageRef]) -> list[Picture | ImageError]:
    return [_load_image(ref, room) for ref in refs]


def _load_image(ref: ImageRef, room: Mapping[str, int]) -> Picture | ImageError:
    try:
        return decode_image(read_image(ref), **room)
    except ImageError as error:
        return error


def _embed_batch(
    embedder: Embedder, loaded: Sequence[Picture | ImageError]
) -> tuple[dict[int, np.ndarray], dict[int, ImageError]]:
    """Rows [D] and errors by place in the batch; what the embedder refuses in company it is given alone."""
    errors = {i: image for i, image in enumerate(loaded) if isinstance(image, ImageError)}
    pictures = {i: image for i, image in enumerate(loaded) if not isinstance(image, ImageError)}
    rows: dict[int, np.ndarray] = {}
    try:
        if pictures:
            rows = dict(zip(pictures, embedder.embed(list(pictures.values())), strict=True))
    except DataError:
        for place, picture in pictures.items():
            try:
                (rows[place],) = embedder.embed([picture])
            except DataError as error:
                errors[place] = ImageError("infer", error.happened)
    for place, row in list(rows.items()):
        length = float(np.linalg.norm(row.astype(np.float64)))
        # Not the other way round: of nan, nothing is true.
        if not abs(length - 1) <= LENGTH_TOLERANCE:
            finite = np.isfinite(row).all()
            reason = f"an embedding of length {length:.3g}" if finite else "an embedding that is not finite"
            errors[place] = ImageError("infer", reason)
            del rows[place]
    return rows, dict(sorted(errors.items()))


def _refuse_broken(held: Mapping[int, ImageError]) -> None:
    """Raise `EnvironmentError_` if the embedder has refused many images one after the other."""
    reasons = [error.reason for error in held.values() if error.stage == "infer"]
    if len(reasons) < REFUSALS:
        return
    raise EnvironmentError_(
        f"the embedder refused {len(reasons)} images one after the other: {reasons[0]}",
        "a model that works on this device; nothing was recorded about these images",
        "mend it (`cliplet doctor` looks at it), then the same command continues",
    )


def _changed_facts(folder: Path, wanted: Mapping[str, Any]) -> list[str]:
    """In what the embedder or the file differs from those that it was begun with."""
    old = bank_files.read_description(folder, EMBEDDINGS)
    changed = [f"{key} ({old[key]} then)" for key in ("views", "width", "dtype") if old[key] != wanted[key]]
    then, now = old["embedder"], wanted["embedder"]
    names = sorted(key for key in (then.keys() | now.keys()) - {"model"} if then.get(key) != now.get(key))
    if names:
        changed.append(f"the embedder ({then.get('model')} then, differs in {', '.join(names)})")
    return changed


def _other_embeddings(folder: Path, changed: Sequence[str]) -> UsageError:
    return UsageError(
        f"{folder} holds other embeddings: {'; '.join(changed)}",
        "the very files and embedder that they were begun with, which continues or reuses them",
        "choose another --out, or embed anew with --overwrite",
    )

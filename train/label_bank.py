"""What the teacher says of every view of every image of a data set, on disk: written once, read by every recipe.

    BANK/bank.json       schema, classes, number of views, provenance, when and with which versions it was begun
    BANK/paths.parquet   the images, in order; row i of all else belongs to path i
    BANK/probs.npy       float32 [N, V, C]
    BANK/state.npy       uint8 [N]: 0 pending, 1 done, 2 failed
    BANK/errors.jsonl    index, path, stage and reason of failures; only those of failed images count

The arrays are plain .npy files, so that anything can read them, and are mapped: memory grows by a path and a
state byte for each image only. Rows reach the disk before their states do: whatever moment a run is killed at,
a done row has its data. A longer list of images that begins with the old one lets the files grow in place.

Legend: N images, V views, C classes, n rows of one call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from cliplet.errors import DataError, UsageError

from . import bank_files
from .image_rows import ImageRows, held_lock


class LabelBank(ImageRows):
    """A bank of view probabilities; a context manager when it was opened for writing.

    Attributes:
        folder: where it lies.
        paths: the images, in the order of the rows.
        classes: names in the order of the last axis.
        views: V.
        provenance: what the rows depend on, as it was given when the bank was begun.
        probs: float32 [N, V, C], mapped read-only; 0 where a row is not done.
    """

    kind = bank_files.LABELS

    def __init__(self, folder: Path, paths: Sequence[str], description: Mapping[str, Any]) -> None:
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.views: int = description["views"]
        self.provenance: dict[str, Any] = description["provenance"]
        super().__init__(folder, paths, (self.views, len(self.classes)))
        self.probs = self.rows

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        paths: Sequence[str],
        classes: Sequence[str],
        views: int,
        provenance: Mapping[str, Any],
        overwrite: bool = False,
        wait: bool = False,
    ) -> Self:
        """The bank in `folder`, for writing: a new one, or the one of an earlier run to be continued.

        It is continued if classes, views and provenance are the same and `paths` are the old ones, with others
        after them or not.

        Args:
            provenance: what the rows depend on, ready for JSON: model, preprocessing, prompts, runtime, boxes.
            overwrite: forget a bank that is there, even another one.
            wait: until another run has written it, instead of raising.

        Raises:
            UsageError: another bank is there, another run is writing it, or there is nothing to put into one.
            DataError: the bank that is there cannot be read.
            EnvironmentError_: the folder cannot be written.
        """
        if not paths or not classes or views < 1:
            raise UsageError(
                f"a bank of {len(paths)} images, {views} views and {len(classes)} classes",
                "one of each or more",
            )
        # Through JSON and back, so that what is compared is what was kept: lists for tuples.
        wanted = json.loads(
            json.dumps({"classes": list(classes), "views": views, "provenance": dict(provenance)})
        )
        with held_lock(folder, wait=wait) as lock:
            if overwrite or not (folder / cls.kind.description).exists():
                bank_files.clear(folder, cls.kind)
            else:
                _refuse_other_bank(folder, paths, wanted)
            images = pa.table({"path": pa.array(paths, pa.string())})
            row, dtype = (views, len(wanted["classes"])), np.dtype("<f4")
            bank_files.lay_out(folder, cls.kind, images, row, dtype, wanted)
            bank = cls(folder, paths, wanted)
        bank._lock = lock
        return bank

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The bank in `folder`, for reading only.

        Raises:
            DataError: there is none, or a file of it is missing or cut off.
            ArtifactError: a version with another layout wrote it.
        """
        description = bank_files.read_description(folder, cls.kind)
        return cls(folder, bank_files.read_paths(folder, cls.kind), description)

    def write(self, indices: np.ndarray, probs_nVC: np.ndarray) -> None:
        """Rows of some images, each named once; they are done, and safe from a kill after the next `flush`.

        Raises:
            DataError: another shape than n x V x C, or a value that is not finite.
            EnvironmentError_: the disk is full or cannot be written.
        """
        indices = np.asarray(indices, np.int64)
        shape = (len(indices), *self.probs.shape[1:])
        if probs_nVC.shape != shape:
            raise DataError(
                f"{list(probs_nVC.shape)} probabilities", f"{list(shape)}: rows, views and classes"
            )
        if not np.isfinite(probs_nVC).all():
            raise DataError("probabilities that are not finite", "numbers from 0 to 1", "try runtime torch")
        self._write(indices, probs_nVC)


def _refuse_other_bank(folder: Path, paths: Sequence[str], wanted: Mapping[str, Any]) -> None:
    """Raise `UsageError` unless the bank in `folder` can be continued with these paths and description."""
    old = bank_files.read_description(folder, bank_files.LABELS)
    changed = [key for key in ("classes", "views") if old[key] != wanted[key]]
    then, now = old["provenance"], wanted["provenance"]
    changed += [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    old_paths = bank_files.read_paths(folder, bank_files.LABELS)
    if list(paths[: len(old_paths)]) != old_paths:
        changed.append("images")
    if changed:
        raise UsageError(
            f"{folder} holds a label bank that differs in {', '.join(changed)}",
            "the same images (more may follow them), classes, views and provenance, which would continue it",
            "choose another folder, or replace what is there with overwrite",
        )

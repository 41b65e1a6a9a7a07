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
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from cliplet.errors import DataError, UsageError
from cliplet.labels import ErrorRecord
from cliplet.lock import lock_folder

from . import bank_files
from .bank_files import DESCRIPTION, FAILURES, PROBS, STATE

PENDING, DONE, FAILED = 0, 1, 2


class LabelBank:
    """A bank of view probabilities; a context manager when it was opened for writing.

    Attributes:
        folder: where it lies.
        paths: the images, in the order of the rows.
        classes: names in the order of the last axis.
        views: V.
        provenance: what the rows depend on, as it was given when the bank was begun.
        probs: float32 [N, V, C], mapped read-only; 0 where a row is not done.
    """

    def __init__(self, folder: Path, paths: Sequence[str], description: Mapping[str, Any]) -> None:
        self.folder = folder
        self.paths = paths
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.views: int = description["views"]
        self.provenance: dict[str, Any] = description["provenance"]
        self.probs = bank_files.mapped(folder / PROBS, (len(paths), self.views, len(self.classes)))
        self._state_N = np.array(bank_files.mapped(folder / STATE, (len(paths),)))
        self._unsaved: list[np.ndarray] = []
        self._failures: list[dict[str, Any]] = []
        self._lock: int | None = None

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
        lock = lock_folder(folder, wait=wait)
        try:
            if overwrite or not (folder / DESCRIPTION).exists():
                bank_files.clear(folder)
            else:
                bank_files.refuse_other_bank(folder, paths, wanted)
            bank_files.lay_out(folder, paths, wanted)
            bank = cls(folder, paths, wanted)
        except BaseException:
            os.close(lock)
            raise
        bank._lock = lock
        return bank

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The bank in `folder`, for reading only.

        Raises:
            DataError: there is none, or a file of it is missing or cut off.
            ArtifactError: a version with another layout wrote it.
        """
        description = bank_files.read_description(folder)
        return cls(folder, bank_files.read_paths(folder), description)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.paths)

    @property
    def done(self) -> np.ndarray:
        """Which images have their probabilities, bool [N]."""
        return self._state_N == DONE

    @property
    def errors(self) -> list[ErrorRecord]:
        """Why images have failed, in their order; of each the last reason that was recorded."""
        found = {e["index"]: e for e in [*bank_files.read_failures(self.folder), *self._failures]}
        failed = [int(i) for i in np.flatnonzero(self._state_N == FAILED)]
        return [ErrorRecord(self.paths[i], found[i]["stage"], found[i]["reason"]) for i in failed]

    def pending(self) -> np.ndarray:
        """Indices of the images that are neither done nor failed, int64, ascending."""
        return np.flatnonzero(self._state_N == PENDING)

    def retry_failed(self) -> None:
        """Make the failed images pending again."""
        self._set_states(np.flatnonzero(self._state_N == FAILED), PENDING)

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
        self._check_writable()
        bank_files.write_rows(self.folder / PROBS, indices, np.ascontiguousarray(probs_nVC, "<f4"))
        self._set_states(indices, DONE)

    def fail(self, index: int, stage: str, reason: str) -> None:
        """Record why an image has no probabilities; it is not pending any more."""
        path = self.paths[index]
        self._failures.append({"index": int(index), "path": path, "stage": stage, "reason": reason})
        self._set_states(np.array([index]), FAILED)

    def flush(self) -> None:
        """Bring everything to the disk: rows and failures first, then the states that vouch for them."""
        if not self._unsaved:
            return
        bank_files.sync(self.folder / PROBS)
        if self._failures:
            bank_files.append_failures(self.folder, self._failures)
            bank_files.sync(self.folder / FAILURES)
        changed = np.unique(np.concatenate(self._unsaved))
        bank_files.write_rows(self.folder / STATE, changed, self._state_N[changed])
        bank_files.sync(self.folder / STATE)
        self._unsaved, self._failures = [], []

    def _set_states(self, indices: np.ndarray, state: int) -> None:
        self._check_writable()
        if len(indices):
            self._state_N[indices] = state
            self._unsaved.append(indices)

    def _check_writable(self) -> None:
        assert self._lock is not None, "LabelBank.read gives a bank that cannot be written"

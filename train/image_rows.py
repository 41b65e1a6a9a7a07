"""One row of numbers for each image of a list, on disk: pending, done or failed, written by one run at a time.

Rows reach the disk before their states do: whatever moment a run is killed at, a done row has its data. Memory grows
by a path and a state byte for each image only.

Legend: N images, n rows of one call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from cliplet.labels import ErrorRecord
from cliplet.lock import lock_folder

from . import bank_files
from .bank_files import FAILURES, STATE, BankKind

PENDING, DONE, FAILED = 0, 1, 2


class ImageRows:
    """Rows and states of images; a context manager when it holds the lock of its folder.

    Attributes:
        folder: where it lies.
        paths: the images, in the order of the rows.
        rows: [N, ...], mapped read-only; 0 where a row is not done.
    """

    kind: ClassVar[BankKind]

    def __init__(self, folder: Path, paths: Sequence[str], row: tuple[int, ...]) -> None:
        self.folder = folder
        self.paths = paths
        self.rows = bank_files.mapped(folder / self.kind.rows, self.kind, (len(paths), *row))
        self._state_N = np.array(bank_files.mapped(folder / STATE, self.kind, (len(paths),)))
        self._unsaved: list[np.ndarray] = []
        self._failures: list[dict[str, Any]] = []
        self._lock: int | None = None

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
        """Which images have their row, bool [N]."""
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

    def fail(self, index: int, stage: str, reason: str) -> None:
        """Record why an image has no row; it is not pending any more."""
        path = self.paths[index]
        self._failures.append({"index": int(index), "path": path, "stage": stage, "reason": reason})
        self._set_states(np.array([index]), FAILED)

    def flush(self) -> None:
        """Bring everything to the disk: rows and failures first, then the states that vouch for them."""
        if not self._unsaved:
            return
        bank_files.sync(self.folder / self.kind.rows)
        if self._failures:
            bank_files.append_failures(self.folder, self._failures)
            bank_files.sync(self.folder / FAILURES)
        changed = np.unique(np.concatenate(self._unsaved))
        bank_files.write_rows(self.folder / STATE, changed, self._state_N[changed])
        bank_files.sync(self.folder / STATE)
        self._unsaved, self._failures = [], []

    def _write(self, indices: np.ndarray, rows: np.ndarray) -> None:
        """Rows [n, ...] of some images, each named once; they are done, and safe from a kill after the next `flush`."""
        self._check_writable()
        data = np.ascontiguousarray(rows, self.rows.dtype)
        bank_files.write_rows(self.folder / self.kind.rows, indices, data)
        self._set_states(indices, DONE)

    def _set_states(self, indices: np.ndarray, state: int) -> None:
        self._check_writable()
        if len(indices):
            self._state_N[indices] = state
            self._unsaved.append(indices)

    def _check_writable(self) -> None:
        assert self._lock is not None, "it was opened for reading"


@contextmanager
def held_lock(folder: Path, *, wait: bool = False) -> Iterator[int]:
    """Context with the lock of `folder`, which is kept unless what is done inside fails; see `lock_folder`."""
    lock = lock_folder(folder, wait=wait)
    try:
        yield lock
    except BaseException:
        os.close(lock)
        raise

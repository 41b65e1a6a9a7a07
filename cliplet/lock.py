"""One writer at a time in a folder, as long as it lives: the lock goes with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from cliplet.errors import EnvironmentError_, UsageError, explained_os_errors


def lock_folder(folder: Path, *, wait: bool = False) -> int:
    """An open file that holds the lock of `folder`, which is made where it is missing; `os.close` gives it back.

    Args:
        wait: until another run gives the lock back, instead of raising.

    Raises:
        UsageError: another run holds it.
        EnvironmentError_: the folder cannot be made or locked.
    """
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise EnvironmentError_(
                f"cannot lock {folder}: {error.strerror}",
                "a file system that knows locks, so that two runs cannot write one folder",
                "choose another --out, on a local disk",
            ) from error
        raise UsageError(
            f"another run is writing to {folder}",
            "one run at a time in one output folder",
            "wait for it to end, or give this run its own folder with --out",
        ) from None
    return lock

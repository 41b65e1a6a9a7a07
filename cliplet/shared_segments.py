"""Shared memory through which a server on this machine reads tensors: no copy through a socket.

A segment is a file in /dev/shm whose name carries the process that made it. Its maker holds a lock on it for as long
as it lives, so that segments of killed processes are told apart and swept by whoever comes next.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import mmap
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from cliplet.errors import EnvironmentError_
from cliplet.triton_wire import Region

FOLDER = Path("/dev/shm")
PREFIX = "cliplet-client-"
# Where tensors begin within a segment, and how segments grow, in bytes.
ALIGNMENT = 64
STEP = 1 << 20

_open: weakref.WeakSet[Segment] = weakref.WeakSet()


class NoSharedMemory(EnvironmentError_):
    """This machine has no shared memory, or none left."""


class Segment:
    """Some shared memory of this process: mapped, locked, and gone when it is closed or the process ends.

    Attributes:
        name: of the file in FOLDER; a server finds it under `key`.

    Raises:
        NoSharedMemory: there is not so much left.
    """

    def __init__(self, size: int) -> None:
        self.size = -(-size // STEP) * STEP
        self.name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
        self._maker = os.getpid()
        self._file = FOLDER / self.name
        try:
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NoSharedMemory(
                f"cannot make {self._file}: {error.strerror}", "a writable /dev/shm"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if os.fstat(self._descriptor).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "swept between its making and its locking")
            # Without it, memory would be found missing when it is written to, and the process killed for it.
            os.posix_fallocate(self._descriptor, 0, self.size)
            self._memory = mmap.mmap(self._descriptor, self.size)
        except OSError as error:
            os.close(self._descriptor)
            self._file.unlink(missing_ok=True)
            full = error.errno in (errno.ENOSPC, errno.ENOMEM)
            raise NoSharedMemory(
                f"{FOLDER} is full: no room for {self.size / 1e6:,.0f} MB"
                if full
                else f"{self._file}: {error}",
                "shared memory for the tensors of each request in flight",
                "make it larger (docker run --shm-size 2g), or --shared-memory off",
            ) from error
        _open.add(self)

    @property
    def key(self) -> str:
        """What POSIX calls it."""
        return f"/{self.name}"

    def write(self, offset: int, array: np.ndarray) -> None:
        """Copy an array there."""
        np.frombuffer(self._memory, array.dtype, array.size, offset).reshape(array.shape)[...] = array

    def close(self) -> None:
        """Give the memory back. A process that was forked from the maker leaves it alone."""
        if self._maker != os.getpid() or self._descriptor < 0:
            return
        self._file.unlink(missing_ok=True)
        # An array may still look at it where work was cut off; the memory then goes with the array.
        with suppress(BufferError):
            self._memory.close()
        os.close(self._descriptor)
        self._descriptor = -1


class SegmentPool:
    """Segments of one connection, one for each request in flight, made and enlarged when needed.

    Args:
        register: lets the server see a segment; `forget` takes that back.
    """

    def __init__(self, register: Callable[[Segment], None], forget: Callable[[str], None]) -> None:
        self._register, self._forget = register, forget
        self._free: list[Segment] = []
        self._known: set[str] = set()
        self._all: set[Segment] = set()
        self._lock = threading.Lock()

    @contextmanager
    def placed(self, feeds: Mapping[str, np.ndarray]) -> Iterator[dict[str, Region]]:
        """Context in which the feeds lie in a segment that the server sees: where each one lies.

        Raises:
            NoSharedMemory: there is not enough left.
        """
        offsets, end = _laid_out(feeds)
        segment = self._taken(end)
        try:
            for name, array in feeds.items():
                segment.write(offsets[name], array)
            if segment.name not in self._known:
                self._register(segment)
                self._known.add(segment.name)
            yield {name: Region(segment.name, offsets[name], array.nbytes) for name, array in feeds.items()}
        finally:
            with self._lock:
                self._free.append(segment)

    def server_forgot(self) -> None:
        """The server was started anew: every segment has to be shown to it again."""
        self._known.clear()

    def close(self) -> None:
        """Give all memory back."""
        with self._lock:
            segments, self._all = self._all, set()
            self._free.clear()
        for segment in segments:
            self._drop(segment)

    def _taken(self, size: int) -> Segment:
        with self._lock:
            # The smallest that is large enough; or else the largest makes room for a larger one.
            self._free.sort(key=lambda s: s.size)
            fitting = [s for s in self._free if s.size >= size]
            found = fitting[0] if fitting else (self._free[-1] if self._free else None)
            if found is not None:
                self._free.remove(found)
        if fitting and found is not None:
            return found
        if found is not None:
            self._drop(found)
        made = Segment(size)
        with self._lock:
            self._all.add(made)
        return made

    def _drop(self, segment: Segment) -> None:
        with self._lock:
            self._all.discard(segment)
        if segment.name in self._known:
            self._known.discard(segment.name)
            self._forget(segment.name)
        segment.close()


def sweep(forget: Callable[[str], None]) -> None:
    """Remove the segments of processes that were killed; the server is told to forget each."""
    with suppress(OSError):
        for file in FOLDER.glob(f"{PREFIX}*"):
            if _is_orphan(file):
                forget(file.name)
                file.unlink(missing_ok=True)


def _is_orphan(file: Path) -> bool:
    """Whether a segment is ours to remove: of our user, and nobody holds it any more."""
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        finally:
            os.close(descriptor)
    return False


def _laid_out(feeds: Mapping[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """Where each array begins, and where the last one ends."""
    offsets, end = {}, 0
    for name, array in feeds.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + array.nbytes
    return offsets, end


@atexit.register
def _close_all() -> None:
    for segment in list(_open):
        segment.close()

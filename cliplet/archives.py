"""Tar archives, here or remote: which members they have, and the bytes of one.

Plain ones are read at any offset. Of one that is compressed with gzip, what was inflated last is kept.
"""

from __future__ import annotations

import functools
import gzip
import io
import os
import posixpath
import re
import tarfile
import threading
from typing import BinaryIO, cast

from cliplet.remote_files import RemoteFile, is_remote, read_remote

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MEMBER = re.compile(r"(.*?\.(?:tar|tar\.gz|tgz)(?:\?[^:]*)?)::.", re.IGNORECASE | re.DOTALL)

_INFLATED_WINDOW_BYTES = 64 << 20
# Of a remote archive one reads at least so much at once: a request takes as long as some megabytes.
_REMOTE_BLOCK_BYTES = 4 << 20


def archive_of(path: str) -> str | None:
    """The archive in which an input lies, by the name that tables show; None for a file of its own."""
    match = _MEMBER.match(path)
    return match[1] if match else None


def open_archive(file: str) -> BinaryIO:
    """A file here or remote, to read at any offset.

    Raises:
        OSError: it cannot be opened.
    """
    if is_remote(file):
        return cast(BinaryIO, io.BufferedReader(RemoteFile(file), _REMOTE_BLOCK_BYTES))
    return open(file, "rb")


def read_archive(file: str, offset: int, size: int, *, compressed: bool) -> bytes:
    """Up to `size` bytes of an archive from `offset` on, counted in what it inflates to if it is compressed.

    Raises:
        OSError, EOFError, zlib.error: they cannot be read.
    """
    if compressed:
        return _inflated_archive(file, os.getpid()).read(offset, size)
    if is_remote(file):
        return read_remote(file, offset, size)
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def archive_members(file: str) -> tuple[dict[str, tarfile.TarInfo], int, bool]:
    """Members of a tar archive by name, how many of them a later one of the same name replaces, and whether it is
    compressed.

    Raises:
        tarfile.TarError, OSError, EOFError, zlib.error: it is cut short, damaged, or no archive.
    """
    with open_archive(file) as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:gz" if compressed else "r:") as archive:
            everything = archive.getmembers()
            # `tarfile` takes a damaged header for the end of the archive; the end is zeros, or nothing at all.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(
                    f"damaged after {len(everything):,} members, at byte {archive.offset:,}"
                )
    members = {member.name: member for member in everything}
    return members, len(everything) - len(members), compressed


def link_target(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member that holds the bytes; None if a link leads out of the archive or in a circle."""
    for _ in range(8):
        if member.islnk():
            target = member.linkname
        elif member.issym():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
        else:
            return member
        held = members.get(target) or members.get(f"./{target}")
        if held is None:
            return None
        member = held
    return None


class _Inflated:
    """The content of a gzip file, read forward once as long as its readers keep about the same pace.

    What was inflated last stays in memory, because neighbours of a member are read by other threads a
    little earlier or later. Who asks for something further back pays for inflating from the start.
    """

    def __init__(self, file: str) -> None:
        self._lock = threading.Lock()
        self._stream = gzip.open(open_archive(file))
        self._window = bytearray()
        self._start = 0

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer where the content ends."""
        with self._lock:
            if offset < self._start:
                self._rewind()
            try:
                self._inflate(offset, size)
            except BaseException:
                self._rewind()  # what failed half-way, perhaps remote, stands nowhere that could be told
                raise
            begin = offset - self._start
            return bytes(self._window[begin : begin + size])

    def _rewind(self) -> None:
        self._stream.seek(0)
        self._window.clear()
        self._start = 0

    def _inflate(self, offset: int, size: int) -> None:
        while self._start + len(self._window) < offset + size:
            chunk = self._stream.read(1 << 20)
            if not chunk:
                break
            self._window += chunk
            surplus = min(len(self._window) - _INFLATED_WINDOW_BYTES, offset - self._start)
            if surplus > 0:
                del self._window[:surplus]
                self._start += surplus


@functools.lru_cache(maxsize=4)
def _inflated_archive(file: str, process: int) -> _Inflated:
    """The content of a gzip file, to be read at any offset.

    One for each process: forked ones would move each other's position in the file.
    """
    return _Inflated(file)

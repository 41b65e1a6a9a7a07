"""Which images a command was given: folders, patterns, single files, text lists and tar archives, as inputs.

    listing = find_images(["photos", "more/**/*.png", "list.txt", "shard.tar"])

Nothing is opened but folders, lists and archives; whether an input is an image shows when it is decoded.
Nothing that was named vanishes: a listed path that is missing, a link that leads nowhere and a folder that
may not be read stay inputs, fail when they are read, and so end in the table of errors.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import glob
import gzip
import os
import posixpath
import re
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cliplet.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
)
LIST_SUFFIX = ".txt"
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_INFLATED_WINDOW_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One input: its name, and where its bytes lie.

    Attributes:
        path: the input as its user would name it, `archive.tar::member` in an archive; valid UTF-8 (bytes
            of a name that are not are written as `\\xff`). This is what result tables hold.
        file: the file to open, as the system names it.
        member: name inside the archive `file`; None for a file of its own.
        offset: first byte of the member, in the inflated archive if that is compressed; -1 for a link to
            something the archive does not hold.
        size: bytes of the member.
        compressed: the archive is compressed with gzip.
    """

    path: str
    file: str
    member: str | None = None
    offset: int = 0
    size: int = 0
    compressed: bool = False


@dataclass(frozen=True)
class Listing:
    """What a command was given.

    Attributes:
        images: the inputs, in the order of the sources; a folder's sorted by path.
        ignored: suffix (lower case, `(none)` for none) to number of files in folders, archives and matches
            of patterns that are not images. Hidden files are not counted.
        duplicates: how many times an input was named once more.
        unreadable: folders that could not be listed. They are among the images too, as inputs that fail.
    """

    images: list[ImageRef]
    ignored: dict[str, int]
    duplicates: int
    unreadable: tuple[str, ...]


def find_images(sources: Sequence[str]) -> Listing:
    """All inputs that the sources name, each once.

    A source is, tried in this order:

    - a folder: the image files (by suffix) in it and below, hidden files and folders left out. Links to
      folders are followed; a folder that is reached twice is walked once.
    - a text list `*.txt`: one path a line, relative to the current folder or else to the list's; blank lines
      and those that begin with `#` are skipped. Every path is an input, whether or not it exists.
    - an archive `*.tar`, `*.tar.gz` or `*.tgz`: its image files, in their order.
    - any other file: an input, whatever its suffix.
    - a pattern with `*`, `?`, `[` or `**`: the images it matches; folders it matches are walked; lists,
      archives and other files count when the pattern spells their suffix (`shards/*.tar`).

    Raises:
        UsageError: no source, a source that does not exist, or a pattern that matches nothing.
        DataError: the sources hold no image, or a list or an archive cannot be read.
    """
    if not sources:
        raise UsageError("no images were named", "a folder, a file, a pattern, a list or a tar archive")
    finder = _Finder()
    for source in sources:
        finder.take(source)
    if len(finder.images) == len(finder.unreadable):
        raise _nothing_found(sources, finder)
    return Listing(
        list(finder.images.values()), dict(finder.ignored), finder.duplicates, tuple(finder.unreadable)
    )


@dataclass(frozen=True)
class _Walked:
    """Files of all kinds, and folders that could not be listed."""

    files: list[str]
    unreadable: list[str]


class _Finder:
    """The inputs found so far."""

    def __init__(self) -> None:
        self.images: dict[tuple[str, str | None], ImageRef] = {}
        self.ignored: Counter[str] = Counter()
        self.duplicates = 0
        self.unreadable: list[str] = []
        self._real_folders: dict[str, str] = {}  # so that `photos/a.jpg` and `./photos/a.jpg` are one

    def take(self, source: str) -> None:
        """Add what one source names."""
        if os.path.isdir(source):
            self._take_walked(_walk([source]))
        elif os.path.exists(source):
            self._take_file(source)
        elif glob.has_magic(source):
            self._take_pattern(source)
        else:
            raise _missing(source)

    def _add(self, ref: ImageRef) -> None:
        folder, name = os.path.split(ref.file)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        key = (os.path.join(self._real_folders[folder], name), ref.member)
        if key in self.images:
            self.duplicates += 1
        else:
            self.images[key] = ref

    def _take_walked(self, walked: _Walked, named_suffix: str | None = None) -> None:
        unreadable = set(walked.unreadable)
        self.unreadable += map(_shown, walked.unreadable)
        for path in sorted([*walked.files, *walked.unreadable]):
            suffix = _suffix(path)
            if path in unreadable or suffix in IMAGE_SUFFIXES:
                self._add(ImageRef(_shown(path), path))
            elif suffix == named_suffix:
                self._take_file(path)
            else:
                self.ignored[suffix or "(none)"] += 1

    def _take_file(self, file: str) -> None:
        if file.lower().endswith(LIST_SUFFIX):
            self._take_list(file)
        elif file.lower().endswith(ARCHIVE_SUFFIXES):
            self._take_archive(file)
        else:
            self._add(ImageRef(_shown(file), file))

    def _take_pattern(self, pattern: str) -> None:
        matched = _matches_below(pattern) if "**" in pattern.split("/") else _matches(pattern)
        if not matched.files and not matched.unreadable:
            raise UsageError(f"nothing matches the pattern {_shown(pattern)}", "at least one file or folder")
        self._take_walked(matched, named_suffix=_suffix(pattern) or None)

    def _take_list(self, file: str) -> None:
        try:
            text = Path(file).read_text("utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise DataError(f"cannot read the list {_shown(file)}: {error.strerror or error}") from error
        if "\0" in text:
            raise DataError(f"the list {_shown(file)} is not text", "UTF-8 text, one path a line")
        for line in text.split("\n"):
            path = line.strip()
            if not path or path.startswith("#"):
                continue
            beside = os.path.join(os.path.dirname(file), path)
            if not os.path.lexists(path) and os.path.lexists(beside):
                path = beside
            self._add(ImageRef(_shown(path), path))

    def _take_archive(self, file: str) -> None:
        try:
            with open(file, "rb") as stream:
                compressed = stream.read(2) == b"\x1f\x8b"
            members, repeated = _members(file, compressed)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"cannot read the archive {_shown(file)}: {error}", "a whole tar archive, plain or with gzip"
            ) from error
        self.duplicates += repeated
        for name, member in members.items():
            if member.isdir() or re.search(r"(^|/)\.(?!\.?/)", name):  # ./ and ../ hide nothing
                continue
            if _suffix(name) not in IMAGE_SUFFIXES:
                self.ignored[_suffix(name) or "(none)"] += 1
                continue
            held = _link_target(member, members)
            offset, size = (held.offset_data, held.size) if held else (-1, 0)
            self._add(ImageRef(f"{_shown(file)}::{_shown(name)}", file, name, offset, size, compressed))


def _walk(roots: Sequence[str]) -> _Walked:
    """All files in and below the folders, hidden ones left out.

    Links to folders wait until the folders themselves have been walked, and are skipped where those led to
    the same place: so a file keeps its real name, and a loop of links ends.
    """
    walked = _Walked([], [])
    folders, links = list(roots), list[str]()
    seen = set[tuple[int, int]]()
    while folders or links:
        is_link = not folders
        folder = folders.pop() if folders else links.pop()
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if is_link and identity in seen:
                continue
            with os.scandir(folder) as entries:
                shown = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            walked.unreadable.append(folder)
            continue
        seen.add(identity)
        for entry in shown:
            if not entry.is_dir():
                walked.files.append(entry.path)
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                folders.append(entry.path)
    return walked


def _matches(pattern: str) -> _Walked:
    """What a pattern without `**` matches; matching folders are walked."""
    paths = glob.glob(pattern)
    walked = _walk(sorted(p for p in paths if os.path.isdir(p)))
    return _Walked([p for p in paths if not os.path.isdir(p)] + walked.files, walked.unreadable)


def _matches_below(pattern: str) -> _Walked:
    """What a pattern with `**` matches: the walk of what stands before it, filtered by what stands after.

    `glob` would follow a loop of links into ever longer names.
    """
    parts = pattern.split("/")
    first = parts.index("**")
    above = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")
    roots = sorted(p for p in glob.glob(above) if os.path.isdir(p)) if above else ["."]
    files, unreadable = list[str](), list[str]()
    for root in roots:
        walked = _walk([root])
        begin = len(os.path.join(root, ""))
        for path in walked.files:
            below = path[begin:].split("/")
            if any(_agree(below[: n + 1], parts[first:]) for n in range(len(below))):
                files.append(path if above else path[begin:])
        unreadable += walked.unreadable
    return _Walked(files, unreadable)


def _agree(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, `**` standing for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_agree(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _agree(parts[1:], pattern[1:])


def _members(file: str, compressed: bool) -> tuple[dict[str, tarfile.TarInfo], int]:
    """Members of a tar archive by name, and how many of them a later one of the same name replaces.

    Raises:
        tarfile.TarError, OSError, EOFError, zlib.error: it is cut short, damaged, or no archive.
    """
    with tarfile.open(file, "r:gz" if compressed else "r:") as archive:
        everything = archive.getmembers()
        # `tarfile` takes a damaged header for the end of the archive; the end is zeros, or nothing at all.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged after {len(everything):,} members, at byte {archive.offset:,}")
    members = {member.name: member for member in everything}
    return members, len(everything) - len(members)


def _link_target(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
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
        self._stream = gzip.open(file)
        self._window = bytearray()
        self._start = 0

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer where the content ends."""
        with self._lock:
            if offset < self._start:
                self._stream.seek(0)
                self._window.clear()
                self._start = 0
            while self._start + len(self._window) < offset + size:
                chunk = self._stream.read(1 << 20)
                if not chunk:
                    break
                self._window += chunk
                surplus = min(len(self._window) - _INFLATED_WINDOW_BYTES, offset - self._start)
                if surplus > 0:
                    del self._window[:surplus]
                    self._start += surplus
            begin = offset - self._start
            return bytes(self._window[begin : begin + size])


@functools.lru_cache(maxsize=4)
def inflated_archive(file: str, process: int) -> _Inflated:
    """The content of a gzip file, to be read at any offset.

    One for each process: forked ones would move each other's position in the file.
    """
    return _Inflated(file)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _shown(path: str) -> str:
    """The path in valid UTF-8; bytes that are not are written as `\\xff`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _missing(source: str) -> UsageError:
    folder, name = os.path.split(source)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    except OSError:
        close = []
    fix = f"did you mean {_shown(os.path.join(folder, close[0]))} ?" if close else ""
    return UsageError(
        f"{_shown(source)} does not exist", "a folder, a file, a pattern, a list or a tar archive", fix
    )


def _nothing_found(sources: Sequence[str], finder: _Finder) -> DataError:
    found = [f"{count:,} {suffix}" for suffix, count in finder.ignored.most_common(8)]
    found += [f"a folder that may not be read: {folder}" for folder in finder.unreadable[:3]]
    where = ", ".join(map(_shown, sources[:3])) + (" …" if len(sources) > 3 else "")
    return DataError(
        f"no images in {where} (found: {', '.join(found) or 'nothing'})",
        f"files whose names end in {' '.join(sorted(IMAGE_SUFFIXES))}",
    )

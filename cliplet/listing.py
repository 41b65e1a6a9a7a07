"""Which images a command was given: folders, patterns, single files, text lists and tar archives, as inputs.

    listing = find_images(["photos", "more/**/*.png", "list.txt", "shard-{000..009}.tar", "s3://bucket/photos"])

Nothing is opened but folders, lists and archives; whether an input is an image shows when it is decoded.
Nothing that was named vanishes: a listed path that is missing, a link that leads nowhere and a folder that
may not be read stay inputs, fail when they are read, and so end in the table of errors.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from cliplet.archives import ARCHIVE_SUFFIXES, archive_members, link_target
from cliplet.errors import DataError, UsageError
from cliplet.file_patterns import Found, braces_expanded, matches, matches_below, walk
from cliplet.remote_files import (
    RemoteError,
    check_protocol,
    find_remote,
    has_pattern,
    is_remote,
    is_web,
    local_path,
    match_remote,
    protocol_of,
    read_remote,
    suffix_of,
)

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
)
LIST_SUFFIX = ".txt"
# Of files that hold other inputs.
_FILE_SUFFIXES = (LIST_SUFFIX, ".tar", ".gz", ".tgz")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One input: its name, and where its bytes lie.

    Attributes:
        path: the input as its user would name it, `archive.tar::member` in an archive; valid UTF-8 (bytes
            of a name that are not are written as `\\xff`). This is what result tables hold.
        file: the file to open, as the system names it, or its URL.
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
    - a pattern with `{000..009}` or `{a,b}`: as if each of these had been named.

    All of them may be remote (`s3://bucket/photos`, `https://example.org/a.jpg`; see `cliplet.remote_files`), and
    so may the lines of a list. A remote file is not asked for until it is read.

    Raises:
        UsageError: no source, a source that does not exist, or a pattern that matches nothing.
        DataError: the sources hold no image, or a list, an archive or a remote folder cannot be read.
        EnvironmentError_: the library for a remote source is missing.
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
        several = [] if os.path.lexists(source) else braces_expanded(source)
        if len(several) > 1:
            for one in several:
                self.take(one)
        elif is_remote(source):
            self._take_remote(source)
        elif os.path.isdir(source):
            self._take_walked(walk([source]))
        elif os.path.exists(source):
            self._take_file(source)
        elif glob.has_magic(source):
            self._take_pattern(source)
        else:
            raise _missing(source)

    def _take_remote(self, url: str) -> None:
        check_protocol(url)
        suffix = suffix_of(url)
        local = local_path(url)
        if local is not None:
            self._take_spelled(local, url)
        elif has_pattern(url):
            found = _asked(match_remote, url)
            if not found or not (found.files or found.unreadable):
                raise UsageError(f"nothing matches the pattern {url}", "at least one file or folder")
            self._take_walked(found, named_suffix=suffix or None)
        elif suffix in IMAGE_SUFFIXES or suffix in _FILE_SUFFIXES or is_web(url) and not url.endswith("/"):
            self._take_file(url)
        else:
            found = _asked(find_remote, url)
            if found is None:
                raise UsageError(f"{url} does not exist", "a remote folder, file or pattern")
            self._take_walked(found, named=url)

    def _take_spelled(self, path: str, url: str) -> None:
        """Add what a path names, with the names that it has as a `file://` URL."""
        scheme = url[: len(url) - len(path)]
        finder = _Finder()
        finder.take(path)
        for ref in finder.images.values():
            self._add(replace(ref, path=ref.path if is_remote(ref.path) else scheme + ref.path))
        self.ignored += finder.ignored
        self.duplicates += finder.duplicates
        self.unreadable += [scheme + folder for folder in finder.unreadable]

    def _add(self, ref: ImageRef) -> None:
        key = (ref.file if is_remote(ref.file) else self._real(ref.file), ref.member)
        if key in self.images:
            self.duplicates += 1
        else:
            self.images[key] = ref

    def _real(self, file: str) -> str:
        folder, name = os.path.split(file)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = self._real_folders[folder]
        joined = os.path.join(real, name)
        return (
            file if joined == file else joined
        )  # the very string where it can be: a collection has millions

    def _take_walked(self, walked: Found, named_suffix: str | None = None, named: str | None = None) -> None:
        """Add the images among what was found, and files that were named or whose suffix was."""
        unreadable = set(walked.unreadable)
        self.unreadable += map(_shown, walked.unreadable)
        for path in sorted([*walked.files, *walked.unreadable]):
            suffix = suffix_of(path)
            if path in unreadable or suffix in IMAGE_SUFFIXES:
                self._add(ImageRef(_shown(path), path))
            elif suffix == named_suffix or path == named:
                self._take_file(path)
            else:
                self.ignored[suffix or "(none)"] += 1

    def _take_file(self, file: str) -> None:
        name = urlsplit(file).path if is_remote(file) and is_web(file) else file
        if name.lower().endswith(LIST_SUFFIX):
            self._take_list(file)
        elif name.lower().endswith(ARCHIVE_SUFFIXES):
            self._take_archive(file)
        else:
            self._add(ImageRef(_shown(file), file))

    def _take_pattern(self, pattern: str) -> None:
        matched = matches_below(pattern) if "**" in pattern.split("/") else matches(pattern)
        if not matched.files and not matched.unreadable:
            raise UsageError(f"nothing matches the pattern {_shown(pattern)}", "at least one file or folder")
        self._take_walked(matched, named_suffix=suffix_of(pattern) or None)

    def _take_list(self, file: str) -> None:
        try:
            data = read_remote(file) if is_remote(file) else Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the list {_shown(file)}: {error.strerror or error}") from error
        text = data.decode("utf-8-sig", errors="surrogateescape")
        if "\0" in text:
            raise DataError(f"the list {_shown(file)} is not text", "UTF-8 text, one path a line")
        protocols = set[str]()
        for line in text.split("\n"):
            path = line.strip()
            if not path or path.startswith("#"):
                continue
            beside = os.path.join(os.path.dirname(file), path)
            if is_remote(path):
                if protocol_of(path) not in protocols:
                    check_protocol(path)
                    protocols.add(protocol_of(path))
            elif is_remote(file) or (not os.path.lexists(path) and os.path.lexists(beside)):
                path = beside
            self._add(ImageRef(_shown(path), local_path(path) or path))

    def _take_archive(self, file: str) -> None:
        try:
            members, repeated, compressed = archive_members(file)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"cannot read the archive {_shown(file)}: {error}", "a whole tar archive, plain or with gzip"
            ) from error
        self.duplicates += repeated
        for name, member in members.items():
            if member.isdir() or re.search(r"(^|/)\.(?!\.?/)", name):  # ./ and ../ hide nothing
                continue
            if suffix_of(name) not in IMAGE_SUFFIXES:
                self.ignored[suffix_of(name) or "(none)"] += 1
                continue
            held = link_target(member, members)
            offset, size = (held.offset_data, held.size) if held else (-1, 0)
            self._add(ImageRef(f"{_shown(file)}::{_shown(name)}", file, name, offset, size, compressed))


def _asked(ask: Callable[[str], Found | None], url: str) -> Found | None:
    try:
        return ask(url)
    except RemoteError as error:
        raise DataError(
            f"cannot list {url}: {error}",
            "a remote folder that can be read",
            "check the address and the rights",
        ) from error


def _shown(path: str) -> str:
    """The path in valid UTF-8; bytes that are not are written as `\\xff`."""
    if path.isascii():
        return path  # the very string: a collection has millions
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def system_name(path: str) -> str:
    """The name of a file as the system has it, from how tables show it."""
    if os.path.lexists(path):
        return path
    restored = re.sub(rb"\\x([89a-f][0-9a-f])", lambda m: bytes.fromhex(m[1].decode()), os.fsencode(path))
    return os.fsdecode(restored) if os.path.lexists(restored) else path


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

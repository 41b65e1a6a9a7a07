"""What names of files mean: folders walked, patterns matched, braces spelled out."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cliplet.errors import UsageError

# More names than one pattern with braces may stand for.
MOST_BRACES = 100_000

_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")


@dataclass(frozen=True)
class Found:
    """Files of all kinds, and folders that could not be listed."""

    files: list[str]
    unreadable: list[str]


def braces_expanded(pattern: str) -> list[str]:
    """All names that a pattern with `{000..009}` or `{a,b}` stands for, in order; else the pattern itself.

    Raises:
        UsageError: they are more than MOST_BRACES.
    """
    pieces: list[Sequence[str]] = []
    count, end = 1, 0
    for braces in _BRACES.finditer(pattern):
        choices = _choices(braces[1])
        count *= len(choices)
        if count > MOST_BRACES:
            raise UsageError(f"{pattern} stands for {count:,} names or more", f"at most {MOST_BRACES:,}")
        pieces += [[pattern[end : braces.start()]], [str(choice) for choice in choices]]
        end = braces.end()
    return ["".join(parts) for parts in itertools.product(*pieces, [pattern[end:]])]


def _choices(inside: str) -> Sequence[str]:
    """What stands between braces: `000..009` or `a,b`."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = int(span[1]), int(span[2])
    width = len(span[1]) if len(span[1]) == len(span[2]) or span[1].startswith("0") else 0
    step = 1 if first <= last else -1
    numbers = range(first, last + step, step)
    if len(numbers) > MOST_BRACES:
        raise UsageError(f"{{{inside}}} stands for {len(numbers):,} names", f"at most {MOST_BRACES:,}")
    return [f"{n:0{width}}" for n in numbers]


def walk(roots: Sequence[str]) -> Found:
    """All files in and below the folders, hidden ones left out.

    Links to folders wait until the folders themselves have been walked, and are skipped where those led to
    the same place: so a file keeps its real name, and a loop of links ends.
    """
    walked = Found([], [])
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


def matches(pattern: str) -> Found:
    """What a pattern without `**` matches; matching folders are walked."""
    paths = glob.glob(pattern)
    walked = walk(sorted(p for p in paths if os.path.isdir(p)))
    return Found([p for p in paths if not os.path.isdir(p)] + walked.files, walked.unreadable)


def matches_below(pattern: str) -> Found:
    """What a pattern with `**` matches: the walk of what stands before it, filtered by what stands after.

    `glob` would follow a loop of links into ever longer names.
    """
    parts = pattern.split("/")
    first = parts.index("**")
    above = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")
    roots = sorted(p for p in glob.glob(above) if os.path.isdir(p)) if above else ["."]
    files, unreadable = list[str](), list[str]()
    for root in roots:
        walked = walk([root])
        begin = len(os.path.join(root, ""))
        for path in walked.files:
            below = path[begin:].split("/")
            if any(_agree(below[: n + 1], parts[first:]) for n in range(len(below))):
                files.append(path if above else path[begin:])
        unreadable += walked.unreadable
    return Found(files, unreadable)


def _agree(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, `**` standing for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_agree(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _agree(parts[1:], pattern[1:])

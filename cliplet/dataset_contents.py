"""What the readers of data sets share: what they return, how class names are matched, how lists are read.

Legend: N images, C classes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cliplet.errors import DataError
from cliplet.listing import ImageRef
from cliplet.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Contents:
    """What a reader found: images, their truth in the order of the vocabulary, and what it decided."""

    vocabulary: Vocabulary
    images: list[ImageRef]
    truth_NC: np.ndarray | None
    notes: list[str]


def spelling(name: str) -> str:
    """The name without case, spaces, `_` and `-`: `tv monitor` and `tvmonitor` are one class."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def columns_by_spelling(vocabulary: Vocabulary) -> dict[str, int]:
    """Column of every class by the spelling of its name and synonyms; a name wins over others' synonyms."""
    columns = {spelling(name): c for c, name in enumerate(vocabulary.names)}
    for c, entry in enumerate(vocabulary.classes):
        for word in entry.synonyms:
            columns.setdefault(spelling(word), c)
    return columns


def column_of(name: str, columns: dict[str, int], source: str) -> int:
    """Column of one class that a file names.

    Raises:
        DataError: the vocabulary does not have it.
    """
    column = columns.get(spelling(name))
    if column is None:
        close = difflib.get_close_matches(spelling(name), columns, 1)
        raise DataError(
            f"{source} names a class {name!r} that is not in the vocabulary",
            f"one of its {len(set(columns.values()))} classes",
            f"did you mean {close[0]!r} ?" if close else "name all classes of the data with --classes",
        )
    return column


def columns_of(names: Sequence[str], vocabulary: Vocabulary, source: str) -> list[int]:
    """Column of every class of a data set whose classes are fixed.

    Raises:
        DataError: the vocabulary lacks one of them, or has one that the data set does not label: it would
            count as absent everywhere.
    """
    columns = columns_by_spelling(vocabulary)
    found = [column_of(name, columns, source) for name in names]
    extra = [n for c, n in enumerate(vocabulary.names) if c not in found]
    if extra or len(set(found)) < len(found):
        raise DataError(
            f"{vocabulary.source} has {len(vocabulary.names)} classes and {source} labels {len(names)}"
            + (f"; not labelled: {', '.join(extra[:5])}" if extra else ""),
            "the same classes, in any order",
            "leave --classes out to take the data set's own",
        )
    return found


def first_of(root: Path, candidates: Iterable[str], what: str, fix: str) -> Path:
    """The first of the candidates that exists below `root`.

    Raises:
        DataError: none does.
    """
    tried = list(candidates)
    for candidate in tried:
        if (root / candidate).exists():
            return root / candidate
    raise DataError(f"no {what} in {root}", f"one of {', '.join(t or '.' for t in tried)}", fix)


def read_lines(path: Path, fix: str) -> list[str]:
    """The lines of a text file that are not blank, without white space around them.

    Raises:
        DataError: it is missing, not text, or has no line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", "the list that comes with the data set", fix) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "a readable text file", fix) from error
    kept = [line.strip() for line in lines if line.strip()]
    if not kept:
        raise DataError(f"{path} is empty", "at least one line", fix)
    return kept


def image_refs(folder: Path, names: Iterable[str]) -> list[ImageRef]:
    """Images by their names below a folder, whether or not they are there."""
    paths = (os.path.join(folder, name) for name in names)
    return [ImageRef(path, path) for path in paths]


def only_labelled(contents: Contents, what: str) -> Contents:
    """Those images that have a positive, and a note of how many had no `what`."""
    assert contents.truth_NC is not None
    kept_N = np.asarray(contents.truth_NC.any(axis=1))
    dropped = int((~kept_N).sum())
    if not dropped:
        return contents
    images = [image for image, kept in zip(contents.images, kept_N, strict=True) if kept]
    note = f"{dropped:,} of {len(kept_N):,} images dropped: no {what}"
    return Contents(contents.vocabulary, images, contents.truth_NC[kept_N], [*contents.notes, note])

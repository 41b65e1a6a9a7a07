"""Images of one's own with a `labels.csv`, and the scenes that `cliplet scenes` writes.

`labels.csv` has the columns `file` and `classes` (names joined by `;`, empty for none); `classes.txt` beside
it holds the vocabulary.

Legend: N images, C classes.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cliplet.dataset_contents import Contents, column_of, columns_by_spelling, image_refs
from cliplet.errors import DataError, UsageError
from cliplet.listing import ImageRef, find_images
from cliplet.scene_files import IMAGE_FOLDERS
from cliplet.vocabulary import Vocabulary, read_vocabulary

LABELS_FILE = "labels.csv"
CLASSES_FILE = "classes.txt"


@dataclass(frozen=True)
class _Row:
    line: int
    file: str
    classes: tuple[str, ...]


def read_folder(root: Path, vocabulary: Vocabulary | None) -> Contents:
    """All images that `root` names, with the truth of the `labels.csv` beside them if there is one.

    Rows name images by their path from `labels.csv`, or by the file name alone where only one image has it.

    Args:
        root: anything `find_images` takes: a folder, an archive, a list, a pattern.
        vocabulary: the classes; those of `classes.txt` beside the images if None.

    Raises:
        UsageError: there is nothing at `root`, or no vocabulary.
        DataError: no images; a row that is malformed, of an unknown class or of no image; an image without.
    """
    listing = find_images([str(root)])
    beside = root if root.is_dir() else root.parent
    chosen = vocabulary or _classes_beside(beside)
    notes = [f"{len(listing.unreadable):,} folders could not be listed"] if listing.unreadable else []
    labels = beside / LABELS_FILE
    if not labels.is_file():
        return Contents(chosen, listing.images, None, [*notes, f"no {labels}: the images have no labels"])
    rows = _rows(labels)
    order = _rows_of_images(rows, listing.images, labels)
    return Contents(chosen, listing.images, _truth(rows, chosen, labels)[order], notes)


def read_scenes(root: Path, part: str, vocabulary: Vocabulary | None) -> Contents:
    """The scenes of one part (`train`, `test-seen`, `test-unseen`) in a folder that `cliplet scenes` wrote.

    Raises:
        UsageError: no `classes.txt`, and no vocabulary given.
        DataError: no scene of that part, rows that are malformed or of unknown classes, or the part in two
            layouts.
    """
    chosen = vocabulary or _classes_beside(root)
    labels = root / LABELS_FILE
    rows = [row for row in _rows(labels) if row.file.startswith(f"{part}_")]
    fix = f"cliplet scenes --out {root} --part {part}"
    if not rows:
        raise DataError(f"{labels} names no scene of the part {part}", f"files that begin with {part}_", fix)
    candidates = [root / name for name in IMAGE_FOLDERS.values()]
    folders = [folder for folder in candidates if any((folder / row.file).exists() for row in rows)]
    if len(folders) != 1:
        where = " and in ".join(map(str, candidates))
        raise DataError(
            f"scenes of the part {part} are both in {where}" if folders else f"no scene of {labels} is there",
            "the scenes of a part in one of them",
            f"write them to a new folder: {fix.replace(str(root), 'NEW', 1)}" if folders else fix,
        )
    return Contents(chosen, image_refs(folders[0], (r.file for r in rows)), _truth(rows, chosen, labels), [])


def _classes_beside(folder: Path) -> Vocabulary:
    path = folder / CLASSES_FILE
    if not path.is_file():
        raise UsageError(
            f"no classes: there is no {path}",
            "a class file beside the images, or the classes themselves",
            "--classes 'cat,dog,person'",
        )
    return read_vocabulary(str(path))


def _rows(path: Path) -> list[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            table = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot read {path}: {error}", "a CSV file with the columns file and classes", "write it anew"
        ) from error
    if not table or table[0][1] != ["file", "classes"]:
        raise DataError(
            f"{path} begins with {','.join(table[0][1]) if table else 'nothing'!r}",
            "the columns `file,classes`",
            "write them as its first line",
        )
    rows = [_row(line, cells, path) for line, cells in table[1:]]
    seen: dict[str, int] = {}
    for row in rows:
        if seen.setdefault(row.file, row.line) != row.line:
            raise DataError(
                f"{path} names {row.file} in lines {seen[row.file]} and {row.line}",
                "one row for every image",
                "join their classes with `;` in one row",
            )
    return rows


def _row(line: int, cells: list[str], path: Path) -> _Row:
    if len(cells) != 2 or not cells[0].strip():
        raise DataError(
            f"line {line} of {path} has {len(cells)} cells: {','.join(cells)!r}",
            "a file and its classes joined by `;`, as in `a.jpg,cat;dog`",
            "put names that hold a comma in double quotes",
        )
    classes = tuple(name.strip() for name in cells[1].split(";") if name.strip())
    return _Row(line, os.path.normpath(cells[0].strip()), classes)


def _truth(rows: list[_Row], vocabulary: Vocabulary, path: Path) -> np.ndarray:
    """Truth of every row, bool [N, C]."""
    columns = columns_by_spelling(vocabulary)
    truth_NC = np.zeros((len(rows), len(vocabulary.names)), dtype=bool)
    for n, row in enumerate(rows):
        for name in row.classes:
            truth_NC[n, column_of(name, columns, f"line {row.line} of {path}")] = True
    return truth_NC


def _rows_of_images(rows: list[_Row], images: list[ImageRef], path: Path) -> list[int]:
    """For every image, the index of its row."""
    below = [image.member or os.path.relpath(image.file, path.parent) for image in images]
    by_path = {os.path.normpath(name): n for n, name in enumerate(below)}
    by_name: dict[str, list[int]] = {}
    for n, name in enumerate(below):
        by_name.setdefault(os.path.basename(name), []).append(n)
    row_of: dict[int, int] = {}
    for r, row in enumerate(rows):
        hits = [by_path[row.file]] if row.file in by_path else by_name.get(row.file, [])
        if not hits:
            problem = "is not among the images"
        elif len(hits) > 1:
            problem = f"is the name of {len(hits)} images"
        elif hits[0] in row_of:
            problem = f"is the image of line {rows[row_of[hits[0]]].line} too"
        else:
            row_of[hits[0]] = r
            continue
        raise DataError(
            f"line {row.line} of {path}: {row.file} {problem}",
            f"the path of one image from {path.parent}, in one row",
            "correct that row, or remove it",
        )
    without = [images[n].path for n in range(len(images)) if n not in row_of]
    if without:
        raise DataError(
            f"{len(without):,} of {len(images):,} images have no row in {path}, the first {without[0]}",
            "a row for every image; an empty cell of classes says that it shows none",
            "add the rows, or move the images away",
        )
    return [row_of[n] for n in range(len(images))]

"""True classes of images that are clustered, where a `labels.csv` lies beside them; only to say how pure clusters are.

`labels.csv` is as data sets of the kind `folder` have it: columns `file` and `classes`, names joined by `;`. Unlike
there it may name other images too, and leave images out: nothing is learned from it.

Legend: N images, C classes.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cliplet.dataset_folders import LABELS_FILE
from cliplet.listing import ImageRef

log = logging.getLogger("cliplet")

COLUMNS = ["file", "classes"]


def truth_beside(sources: Sequence[str], images: Sequence[ImageRef]) -> np.ndarray | None:
    """True classes bool [N, C] of images; None where no `labels.csv` has any for them.

    It is looked for in the folder that a source is or lies in, and in the one above. What cannot be read is told and
    passed over.

    Args:
        sources: as they were given to `find_images`.
    """
    classes_of: dict[int, set[str]] = {}
    for file in _label_files(sources):
        for index, classes in _labels(file, images).items():
            classes_of.setdefault(index, classes)
    names = sorted(set().union(*classes_of.values()))
    if not names:
        return None
    column = {name: number for number, name in enumerate(names)}
    truth_NC = np.zeros((len(images), len(names)), bool)
    for index, classes in classes_of.items():
        truth_NC[index, [column[name] for name in classes]] = True
    return truth_NC


def _label_files(sources: Sequence[str]) -> list[Path]:
    """The nearest `labels.csv` of each source."""
    found = []
    for source in sources:
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        near = [place / LABELS_FILE for place in (folder, folder.absolute().parent)]
        found += [file for file in near if file.is_file()][:1]
    return list(dict.fromkeys(found))


def _labels(file: Path, images: Sequence[ImageRef]) -> dict[int, set[str]]:
    """Classes by the number of the image; rows name images by their path from `file`, or by a name that only one has."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            header, *rows = [row for row in csv.reader(opened) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        log.warning("clusters are not compared with %s, which cannot be read: %s", file, error)
        return {}
    if header != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        log.warning("clusters are not compared with %s, whose columns are not file,classes", file)
        return {}
    by_path: dict[str, int] = {}
    by_name: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        path = os.path.normpath(image.member or os.path.relpath(image.file, file.parent))
        by_path[path] = index
        by_name.setdefault(os.path.basename(path), []).append(index)
    found = {}
    for name, classes in rows:
        row = os.path.normpath(name.strip())
        hits = [by_path[row]] if row in by_path else by_name.get(row, [])
        if len(hits) == 1:
            found[hits[0]] = {word.strip() for word in classes.split(";") if word.strip()}
    return found

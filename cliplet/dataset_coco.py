"""COCO's instances as image labels: a class is positive where it has a box, crowds included.

Legend: N images, C classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.dataset_contents import Contents, columns_of, first_of, image_refs, only_labelled
from cliplet.errors import DataError
from cliplet.vocabulary import Vocabulary

# All that is read of the file. Outlines are most of it, and are let go entry by entry while it is parsed.
_KEPT = ("images", "annotations", "categories", "id", "image_id", "category_id", "file_name", "name")


def read_coco(root: Path, year: int, split: str, vocabulary: Vocabulary) -> Contents:
    """Images of one split that have at least one box, in the file's order; the others are counted in a note.

    Category ids are numbers with gaps (1..90 for 80 classes); classes are matched by their names.

    Args:
        root: the folder that holds `annotations` and the folder of images, or what contains it as `coco`.
        year: 2014 or 2017.
        split: `train` or `val`.
        vocabulary: the classes of the file, in any order.

    Raises:
        DataError: the annotations or the folder of images are missing, or the file is not COCO's.
    """
    name = f"{split}{year}"
    path = first_of(
        root,
        [f"{above}annotations/instances_{name}.json" for above in ("", "coco/", f"coco{year}/")],
        f"annotations of {name}",
        f"unpack annotations_trainval{year}.zip there",
    )
    folder = first_of(
        path.parent.parent, (name, f"images/{name}"), f"images of {name}", f"unpack {name}.zip there"
    )
    content = _load(path)
    try:
        categories = [(entry["id"], entry["name"]) for entry in content["categories"]]
        columns = columns_of([label for _, label in categories], vocabulary, str(path))
        column_by_id = {number: c for (number, _), c in zip(categories, columns, strict=True)}
        row_by_id = {entry["id"]: n for n, entry in enumerate(content["images"])}
        truth_NC = np.zeros((len(content["images"]), len(vocabulary.names)), dtype=bool)
        for entry in content["annotations"]:
            truth_NC[row_by_id[entry["image_id"]], column_by_id[entry["category_id"]]] = True
        refs = image_refs(folder, [entry["file_name"] for entry in content["images"]])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: an entry lacks, or points to a missing, {error}",
            "COCO's instances: images, annotations and categories, each with its id",
            f"unpack annotations_trainval{year}.zip again",
        ) from error
    return only_labelled(Contents(vocabulary, refs, truth_NC, []), "box")


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_outlines)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}", "a whole JSON file", "unpack the annotations again"
        ) from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise DataError(
            f"{path} has no images, annotations and categories",
            "COCO's instances",
            "name the folder of the instances, not of captions or keypoints",
        )
    return content


def _without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in _KEPT if key in entry}

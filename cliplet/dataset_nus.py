"""NUS-WIDE by its official lists: 161,789 images to train on and 107,859 to test on.

CCD and the single-positive papers have another NUS-WIDE, of 150,000 and 60,260 images, in arrays that
`dataset_ccd` reads. Numbers of the two families do not compare.

Legend: N images, C classes.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from cliplet.dataset_contents import Contents, columns_of, first_of, image_refs, read_lines
from cliplet.errors import DataError
from cliplet.vocabulary import Vocabulary, known_vocabulary

_FIX = "unpack NUS-WIDE's ImageList.zip and Groundtruth.zip there"


def read_nus(root: Path, split: str, vocabulary: Vocabulary | None) -> Contents:
    """Images and truth of an official split of NUS-WIDE; images without any concept stay.

    Args:
        root: the folder that holds `Flickr`, `ImageList` and `Groundtruth`, or contains it as `NUS-WIDE`.
        split: `train` or `test`.
        vocabulary: the 81 concepts in another order or with other words; the official ones if None.

    Raises:
        DataError: a list is missing or malformed, or the lists differ in length.
    """
    official = known_vocabulary("nus")
    chosen = vocabulary or official
    columns = columns_of(official.names, chosen, "NUS-WIDE")
    part = split.capitalize()
    images = first_of(
        root,
        [f"{above}Flickr" for above in ("", "NUS-WIDE/", "nuswide/")],
        "folder of NUS-WIDE's images",
        "unpack Flickr.zip there",
    )
    listing = first_of(
        images.parent,
        [f"{above}{part}Imagelist.txt" for above in ("", "ImageList/", "ImageList/ImageList/")],
        f"list of {split} images",
        _FIX,
    )
    labels = first_of(
        images.parent,
        ("Groundtruth/TrainTestLabels", "TrainTestLabels"),
        f"labels of {split} images",
        _FIX,
    )
    names = [_image_name(line, n, listing) for n, line in enumerate(read_lines(listing, _FIX), start=1)]
    truth_NC = np.zeros((len(names), len(columns)), dtype=bool)
    for concept, column in zip(official.names, columns, strict=True):
        truth_NC[:, column] = _labels(labels / f"Labels_{concept}_{part}.txt", len(names))
    without = int((~truth_NC.any(axis=1)).sum())
    note = f"{without:,} of {len(names):,} images have none of the 81 concepts, and are kept"
    return Contents(chosen, image_refs(images, names), truth_NC, [note])


def _image_name(line: str, number: int, listing: Path) -> str:
    # The official lists were written on Windows.
    name = line.replace("\\", "/")
    if not re.fullmatch(r"[^/]+/[^/]+\.jpe?g", name, re.IGNORECASE):
        raise DataError(
            f"line {number} of {listing} is {line!r}",
            "a folder and a file: actor\\0001_2124.jpg",
            _FIX,
        )
    return name


def _labels(path: Path, count: int) -> np.ndarray:
    """Whether each image shows one concept, bool [N]."""
    values = read_lines(path, _FIX)
    if len(values) != count or not {"0", "1"}.issuperset(values):
        odd = sorted(set(values) - {"0", "1"})[:3]
        raise DataError(
            f"{path} has {len(values):,} lines" + (f", some of them {odd}" if odd else ""),
            f"one 0 or 1 for each of the {count:,} images of the list",
            _FIX,
        )
    return np.array(values) == "1"

"""Pascal VOC's main task from the devkit's folder (`VOCdevkit/VOC2012`), with either reading of "difficult".

    negative   the lists ImageSets/Main/<class>_<split>.txt: 1 is positive, 0 (only difficult objects of the
               class) and -1 are negative. CCD and the single-positive papers count so.
    positive   the XML files in Annotations: any object makes its class positive.

Images without a positive are dropped either way.

Legend: N images, C classes.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from cliplet.dataset_contents import (
    Contents,
    column_of,
    columns_by_spelling,
    columns_of,
    first_of,
    image_refs,
    only_labelled,
    read_lines,
)
from cliplet.errors import DataError
from cliplet.vocabulary import Vocabulary, known_vocabulary

DIFFICULT = ("negative", "positive")
_NEGATIVE_NOTE = "classes with only difficult objects count as negative"
_POSITIVE_NOTE = "difficult objects count as positive (from the XML annotations)"
_SETS = Path("ImageSets") / "Main"


def read_voc(root: Path, year: int, split: str, difficult: str, vocabulary: Vocabulary | None) -> Contents:
    """Images and truth of one split of VOC 2007 or 2012; VOC 2012's test split has no public truth.

    Args:
        root: the folder `VOC<year>`, `VOCdevkit` or what contains that.
        year: 2007 or 2012.
        split: `train`, `val`, `trainval` or `test`.
        difficult: `negative` or `positive`.
        vocabulary: the 20 classes in another order or with other words; VOC's own if None.

    Raises:
        DataError: a list or an annotation is missing or malformed, or names an unknown class.
    """
    official = known_vocabulary("voc")
    chosen = vocabulary or official
    columns = columns_of(official.names, chosen, f"VOC{year}")
    devkit = first_of(
        root,
        [f"{above}{_SETS}" for above in ("", f"VOC{year}/", f"VOCdevkit/VOC{year}/")],
        f"VOC{year} lists",
        f"name the unpacked devkit: the folder that holds VOCdevkit/VOC{year}",
    ).parent.parent
    images = devkit / "JPEGImages"
    if year == 2012 and split == "test":
        names = [f"{name}.jpg" for name in _split_names(devkit, split)]
        return Contents(chosen, image_refs(images, names), None, ["VOC2012's test labels are not public"])
    files = [devkit / _SETS / f"{name.replace(' ', '')}_{split}.txt" for name in official.names]
    if difficult == "negative" and any(file.exists() for file in files):
        ids, truth_NC = _from_class_files(files, columns)
        note = _NEGATIVE_NOTE
    else:
        ids = _split_names(devkit, split)
        truth_NC = _from_xml(devkit / "Annotations", ids, chosen, with_difficult=difficult == "positive")
        from_xml = f"{_NEGATIVE_NOTE} (from the XML annotations: there are no <class>_{split}.txt)"
        note = _POSITIVE_NOTE if difficult == "positive" else from_xml
    refs = image_refs(images, (f"{name}.jpg" for name in ids))
    what = "positive class" if difficult == "positive" else "class with an object that is not difficult"
    return only_labelled(Contents(chosen, refs, truth_NC, [note]), what)


def _split_names(devkit: Path, split: str) -> list[str]:
    path = devkit / _SETS / f"{split}.txt"
    names = read_lines(path, f"unpack the archive that holds {split}; VOC2007's test is one of its own")
    for number, name in enumerate(names, start=1):
        if len(name.split()) != 1:
            raise DataError(
                f"line {number} of {path} is {name!r}",
                "the name of one image without its suffix",
                "unpack the devkit again",
            )
    return names


def _from_class_files(files: list[Path], columns: list[int]) -> tuple[list[str], np.ndarray]:
    ids: list[str] = []
    labels = []
    for file in files:
        entries = [_class_entry(line, file) for line in read_lines(file, "unpack the devkit again")]
        named = [name for name, _ in entries]
        if ids and named != ids:
            raise DataError(
                f"{file} lists {len(named):,} images and {files[0].name} {len(ids):,}, or in another order",
                "the same images in the lists of all classes",
                "unpack the devkit again",
            )
        ids = named
        labels.append([positive for _, positive in entries])
    truth_NC = np.zeros((len(ids), len(columns)), dtype=bool)
    truth_NC[:, columns] = np.array(labels, dtype=bool).T
    return ids, truth_NC


def _class_entry(line: str, file: Path) -> tuple[str, bool]:
    parts = line.split()
    if len(parts) != 2 or parts[1] not in ("-1", "0", "1"):
        raise DataError(
            f"{file} has the line {line!r}",
            "an image's name and -1 (absent), 0 (only difficult) or 1 (present)",
            "unpack the devkit again",
        )
    return parts[0], parts[1] == "1"


def _from_xml(folder: Path, ids: list[str], vocabulary: Vocabulary, *, with_difficult: bool) -> np.ndarray:
    columns = columns_by_spelling(vocabulary)
    truth_NC = np.zeros((len(ids), len(vocabulary.names)), dtype=bool)
    for n, name in enumerate(ids):
        path = folder / f"{name}.xml"
        for kind, is_difficult in _objects(path):
            column = column_of(kind, columns, str(path))
            if with_difficult or not is_difficult:
                truth_NC[n, column] = True
    return truth_NC


def _objects(path: Path) -> list[tuple[str, bool]]:
    """Class and difficulty of each object; the `name` of an object's parts (head, hand) is none of them."""
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError) as error:
        raise DataError(
            f"cannot read the annotation {path}: {error}",
            "one XML file for every image of the split",
            "unpack the devkit again",
        ) from error
    return [
        (node.findtext("name", "").strip(), node.findtext("difficult", "0").strip() == "1")
        for node in root.findall("object")
    ]

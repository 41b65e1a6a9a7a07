"""The arrays that CCD's code and that of the single-positive papers read: file names, and a matrix of labels.

Legend: N images, C classes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cliplet.dataset_contents import Contents, columns_of, image_refs, spelling
from cliplet.errors import DataError
from cliplet.vocabulary import Vocabulary, known_vocabulary

_LIST_BY_CLASSES = {20: "voc", 80: "coco", 81: "nus"}
_IMAGE_FOLDERS = (
    "",
    "JPEGImages",
    "images",
    "Flickr",
    *(f"{above}VOC{year}/JPEGImages" for above in ("", "VOCdevkit/") for year in (2012, 2007)),
    "coco",
    "nuswide/Flickr",
)


def read_ccd(root: Path, split: str, vocabulary: Vocabulary | None) -> Contents:
    """Images of `formatted_<split>_images.npy` with the 0 and 1 [N, C] of `formatted_<split>_labels.npy`.

    Names are relative to a folder of images, which is looked for in, beside and above that of the arrays.

    Args:
        root: the folder of the arrays, or one that holds it (`metadata/voc12`).
        split: `train` or `val`.
        vocabulary: the classes. If None, Pascal VOC's for 20 columns, COCO's for 80 and NUS-WIDE's for 81;
            the same classes in another order move their columns; any others are taken in the columns' order.

    Raises:
        DataError: an array is missing, pickled, of another kind, or does not fit the other; the vocabulary
            does not fit; no folder has the images.
    """
    folder = _folder(root, f"formatted_{split}_images.npy")
    names = _names(folder / f"formatted_{split}_images.npy")
    truth_NC = _truth(folder / f"formatted_{split}_labels.npy", len(names))
    chosen, truth_NC = _classes(truth_NC, vocabulary, folder)
    images = _images(folder, names)
    note = f"images in {images}; classes of {chosen.source}"
    return Contents(chosen, image_refs(images, names), truth_NC, [note])


def _classes(
    labels_NC: np.ndarray, vocabulary: Vocabulary | None, folder: Path
) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary, and the labels in its order."""
    classes = labels_NC.shape[1]
    known = known_vocabulary(_LIST_BY_CLASSES[classes]) if classes in _LIST_BY_CLASSES else None
    chosen = vocabulary or known
    if chosen is None or len(chosen.names) != classes:
        raise DataError(
            f"{folder} has labels of {classes} classes"
            + (f", and {chosen.source} has {len(chosen.names)}" if chosen else ""),
            "20 (Pascal VOC), 80 (COCO) or 81 (NUS-WIDE), or a vocabulary with one class for each column",
            "name the classes in the order of the columns with --classes",
        )
    if known is None or set(map(spelling, known.names)) != set(map(spelling, chosen.names)):
        return chosen, labels_NC
    truth_NC = np.zeros_like(labels_NC)
    truth_NC[:, columns_of(known.names, chosen, str(folder))] = labels_NC
    return chosen, truth_NC


def _folder(root: Path, file: str) -> Path:
    found = [
        path.parent for pattern in (file, f"*/{file}", f"metadata/*/{file}") for path in root.glob(pattern)
    ]
    if not found:
        raise DataError(
            f"no {file} in {root}",
            "the arrays there, one folder below, or in metadata/",
            "download CCD's metadata there, or name its folder",
        )
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in sorted(found))
        raise DataError(
            f"{len(found)} folders in {root} have {file}: {names}",
            "the arrays of one data set",
            "name one of these folders",
        )
    return found[0]


def _array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"cannot read {path}: {error}",
            "an array of plain text or numbers; pickled objects are not read, they could run any code",
            'if it holds objects and you trust its source, convert it once: python -c "import numpy as np; '
            f"np.save('{path}', np.array(np.load('{path}', allow_pickle=True).tolist()))\"",
        ) from error
    return array


def _names(path: Path) -> list[str]:
    names_N = _array(path)
    if names_N.dtype.kind not in "US" or names_N.ndim != 1 or not names_N.size:
        raise DataError(
            f"{path} is {names_N.dtype} {list(names_N.shape)}",
            "a list of file names: text [N]",
            "make it again, or download it again",
        )
    return [str(name) for name in names_N.astype(str)]


def _truth(path: Path, count: int) -> np.ndarray:
    labels_NC = _array(path)
    if labels_NC.dtype.kind not in "biuf" or labels_NC.ndim != 2 or len(labels_NC) != count:
        raise DataError(
            f"{path} is {labels_NC.dtype} {list(labels_NC.shape)}",
            f"a number for each of the {count:,} images and each class: [{count}, C]",
            "take both arrays from the same place",
        )
    truth_NC = labels_NC == 1
    if not (truth_NC | (labels_NC == 0)).all():
        raise DataError(
            f"{path} holds values other than 0 and 1",
            "the full labels, not those with unknown entries (labels_obs)",
            "take formatted_<split>_labels.npy",
        )
    return truth_NC


def _images(folder: Path, names: list[str]) -> Path:
    """The first folder near the arrays that has one of the first images."""
    bases = [Path(os.path.normpath(folder / up)) for up in ("", "..", "../..")]
    for base in bases:
        for below in _IMAGE_FOLDERS:
            if any((base / below / name).exists() for name in names[:50]):
                return base / below
    raise DataError(
        f"no folder near {folder} has {names[0]}",
        f"the images below one of {', '.join(map(str, bases))}",
        "put the folder of the arrays beside the images, or link to them there",
    )

"""Data sets for training and evaluation: which images, and which classes each of them shows.

    train = open_dataset("voc12", Path("VOCdevkit"), "train")
    train.images, train.truth_NC, train.notes

    voc07, voc12    the devkit's folders                  split train, val, trainval, test
    coco14, coco17  annotations/instances_*.json          split train, val
    nus             the official lists of NUS-WIDE        split train, test
    ccd             formatted_<split>_{images,labels}.npy, as CCD's code reads them   split train, val
    scenes          what `cliplet scenes` wrote           split train, test-seen, test-unseen
    folder          images of one's own, with a labels.csv or without labels          split all

Legend: N images, C classes.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cliplet.dataset_ccd import read_ccd
from cliplet.dataset_coco import read_coco
from cliplet.dataset_contents import Contents
from cliplet.dataset_folders import read_folder, read_scenes
from cliplet.dataset_nus import read_nus
from cliplet.dataset_voc import DIFFICULT, read_voc
from cliplet.errors import DataError, UsageError
from cliplet.listing import ImageRef
from cliplet.scenes import PARTS
from cliplet.vocabulary import Vocabulary, known_vocabulary

# Splits of each kind: first the one that is trained on, then the one that is evaluated on.
SPLITS: dict[str, tuple[str, ...]] = {
    "voc07": ("trainval", "test", "train", "val"),
    "voc12": ("train", "val", "trainval", "test"),
    "coco14": ("train", "val"),
    "coco17": ("train", "val"),
    "nus": ("train", "test"),
    "ccd": ("train", "val"),
    "scenes": PARTS,
    "folder": ("all",),
}
_YEARS = {"voc07": 2007, "voc12": 2012, "coco14": 2014, "coco17": 2017}
# Images that are left after those without a positive are dropped (NUS-WIDE: all of the official lists).
_OFFICIAL_SIZES = {
    ("voc07", "trainval"): 5_011,
    ("voc07", "test"): 4_952,
    ("voc12", "train"): 5_717,
    ("voc12", "val"): 5_823,
    ("voc12", "trainval"): 11_540,
    ("coco14", "train"): 82_081,
    ("coco14", "val"): 40_137,
    ("coco17", "train"): 117_266,
    ("coco17", "val"): 4_952,
    ("nus", "train"): 161_789,
    ("nus", "test"): 107_859,
}
# The arrays of CCD do not say what they are of; their number of classes does, but for the two years of Pascal VOC.
_ARRAY_SIZES = {
    (20, "train"): (5_717, 5_011),
    (20, "val"): (5_823, 4_952),
    (80, "train"): (82_081,),
    (80, "val"): (40_137,),
    (81, "train"): (150_000,),
    (81, "val"): (60_260,),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their classes.

    Attributes:
        name: the kind it was opened as.
        split: which part of it.
        vocabulary: the classes, in the order of the truth's columns.
        images: where each image is; whether it can be read shows when it is.
        truth_NC: bool [N, C]; None where the images have no labels.
        notes: what the reader decided: images it dropped and why, what "difficult" counts as.
    """

    name: str
    split: str
    vocabulary: Vocabulary
    images: tuple[ImageRef, ...]
    truth_NC: np.ndarray | None
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.truth_NC is not None:
            assert self.truth_NC.dtype == bool
            assert self.truth_NC.shape == (len(self.images), len(self.vocabulary.names))

    @property
    def paths(self) -> list[str]:
        """Each image as its user would name it."""
        return [image.path for image in self.images]

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The images with these indices, in their order, with their truth."""
        images = tuple(self.images[int(n)] for n in indices)
        truth_NC = None if self.truth_NC is None else self.truth_NC[np.asarray(indices, dtype=np.intp)]
        note = f"{len(images):,} of {len(self.images):,} images chosen"
        return replace(self, images=images, truth_NC=truth_NC, notes=(*self.notes, note))


def open_dataset(
    kind: str,
    root: Path,
    split: str,
    *,
    vocabulary: Vocabulary | None = None,
    difficult: str = "negative",
    check_counts: bool = True,
) -> Dataset:
    """The images and the truth of one split of a data set.

    NUS-WIDE comes in two families whose numbers do not compare: `nus` reads the official lists (161,789 and
    107,859 images), `ccd` the arrays of CCD and the single-positive papers (150,000 and 60,260 images).

    Args:
        kind: a key of `SPLITS`.
        root: the data set's folder, or the one that contains it; for `folder` whatever `find_images` takes.
        split: one of `SPLITS[kind]`; COCO's may have the year (`train2014`).
        vocabulary: the classes in another order, with synonyms or other prompts; the data set's own if None.
            Names are matched without case, spaces, `_` and `-`.
        difficult: Pascal VOC alone: whether a class with only difficult objects is `negative`, as in the
            ImageSets lists and the papers that use them, or `positive`.
        check_counts: refuse a public data set whose split has not the official number of images.

    Raises:
        UsageError: an unknown kind, split or convention, no such folder, or no vocabulary.
        DataError: what is there is not the data set, is not whole, or none of its images is there.
    """
    _refuse_unknown(kind, split, difficult)
    if kind != "folder" and not root.is_dir():
        raise UsageError(f"there is no folder {root}", f"the folder of {kind}", "check the path")
    if kind.startswith("coco"):
        split = split.removesuffix(str(_YEARS[kind]))
    contents = _read(kind, root, split, vocabulary, difficult)
    if check_counts:
        _refuse_other_size(kind, split, len(contents.images), len(contents.vocabulary.names))
    if not any(os.path.exists(image.file) for image in contents.images):
        raise DataError(
            f"none of the {len(contents.images):,} images of {kind} {split} is there",
            f"files such as {contents.images[0].path}" if contents.images else "at least one image",
            "unpack the archives of images beside the lists",
        )
    return Dataset(
        kind, split, contents.vocabulary, tuple(contents.images), contents.truth_NC, tuple(contents.notes)
    )


def _read(kind: str, root: Path, split: str, vocabulary: Vocabulary | None, difficult: str) -> Contents:
    if kind.startswith("voc"):
        return read_voc(root, _YEARS[kind], split, difficult, vocabulary)
    if kind.startswith("coco"):
        return read_coco(root, _YEARS[kind], split, vocabulary or known_vocabulary(kind))
    if kind == "nus":
        return read_nus(root, split, vocabulary)
    if kind == "ccd":
        return read_ccd(root, split, vocabulary)
    if kind == "scenes":
        return read_scenes(root, split, vocabulary)
    return read_folder(root, vocabulary)


def _refuse_unknown(kind: str, split: str, difficult: str) -> None:
    if kind not in SPLITS:
        close = difflib.get_close_matches(kind, SPLITS, 1)
        raise UsageError(
            f"no kind of data set is called {kind!r}",
            f"one of {', '.join(SPLITS)}",
            f"did you mean {close[0]} ?" if close else "",
        )
    full = [f"{name}{_YEARS[kind]}" for name in SPLITS[kind]] if kind.startswith("coco") else []
    if split not in (*SPLITS[kind], *full):
        raise UsageError(f"{kind} has no split {split!r}", f"one of {', '.join(SPLITS[kind])}")
    if difficult not in DIFFICULT:
        raise UsageError(f"difficult objects as {difficult!r}", f"one of {', '.join(DIFFICULT)}")
    if difficult != "negative" and not kind.startswith("voc"):
        raise UsageError(
            f"{kind} with difficult objects as {difficult}",
            "Pascal VOC: no other data set marks objects as difficult",
            "leave the option out",
        )


def _refuse_other_size(kind: str, split: str, found: int, classes: int) -> None:
    if kind == "ccd":
        official = _ARRAY_SIZES.get((classes, split), (found,))
    else:
        official = (_OFFICIAL_SIZES.get((kind, split), found),)
    if found not in official:
        raise DataError(
            f"{kind} {split} has {found:,} images" + (f" of {classes} classes" if kind == "ccd" else ""),
            f"the official {' or '.join(f'{size:,}' for size in official)}, without which results do not compare "
            "with the papers'",
            "unpack the data set again, or take it as it is with --no-count-check",
        )

"""What the papers report, for the tables that stand beside our own: mAP in percent.

The comparison of annotation-free methods and the ablation on VOC 2012 are those of CCD's paper (Kim & Shim, CVPR
2025). They come from other data, students and teachers than a run here: read the order, not the distance.
"""

from __future__ import annotations

# Rows of the comparison by data set and by our names for the methods. `nus` is the family of the public code's
# arrays (81 classes, 60,260 images to evaluate on), whose numbers do not compare with those of the official lists.
REPORTED: dict[str, dict[str, float]] = {
    "voc12": {
        "bce": 90.1, "bce_ls": 91.6, "an": 85.5, "an_ls": 86.8, "wan": 84.2, "durand": 81.3, "role": 82.6,
        "cdul": 88.6, "ccd": 90.1,
    },
    "voc07": {
        "bce": 91.3, "bce_ls": 92.6, "an": 86.5, "an_ls": 87.9, "wan": 86.2, "durand": 83.1, "role": 84.6,
        "cdul": 89.0, "ccd": 91.0,
    },
    "coco14": {
        "bce": 78.5, "bce_ls": 79.4, "an": 65.1, "an_ls": 65.5, "wan": 63.9, "durand": 63.2, "role": 67.1,
        "cdul": 69.2, "ccd": 70.3,
    },
    "nus": {
        "bce": 50.7, "bce_ls": 51.7, "an": 40.8, "an_ls": 41.3, "wan": 40.1, "durand": 39.4, "role": 43.2,
        "cdul": 44.0, "ccd": 44.5,
    },
}  # fmt: skip
# Components of CCD on VOC 2012; the paper's marks for the middle rows are read from a second-hand copy.
REPORTED_ABLATION = {
    "no part of CCD": 86.4,
    "label update": 88.7,
    "label update + debias": 89.4,
    "label update + consistency": 88.8,
    "ccd": 90.1,
}


# The arrays of the public code by their classes and their evaluation images.
ARRAYS = {(20, 5_823): "voc12", (20, 4_952): "voc07", (80, 40_137): "coco14", (81, 60_260): "nus"}


def reported_table(kind: str, classes: int, images: int) -> str | None:
    """Which table of `REPORTED` may stand beside results on a data set; None if the papers have no such split.

    Args:
        kind: of `cliplet.datasets.open_dataset`. The scene world and one's own folders stand beside VOC 2012.
        classes, images: of the evaluation split.
    """
    if kind == "ccd":
        return ARRAYS.get((classes, images))
    if kind in ("scenes", "folder"):
        return "voc12"
    return kind if kind in REPORTED and kind != "nus" else None


def reported(table: str | None, name: str) -> float | None:
    """The papers' mAP of a row in one of the tables; ablations are of VOC 2012 alone."""
    if table is None:
        return None
    return REPORTED[table].get(name, REPORTED_ABLATION.get(name) if table == "voc12" else None)

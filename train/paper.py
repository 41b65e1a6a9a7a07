"""What the papers report, for the tables that stand beside our own: mAP in percent.

The comparison of annotation-free methods and the ablation on VOC 2012 are those of CCD's paper (Kim & Shim, CVPR
2025). They come from other data, students and teachers than a run here: read the order, not the distance.
"""

from __future__ import annotations

# Rows of the comparison by data set and by our names for the methods.
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


def reported(data: str, name: str) -> float | None:
    """The papers' mAP of a row: of the data set itself, or of VOC 2012 for the scene world and for ablations."""
    table = REPORTED.get("voc12" if data in ("scenes", "folder") else data, {})
    return table.get(name, REPORTED_ABLATION.get(name) if data in ("voc12", "scenes", "folder") else None)

"""How clusters agree with labels that they never saw: purity, conflict, normalised mutual information.

MLCD (An et al., ECCV 2024) and UNICOM (An et al., ICLR 2023) weigh purity (images of one cluster are of one class)
against inter-class conflict (images of one class that are in different clusters are pushed apart).

Legend: N images, K clusters, L positives of an image, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def cluster_quality(nearest_NL: np.ndarray, truth_NC: np.ndarray, clusters: int) -> dict[str, Any]:
    """What is known about clusters when labels are: numbers from 0 to 1, by name.

    A cluster's class is the one that most of its images have; a cluster's images are those to which it is nearest.
    Images without a label or without clusters do not count.

    - `labelled_images`: those that count.
    - `purity`: share of images that have the class of their nearest cluster.
    - `conflict`: share of images that lack the class of every positive beyond the first; None with one positive.
    - `agreement_by_rank`: for each of L places, the share of images that have the class of the cluster there.
    - `apart`: of all pairs of images with a class in common, counted once for each such class, the share whose
      nearest clusters differ: pairs that a loss with one positive pushes apart.
    - `nmi`: mutual information of nearest clusters and label sets, divided by the mean of their entropies; a set of
      labels is one value, so with one label an image it is the usual one. 1 where neither tells anything.

    Args:
        nearest_NL: integers [N, L], nearest first, negative where an image has none.
        truth_NC: [N, C], above 0 where an image has the class.
    """
    has_NC = np.asarray(truth_NC) > 0
    counts = np.flatnonzero(has_NC.any(axis=1) & (nearest_NL[:, 0] >= 0))
    if not len(counts):
        return {"labelled_images": 0}
    has_NC, nearest_NL = has_NC[counts], nearest_NL[counts]
    table_KC = _class_counts(nearest_NL[:, 0], has_NC, clusters)
    # A cluster to which no image is nearest has no class.
    class_K = np.where(table_KC.any(axis=1), table_KC.argmax(axis=1), -1)
    class_NL = class_K[nearest_NL]
    agrees_NL = np.take_along_axis(has_NC, np.maximum(class_NL, 0), axis=1) & (class_NL >= 0)
    agrees_NL &= nearest_NL >= 0
    conflict = float((~agrees_NL[:, 1:].any(axis=1)).mean()) if nearest_NL.shape[1] > 1 else None
    return {
        "labelled_images": len(counts),
        "purity": float(agrees_NL[:, 0].mean()),
        "conflict": conflict,
        "agreement_by_rank": [float(share) for share in agrees_NL.mean(axis=0)],
        "apart": _apart(table_KC),
        "nmi": _nmi(nearest_NL[:, 0], np.unique(has_NC, axis=0, return_inverse=True)[1].ravel()),
    }


def _class_counts(cluster_N: np.ndarray, has_NC: np.ndarray, clusters: int) -> np.ndarray:
    """Images of each class in each cluster, int64 [K, C]."""
    images, classes = np.nonzero(has_NC)
    count = has_NC.shape[1]
    flat = np.bincount(cluster_N[images].astype(np.int64) * count + classes, minlength=clusters * count)
    return flat.reshape(clusters, count)


def _apart(table_KC: np.ndarray) -> float | None:
    in_class = _pairs(table_KC.sum(axis=0)).sum()
    return float(1 - _pairs(table_KC).sum() / in_class) if in_class else None


def _pairs(counts: np.ndarray) -> np.ndarray:
    exact = counts.astype(np.float64)
    return exact * (exact - 1) / 2


def _nmi(one_N: np.ndarray, other_N: np.ndarray) -> float:
    joint_N = one_N.astype(np.int64) * (int(other_N.max()) + 1) + other_N
    of_one, of_other, of_both = (_entropy(values) for values in (one_N, other_N, joint_N))
    mean = (of_one + of_other) / 2
    return float((of_one + of_other - of_both) / mean) if mean > 0 else 1.0


def _entropy(values_N: np.ndarray) -> float:
    shares = np.unique(values_N, return_counts=True)[1] / len(values_N)
    return float(-(shares * np.log(shares)).sum())

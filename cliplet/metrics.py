"""How good scores are, counted as the papers count it.

Legend: N images, C classes.
"""

from __future__ import annotations

import numpy as np

from cliplet.errors import DataError


def average_precision(scores_N: np.ndarray, truth_N: np.ndarray) -> float:
    """All-points average precision of one class, 0..1: the mean over recall steps of the precision there.

    Images with equal scores form one step, as in scikit-learn's `average_precision_score`, so the order of
    the images never matters. A class without any positive scores 0, as in CCD's evaluation.

    Args:
        scores_N: float [N].
        truth_N: bool [N].
    """
    positives = int(truth_N.sum())
    if not positives:
        return 0.0
    order = np.argsort(-scores_N, kind="stable")
    sorted_N = scores_N[order]
    last_of_step = np.r_[np.flatnonzero(np.diff(sorted_N)), len(sorted_N) - 1]
    hits = np.cumsum(truth_N[order])[last_of_step]
    precision = hits / (last_of_step + 1)
    recall_gained = np.diff(np.r_[0, hits]) / positives
    return float((precision * recall_gained).sum())


def mean_average_precision(scores_NC: np.ndarray, truth_NC: np.ndarray) -> float:
    """Unweighted mean over classes of the all-points average precision, in percent.

    Args:
        scores_NC: float [N, C].
        truth_NC: bool [N, C].

    Raises:
        DataError: the two differ in shape, or there is nothing to measure.
    """
    if scores_NC.shape != truth_NC.shape or scores_NC.size == 0:
        raise DataError(
            f"scores {list(scores_NC.shape)} against truth {list(truth_NC.shape)}", "equal, non-empty shapes"
        )
    return 100 * float(np.mean(average_precisions(scores_NC, truth_NC)))


def average_precisions(scores_NC: np.ndarray, truth_NC: np.ndarray) -> np.ndarray:
    """The average precision of each class, float [C] in 0..1."""
    return np.array([average_precision(scores_NC[:, c], truth_NC[:, c]) for c in range(scores_NC.shape[1])])


def micro_f1(tagged_NC: np.ndarray, truth_NC: np.ndarray) -> float:
    """F1 over all image-class pairs together, 0..1; both are bool [N, C]."""
    hits = float((tagged_NC & truth_NC).sum())
    return 2 * hits / max(float(tagged_NC.sum() + truth_NC.sum()), 1.0)

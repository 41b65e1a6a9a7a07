"""The score of each class from which on it is a label: from expected counts, or from labels with cross-validation.

An image is tagged with a class if its score is at or above the threshold. Thresholds lie between two scores that
were seen, so that they mean the same in float32 and float64, and have as few digits as that allows.

Legend: N images, C classes. Shares are 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cliplet.errors import DataError, UsageError
from cliplet.metrics import OverallQuality, class_quality, overall_quality, precision_recall_curve
from cliplet.pseudo_labels import expected_count_thresholds

FOLDS = 5
# Below this, the best threshold of a class is that of a handful of images.
MIN_POSITIVES = 10


def expected_counts(probs_NC: np.ndarray, mean_per_image: float | None = None) -> np.ndarray:
    """How many images hold each class if the probabilities are right: their sums, float [C].

    Args:
        probs_NC: float [N, C] in 0..1.
        mean_per_image: known mean number of classes in an image; the sums are scaled to it (at most N each).

    Raises:
        UsageError: a mean that no images can have.
    """
    sums_C = probs_NC.sum(0, dtype=np.float64)
    if mean_per_image is None:
        return sums_C
    if not 0 < mean_per_image <= probs_NC.shape[1]:
        raise UsageError(
            f"a mean of {mean_per_image} classes in an image",
            f"a number above 0 and at most {probs_NC.shape[1]}, the number of classes",
            "--mean-per-image 1.5",
        )
    scaled_C = sums_C * mean_per_image * len(probs_NC) / max(float(sums_C.sum()), 1e-12)
    return np.minimum(scaled_C, len(probs_NC))


def count_thresholds(scores_NC: np.ndarray, expected_C: np.ndarray) -> np.ndarray:
    """Thresholds [C] at which as many images are tagged as are expected to hold the class.

    Equal scores are tagged together; of the counts this leaves, the nearest is taken, the smaller of two.
    """
    nearest_C = expected_count_thresholds(scores_NC, expected_C)
    return np.array([between_scores(s_N, t) for s_N, t in zip(scores_NC.T, nearest_C, strict=True)])


def best_f1_threshold(scores_N: np.ndarray, truth_N: np.ndarray) -> float:
    """The threshold with the highest F1 of one class on these images; of several, the highest.

    Over all image-class pairs (both arguments flattened) it is the one threshold with the highest micro-F1.
    """
    curve = precision_recall_curve(scores_N, truth_N)
    total_K = curve.precision_K + curve.recall_K
    f1_K = 2 * curve.precision_K * curve.recall_K / np.where(total_K > 0, total_K, 1)
    # Rounded, or the last bit of equal F1 would decide.
    return between_scores(scores_N, float(curve.threshold_K[f1_K.round(12).argmax()]))


def between_scores(scores_N: np.ndarray, threshold: float) -> float:
    """A short number within 0..1 that tags the same images as `threshold`, far from their scores.

    It lies about half way between the scores on either side. Where nothing is tagged, it lies between the highest
    score and 1, which an image scored exactly 1 would reach.
    """
    reached_N = scores_N >= threshold
    low = scores_N[~reached_N].max() if not reached_N.all() else np.asarray(-1, scores_N.dtype)
    high = scores_N[reached_N].min() if reached_N.any() else np.asarray(1, scores_N.dtype)
    middle = (max(float(low), 0.0) + float(high)) / 2
    for digits in range(2, 10):
        short = round(middle, digits)
        if low < np.asarray(short, scores_N.dtype) <= high:
            return short
    return float(high)


@dataclass(frozen=True, eq=False)
class F1Thresholds:
    """Thresholds with the best F1 of each class.

    Attributes:
        values_C: thresholds [C].
        overall: the one threshold for all classes, which `few` got.
        few: positions of the classes with too few positives for a threshold of their own.
    """

    values_C: np.ndarray
    overall: float
    few: tuple[int, ...]


def f1_thresholds(
    scores_NC: np.ndarray, truth_NC: np.ndarray, min_positives: int = MIN_POSITIVES
) -> F1Thresholds:
    """For each class the threshold with the best F1 on these images, or the global one where positives are few.

    Raises:
        DataError: no image has any class.
    """
    if not truth_NC.any():
        raise DataError(
            f"none of {len(truth_NC):,} images holds any class",
            "labelled images",
            "--method expected-count needs no labels",
        )
    overall = best_f1_threshold(scores_NC.ravel(), truth_NC.ravel())
    own_C = truth_NC.sum(0) >= max(min_positives, 1)
    values_C = np.array(
        [
            best_f1_threshold(s_N, t_N) if own else overall
            for s_N, t_N, own in zip(scores_NC.T, truth_NC.T, own_C, strict=True)
        ]
    )
    return F1Thresholds(values_C, overall, tuple(np.flatnonzero(~own_C).tolist()))


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """How good thresholds are on images they were not found on.

    Attributes:
        f1_C: out-of-fold F1 of each class with its own threshold.
        by_class, by_global: quality of all out-of-fold tags with a threshold for each class, and with the
            one threshold for all.
        folds: number of folds.
    """

    f1_C: np.ndarray
    by_class: OverallQuality
    by_global: OverallQuality
    folds: int


def cross_validate(
    scores_NC: np.ndarray,
    truth_NC: np.ndarray,
    *,
    folds: int = FOLDS,
    min_positives: int = MIN_POSITIVES,
    seed: int = 0,
) -> CrossValidated:
    """The quality of `f1_thresholds` by k-fold cross-validation: each image is tagged by thresholds of the others.

    The tags of all folds are pooled before anything is counted, so a fold without positives does no harm. Which
    classes have too few positives is decided on all images, as it is for the thresholds that are kept.

    Raises:
        UsageError: fewer than two folds, or more folds than images.
        DataError: no image has any class.
    """
    if not 2 <= folds <= len(scores_NC):
        images = len(scores_NC)
        raise UsageError(
            f"{folds} folds of {images} images",
            "at least 2 folds, and no more than images",
            f"--folds {min(FOLDS, images)}" if images > 1 else "choose two images or more",
        )
    few = truth_NC.sum(0) < min_positives
    fold_N = np.random.default_rng(seed).permutation(len(scores_NC)) % folds
    by_class_NC, by_global_NC = np.zeros_like(truth_NC), np.zeros_like(truth_NC)
    for fold in range(folds):
        held = fold_N == fold
        found = f1_thresholds(scores_NC[~held], truth_NC[~held], min_positives=1)
        by_class_NC[held] = scores_NC[held] >= as_scored(
            np.where(few, found.overall, found.values_C), scores_NC
        )
        by_global_NC[held] = scores_NC[held] >= as_scored(np.array(found.overall), scores_NC)
    return CrossValidated(
        class_quality(by_class_NC, truth_NC).f1_C,
        overall_quality(by_class_NC, truth_NC),
        overall_quality(by_global_NC, truth_NC),
        folds,
    )


def as_scored(thresholds: np.ndarray, scores_NC: np.ndarray) -> np.ndarray:
    """Thresholds in the type of the scores: what a tagger compares with."""
    return np.asarray(thresholds, scores_NC.dtype)

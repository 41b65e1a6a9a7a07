"""How good scores and tags are, counted as the papers count it.

Shares are 0..1 unless a name or a docstring says percent. Where a share has nothing to be a share of, it is 0,
as in scikit-learn with `zero_division=0`; the two exceptions say nan.

Legend: N images, C classes, K distinct scores, B bins. `tagged` and `truth` are bool, `scores` float.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cliplet.errors import DataError

RELIABILITY_BINS = 15


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision and recall of one class at each of its distinct scores, from the highest down: all [K]."""

    precision_K: np.ndarray
    recall_K: np.ndarray
    threshold_K: np.ndarray


def precision_recall_curve(scores_N: np.ndarray, truth_N: np.ndarray) -> PrecisionRecall:
    """Precision and recall of one class if it is tagged from each of its scores on.

    Images with equal scores are tagged together, so the order of the images never matters. Recall is 0
    everywhere for a class without positives.

    Args:
        scores_N: float [N].
        truth_N: bool [N].
    """
    positives = int(truth_N.sum())
    order = np.argsort(-scores_N, kind="stable")
    sorted_N = scores_N[order]
    last_of_step = np.r_[np.flatnonzero(np.diff(sorted_N)), len(sorted_N) - 1]
    hits_K = np.cumsum(truth_N[order])[last_of_step]
    return PrecisionRecall(hits_K / (last_of_step + 1), hits_K / max(positives, 1), sorted_N[last_of_step])


def average_precision(scores_N: np.ndarray, truth_N: np.ndarray) -> float:
    """All-points average precision of one class, 0..1: the mean over recall steps of the precision there.

    Equal to scikit-learn's `average_precision_score`. A class without any positives scores 0, as in CCD's
    evaluation.

    Args:
        scores_N: float [N].
        truth_N: bool [N].
    """
    curve = precision_recall_curve(scores_N, truth_N)
    return float((curve.precision_K * np.diff(np.r_[0, curve.recall_K])).sum())


def mean_average_precision(scores_NC: np.ndarray, truth_NC: np.ndarray) -> float:
    """Unweighted mean over classes of the all-points average precision, in percent.

    Args:
        scores_NC: float [N, C].
        truth_NC: bool [N, C].

    Raises:
        DataError: the two differ in shape, or there is nothing to measure.
    """
    _same_shape("scores", scores_NC, truth_NC)
    return 100 * float(np.mean(average_precisions(scores_NC, truth_NC)))


def average_precisions(scores_NC: np.ndarray, truth_NC: np.ndarray) -> np.ndarray:
    """The average precision of each class, float [C] in 0..1."""
    return np.array([average_precision(scores_NC[:, c], truth_NC[:, c]) for c in range(scores_NC.shape[1])])


def eleven_point_average_precision(scores_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Average precision of one class as Pascal VOC counted it until 2009, 0..1; not comparable with all-points.

    The mean over the recalls 0, 0.1, … 1 of the highest precision at that recall or a higher one (Everingham et
    al., IJCV 2010, eq. 1 and 2). The linear probes of CLIP and MLCD report this one for VOC2007. Images with equal
    scores are tagged together. A class without any positives scores 0.

    Args:
        scores_N: float [N].
        truth_N: bool [N].
    """
    curve = precision_recall_curve(scores_N, truth_N)
    # k / 10, not k * 0.1: both this and a recall of 3 in 10 are then the float nearest to 0.3.
    reached = [curve.precision_K[curve.recall_K >= k / 10] for k in range(11)]
    highest = [precision.max() if len(precision) else 0.0 for precision in reached]
    return float(np.mean(highest)) if truth_N.any() else 0.0


def eleven_point_average_precisions(scores_NC: np.ndarray, truth_NC: np.ndarray) -> np.ndarray:
    """The 11-point average precision of each class, float [C] in 0..1."""
    columns = range(scores_NC.shape[1])
    return np.array([eleven_point_average_precision(scores_NC[:, c], truth_NC[:, c]) for c in columns])


@dataclass(frozen=True, eq=False)
class ClassQuality:
    """Precision, recall and F1 of the tags of each class, each float [C] in 0..1."""

    precision_C: np.ndarray
    recall_C: np.ndarray
    f1_C: np.ndarray


@dataclass(frozen=True)
class OverallQuality:
    """Precision, recall and F1 over all classes, 0..1, in the notation of the multi-label papers.

    Attributes:
        CP, CR: means over classes of precision and of recall.
        CF1: their harmonic mean (not the mean of the classes' F1).
        OP, OR, OF1: over all image-class pairs together.
    """

    CP: float
    CR: float
    CF1: float
    OP: float
    OR: float
    OF1: float


def class_quality(tagged_NC: np.ndarray, truth_NC: np.ndarray) -> ClassQuality:
    """Precision, recall and F1 of each class.

    Raises:
        DataError: the two differ in shape, or there is nothing to measure.
    """
    _same_shape("tags", tagged_NC, truth_NC)
    hits_C = (tagged_NC & truth_NC).sum(0)
    tagged_C, true_C = tagged_NC.sum(0), truth_NC.sum(0)
    return ClassQuality(
        hits_C / np.maximum(tagged_C, 1),
        hits_C / np.maximum(true_C, 1),
        2 * hits_C / np.maximum(tagged_C + true_C, 1),
    )


def overall_quality(tagged_NC: np.ndarray, truth_NC: np.ndarray) -> OverallQuality:
    """CP, CR, CF1, OP, OR and OF1 of tags.

    Raises:
        DataError: the two differ in shape, or there is nothing to measure.
    """
    by_class = class_quality(tagged_NC, truth_NC)
    macro_precision, macro_recall = float(by_class.precision_C.mean()), float(by_class.recall_C.mean())
    hits = float((tagged_NC & truth_NC).sum())
    return OverallQuality(
        CP=macro_precision,
        CR=macro_recall,
        CF1=2 * macro_precision * macro_recall / ((macro_precision + macro_recall) or 1.0),
        OP=hits / max(float(tagged_NC.sum()), 1.0),
        OR=hits / max(float(truth_NC.sum()), 1.0),
        OF1=micro_f1(tagged_NC, truth_NC),
    )


def micro_f1(tagged_NC: np.ndarray, truth_NC: np.ndarray) -> float:
    """F1 over all image-class pairs together, 0..1; both are bool [N, C]."""
    hits = float((tagged_NC & truth_NC).sum())
    return 2 * hits / max(float(tagged_NC.sum() + truth_NC.sum()), 1.0)


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often scores come true, in bins of equal width over 0..1: all [B].

    Attributes:
        pairs_B: image-class pairs with a score in the bin; a score on an edge belongs to the bin above it.
        score_B: their mean score; nan in an empty bin.
        share_B: the share of them that is true; nan in an empty bin.
    """

    pairs_B: np.ndarray
    score_B: np.ndarray
    share_B: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean over all pairs of the distance between their bin's mean score and its share, 0..1.

        Guo et al. 2017, eq. 3, over image-class pairs. Most pairs are sure negatives, so it is small by nature:
        compare it only between models of the same classes.
        """
        gaps_B = np.abs(self.score_B - self.share_B)
        return float(np.nansum(gaps_B * self.pairs_B) / self.pairs_B.sum())


def reliability(scores_NC: np.ndarray, truth_NC: np.ndarray, bins: int = RELIABILITY_BINS) -> Reliability:
    """How often scores come true, over all image-class pairs.

    Args:
        scores_NC: float [N, C] in 0..1.
        truth_NC: bool [N, C].

    Raises:
        DataError: the two differ in shape, there is nothing to measure, or a score is no probability.
    """
    _same_shape("scores", scores_NC, truth_NC)
    if not ((scores_NC >= 0) & (scores_NC <= 1)).all():
        raise DataError(
            f"scores from {scores_NC.min()} to {scores_NC.max()}", "probabilities: calibration is about them"
        )
    # float64, or a float32 score just below an edge is rounded onto it.
    scores = scores_NC.ravel().astype(np.float64)
    bin_of = np.minimum((scores * bins).astype(int), bins - 1)
    pairs_B = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        score_B = np.bincount(bin_of, weights=scores, minlength=bins) / pairs_B
        share_B = np.bincount(bin_of, weights=truth_NC.ravel(), minlength=bins) / pairs_B
    return Reliability(pairs_B, score_B, share_B)


def co_occurrence(present_NC: np.ndarray) -> np.ndarray:
    """Number of images that hold class i and class j, int [C, C]; on the diagonal, images with the class."""
    # float64 counts exactly up to 2**53 and multiplies far faster than integers.
    present = present_NC.astype(np.float64)
    return (present.T @ present).astype(np.int64)


def confusion(tagged_NC: np.ndarray, truth_NC: np.ndarray) -> np.ndarray:
    """Of the images that truly hold class i and lack class j, the share tagged j: float [C, C], row i, column j.

    A high entry says that the presence of i makes the model see j. nan where no image holds i and lacks j, and
    so on the whole diagonal.

    Raises:
        DataError: the two differ in shape, or there is nothing to measure.
    """
    _same_shape("tags", tagged_NC, truth_NC)
    holds_NC, lacks_NC = truth_NC.astype(np.float64), (~truth_NC).astype(np.float64)
    falsely_NC = (tagged_NC & ~truth_NC).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (holds_NC.T @ falsely_NC) / (holds_NC.T @ lacks_NC)


def agreement(tagged_NC: np.ndarray, other_NC: np.ndarray) -> np.ndarray:
    """Cohen's kappa of two sets of tags for each class, float [C]: 1 equal, 0 no better than chance.

    (observed - chance) / (1 - chance), with chance the agreement of two that tag at random as often as these.
    nan where both tag all images or both tag none, for then chance agrees fully.

    Raises:
        DataError: the two differ in shape, or there is nothing to measure.
    """
    _same_shape("tags", tagged_NC, other_NC)
    observed_C = (tagged_NC == other_NC).mean(0)
    first_C, second_C = tagged_NC.mean(0), other_NC.mean(0)
    chance_C = first_C * second_C + (1 - first_C) * (1 - second_C)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance_C < 1, (observed_C - chance_C) / (1 - chance_C), np.nan)


def _same_shape(what: str, given_NC: np.ndarray, truth_NC: np.ndarray) -> None:
    if given_NC.shape != truth_NC.shape or given_NC.size == 0:
        raise DataError(
            f"{what} {list(given_NC.shape)} against truth {list(truth_NC.shape)}", "equal, non-empty shapes"
        )

"""Pseudo-labels from a teacher's class probabilities: sharpness, bias, views, crops, thresholds. Pure numpy.

    bias = clip_bias(probs_NC, guard="mean")
    labels_NC = debiased(probs_NC, bias.value_C, floor=1 / 20)

CCD is Kim & Shim, CVPR 2025 (arXiv 2503.16873) with its public code; CDUL is Abdelfattah et al., ICCV 2023
(arXiv 2307.16634). Probabilities go in and come out as float32.

Legend: N images, V views (view 0 is the whole image), C classes, R crops of all images together.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from cliplet.errors import DataError, UsageError

MAX_ENTROPY = 2.0  # nats; CCD's code has this number for any count of classes
LOG_EPSILON = 1e-10
# CCD's search ends when the mean number of classes lies between `bound` and `bound` plus this.
WALK_WIDTH = 2
Guard = Literal["none", "mean", "one"]


def rescaled(probs: np.ndarray, scale: float, new_scale: float) -> np.ndarray:
    """The softmax probabilities, float32 [..., C], that the same cosines give at another scale.

    softmax(new_scale * cos) = softmax(log p * new_scale / scale), since a softmax forgets a constant. Exact but
    for classes whose probability underflowed to 0: they stay at 0. Sigmoid probabilities cannot be rescaled so.

    Args:
        scale: what cosines were multiplied by (about 100 for CLIP).
        new_scale: what they are to be multiplied by instead; smaller is softer.

    Raises:
        UsageError: a scale is not positive.
        DataError: a row has no positive probability, as rows that were never scored.
    """
    if scale <= 0 or new_scale <= 0:
        raise UsageError(f"scales {scale} and {new_scale}", "two positive numbers, such as 100 and 20")
    largest = probs.max(axis=-1, keepdims=True)
    if not (largest > 0).all():
        raise DataError("a row of probabilities without a positive one", "rows that were scored")
    # Relative to the largest, which is then 1 at any scale: nothing overflows.
    powers = np.power(probs / largest, new_scale / scale, dtype=np.float64)
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


def entropy(probs_NC: np.ndarray) -> np.ndarray:
    """Entropy of each image's class probabilities in nats, float32 [N]: -sum p log(p + 1e-10), as in CCD."""
    probs_NC = probs_NC.astype(np.float32, copy=False)
    return -(probs_NC * np.log(probs_NC + LOG_EPSILON)).sum(axis=1)


def is_sure(probs_NC: np.ndarray, max_entropy: float = MAX_ENTROPY) -> np.ndarray:
    """Which images the teacher is sure of, bool [N]: those whose entropy is at most `max_entropy` nats."""
    return entropy(probs_NC) <= max_entropy


class ClipBias(NamedTuple):
    """How sure the teacher is of each class when it is sure at all.

    Attributes:
        value_C: float32 [C], the mean top-1 probability of each class.
        images_C: int64 [C], over how many images; 0 where the value is not measured.
    """

    value_C: np.ndarray
    images_C: np.ndarray


def clip_bias(probs_NC: np.ndarray, max_entropy: float = MAX_ENTROPY, guard: Guard = "none") -> ClipBias:
    """CCD's CLIP bias: each class's mean top-1 probability over the sure images where it is top-1.

    Args:
        guard: the bias of a class that is top-1 on no sure image. `none` gives nan, as the released code does;
            `mean` gives the mean of the other classes' biases, `one` gives 1.

    Raises:
        DataError: guard `mean`, and there is no sure image at all.
        UsageError: an unknown guard.
    """
    if guard not in ("none", "mean", "one"):
        raise UsageError(f"guard {guard!r}", "none, mean or one")
    sure_NC = probs_NC[is_sure(probs_NC, max_entropy)]
    top_N = sure_NC.argmax(axis=1)
    images_C = np.bincount(top_N, minlength=probs_NC.shape[1])
    sums_C = np.bincount(top_N, weights=sure_NC.max(axis=1), minlength=probs_NC.shape[1])
    seen_C = images_C > 0
    value_C = np.full(probs_NC.shape[1], np.nan)
    value_C[seen_C] = sums_C[seen_C] / images_C[seen_C]
    if guard == "mean" and not seen_C.any():
        raise DataError(
            f"none of {len(probs_NC)} images has an entropy of {max_entropy} nats or less",
            "some, from which to measure how sure the teacher is of each class",
            f"raise the entropy limit; it can be at most ln({probs_NC.shape[1]})",
        )
    if guard != "none":
        value_C[~seen_C] = value_C[seen_C].mean() if guard == "mean" else 1.0
    return ClipBias(value_C.astype(np.float32), images_C)


def debiased(
    probs_NC: np.ndarray, bias_C: np.ndarray | None, floor: float = 0.0, *, clip: bool = True
) -> np.ndarray:
    """Probabilities lifted to `floor` and divided by the bias, float32 [N, C]: clip(max(p, floor) / b, 0, 1).

    Args:
        bias_C: from `clip_bias`; None divides by nothing.
        floor: the smallest probability before the division (CCD's "label smoothing", 1/20 on VOC12).
        clip: whether to cut off at 1. CCD cuts off the whole image's labels, but those of crops only after they
            are `blended`.
    """
    lifted_NC = np.maximum(probs_NC.astype(np.float32, copy=False), np.float32(floor))
    divided_NC = lifted_NC if bias_C is None else lifted_NC / bias_C.astype(np.float32, copy=False)
    return divided_NC.clip(0, 1) if clip else divided_NC


def blended(old_NC: np.ndarray, new_NC: np.ndarray, ratio: float) -> np.ndarray:
    """CCD's label update, float32 [N, C]: clip(ratio * old + (1 - ratio) * new, 0, 1)."""
    mixed_NC = np.float32(ratio) * old_NC + np.float32(1 - ratio) * new_NC
    return mixed_NC.clip(0, 1).astype(np.float32, copy=False)


def aggregate(view_probs_NVC: np.ndarray, zeta: float = 0.0) -> np.ndarray:
    """The local views' word on each class, float32 [N, C]: CDUL, equations 5 and 6.

    The largest local probability where that reaches `zeta`, else the smallest. With V = 1 the whole image stands
    in for the missing local views.
    """
    local_NVC = view_probs_NVC[:, 1:] if view_probs_NVC.shape[1] > 1 else view_probs_NVC
    largest_NC = local_NVC.max(axis=1)
    return np.where(largest_NC >= zeta, largest_NC, local_NVC.min(axis=1)).astype(np.float32, copy=False)


def cdul_labels(view_probs_NVC: np.ndarray, zeta: float = 0.0, lam: float = 0.0) -> np.ndarray:
    """CDUL's initial labels, float32 [N, C]: (global + aggregate) / 2 + lam / 2 * |global - aggregate|.

    With `lam` up to 1 they stay between 0 and 1; with 1 they are the larger of the two.
    """
    whole_NC = view_probs_NVC[:, 0].astype(np.float32, copy=False)
    local_NC = aggregate(view_probs_NVC, zeta)
    half = np.float32(0.5)
    return half * (whole_NC + local_NC) + half * np.float32(lam) * np.abs(whole_NC - local_NC)


def crop_maximum(probs_RC: np.ndarray, image_R: np.ndarray, count: int) -> np.ndarray:
    """Class-wise maximum over each image's crops, float32 [count, C]; 0 for an image without crops.

    Args:
        image_R: int [R], the image that each crop was cut out of, in any order.
    """
    q_NC = np.zeros((count, probs_RC.shape[1]), np.float32)
    np.maximum.at(q_NC, image_R, probs_RC.astype(np.float32, copy=False))
    return q_NC


def top_1(probs_NC: np.ndarray) -> np.ndarray:
    """The most probable class of each image as its only positive, bool [N, C]; the first one of equals."""
    return np.arange(probs_NC.shape[1]) == probs_NC.argmax(axis=1)[:, None]


def partially_known(probs_NC: np.ndarray, positive_at: float, negative_below: float) -> np.ndarray:
    """Labels where the teacher is clear, int8 [N, C]: 1 from `positive_at` on, -1 below `negative_below`, else 0.

    Raises:
        UsageError: a probability could be both.
    """
    if negative_below > positive_at:
        raise UsageError(
            f"negative below {negative_below} but positive from {positive_at} on",
            "a lower limit that is not above the upper one",
        )
    return (probs_NC >= positive_at).astype(np.int8) - (probs_NC < negative_below).astype(np.int8)


class WalkedThreshold(NamedTuple):
    """Where CCD's search ended: the threshold, how many windows of images it looked at, and whether it held."""

    tau: float
    windows: int
    found: bool


def walk_threshold(
    scores_NC: np.ndarray, start: float, bound: float, step: float = 0.001, window: int = 100
) -> WalkedThreshold:
    """CCD's threshold search as its public code runs it, over images in the order in which they came.

    After every `window` images (the first time after one more), the search ends if the mean number of classes at
    or above tau lies strictly between `bound` and `bound` + 2, where the mean divides by `window` in every case.
    Otherwise tau grows by `step`, even when too few classes were above it. When the images end first, the
    released code goes on with the tau it has; here `found` is False.

    Args:
        scores_NC: float32 [N, C], the classifier's sigmoids.
    """
    tau, begin, windows = start, 0, 0
    for last in range(window, len(scores_NC), window):
        counts_N = (scores_NC[begin : last + 1] >= np.float32(tau)).sum(axis=1)
        # One image after the other in float32, as there: the sum's last bit decides when it should be whole.
        mean = np.cumsum(counts_N.astype(np.float32) / np.float32(window), dtype=np.float32)[-1]
        windows += 1
        if bound < mean < bound + WALK_WIDTH:
            return WalkedThreshold(tau, windows, True)
        tau, begin = tau + step, last + 1
    return WalkedThreshold(tau, windows, False)


def quantile_threshold(scores_NC: np.ndarray, mean_count: float) -> float:
    """The threshold at or above which an image has `mean_count` classes in the mean, as nearly as scores allow.

    What CCD's walk looks for, found at once. Equal scores pass together; of two thresholds that miss by as much,
    it is the one that fewer pass.

    Raises:
        UsageError: no images, or a mean count that is not between 0 and C.
    """
    return _threshold_passing(scores_NC.ravel(), mean_count * len(scores_NC), f"mean count {mean_count}")


def expected_count_thresholds(scores_NC: np.ndarray, expected_C: np.ndarray) -> np.ndarray:
    """For each class the threshold that about as many images pass as are expected to show it, float32 [C].

    Args:
        expected_C: float [C], expected numbers of images, each between 0 and N.

    Raises:
        UsageError: no images, or an expectation out of that range.
    """
    return np.array(
        [
            _threshold_passing(scores_NC[:, c], float(expected), f"expected count {expected} of class {c}")
            for c, expected in enumerate(expected_C)
        ],
        np.float32,
    )


def _threshold_passing(scores: np.ndarray, wanted: float, said: str) -> float:
    """The threshold that nearest to `wanted` of the scores [K] reach."""
    if not len(scores) or not 0 <= wanted <= len(scores):
        raise UsageError(
            f"{said} from {len(scores)} scores", "at least one score, and no more wanted than there are"
        )
    rank = max(1, int(np.ceil(wanted)))
    value = np.partition(scores, len(scores) - rank)[len(scores) - rank]
    above = scores[scores > value]
    reached = int((scores >= value).sum())
    if reached - wanted < wanted - len(above):
        return float(value)
    return float(above.min() if len(above) else np.nextafter(value, np.inf, dtype=scores.dtype))

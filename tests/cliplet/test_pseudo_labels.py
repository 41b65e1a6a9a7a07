"""Pseudo-labels: every formula against numbers one can check, or against a loop that is written another way."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cliplet import pseudo_labels, snippets
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.views import Aggregation

unit = st.floats(0, 1, width=32)
score_tables = st.tuples(st.integers(1, 12), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=unit)
)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)


def random_probs(*shape: int, sharp: float = 3, seed: int = 0) -> np.ndarray:
    return softmax(sharp * np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("new_scale", [1.0, 20.0, 100.0, 250.0])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_rescaled_is_the_softmax_of_the_same_cosines(new_scale: float, shape: tuple[int, ...]) -> None:
    cosines = np.random.default_rng(1).uniform(0, 0.4, shape)
    found = pseudo_labels.rescaled(softmax(100 * cosines), 100, new_scale)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax(new_scale * cosines), rtol=2e-5)


def test_what_underflowed_stays_zero_when_rescaled() -> None:
    assert pseudo_labels.rescaled(np.float32([[1, 0]]), 100, 20).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pseudo_labels.rescaled(np.ones((1, 2), np.float32), 0, 20), UsageError, "positive"),
        (lambda: pseudo_labels.rescaled(np.ones((1, 2), np.float32), 100, -1), UsageError, "positive"),
        (lambda: pseudo_labels.rescaled(np.zeros((1, 2), np.float32), 100, 20), DataError, "scored"),
        (
            lambda: pseudo_labels.clip_bias(np.full((4, 20), 0.05, np.float32), guard="mean"),
            DataError,
            "none of 4",
        ),
        (lambda: pseudo_labels.clip_bias(random_probs(4, 3), guard="two"), UsageError, "none, mean or one"),
        (lambda: pseudo_labels.partially_known(random_probs(4, 3), 0.2, 0.3), UsageError, "not above"),
        (lambda: pseudo_labels.quantile_threshold(random_probs(4, 3), 3.1), UsageError, "mean count 3.1"),
        (
            lambda: pseudo_labels.quantile_threshold(np.zeros((0, 3), np.float32), 0),
            UsageError,
            "at least one",
        ),
        (
            lambda: pseudo_labels.expected_count_thresholds(random_probs(4, 2), np.array([1, 5])),
            UsageError,
            "class 1",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call, error: type[ClipletError], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_entropy_and_who_is_sure() -> None:
    probs = np.float32([[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    found = pseudo_labels.entropy(probs)
    assert found.dtype == np.float32
    assert found == pytest.approx([0, math.log(4), math.log(2)], abs=1e-6)
    assert pseudo_labels.is_sure(probs, math.log(3)).tolist() == [True, False, True]
    # Uniform over 7 classes is below CCD's 2 nats, over 8 above.
    assert [bool(pseudo_labels.is_sure(np.full((1, c), 1 / c, np.float32))[0]) for c in (7, 8)] == [
        True,
        False,
    ]


def released_bias(probs: np.ndarray, max_entropy: float) -> np.ndarray:
    """As the release finds it: image by image, running sums, a division at the end."""
    sums, counts = [0.0] * probs.shape[1], [0] * probs.shape[1]
    for row in probs.tolist():
        if -sum(p * math.log(p + 1e-10) for p in row) > max_entropy:
            continue
        top = row.index(max(row))
        sums[top] += row[top]
        counts[top] += 1
    return np.array([s / n if n else math.nan for s, n in zip(sums, counts, strict=True)])


@pytest.mark.parametrize("guard", ["none", "mean", "one"])
def test_bias_is_the_released_codes(guard: pseudo_labels.Guard) -> None:
    probs = random_probs(200, 30, sharp=1.5)
    probs[:, 3] = 0
    bias = pseudo_labels.clip_bias(probs, 2.0, guard)
    wanted = released_bias(probs, 2.0)
    known = ~np.isnan(wanted)
    assert 5 < known.sum() < 30 and not known[3]
    np.testing.assert_allclose(bias.value_C[known], wanted[known], rtol=1e-6)
    filled = {"none": math.nan, "mean": wanted[known].mean(), "one": 1.0}[guard]
    np.testing.assert_allclose(bias.value_C[~known], filled, rtol=1e-6)
    assert (bias.images_C > 0).tolist() == known.tolist()
    assert bias.images_C.sum() == pseudo_labels.is_sure(probs).sum()
    assert bias.value_C.dtype == np.float32


def test_debiasing_on_numbers_one_can_check() -> None:
    probs, bias = np.float32([[0.9, 0.01, 0.36]]), np.float32([0.8, 0.5, 0.9])
    found = pseudo_labels.debiased(probs, bias, 0.05)
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array([[1, 0.1, 0.4]]))
    assert pseudo_labels.debiased(probs, bias, 0.05, clip=False) == pytest.approx(
        np.array([[1.125, 0.1, 0.4]])
    )
    assert pseudo_labels.debiased(probs, None, 0.05) == pytest.approx(np.array([[0.9, 0.05, 0.36]]))
    assert pseudo_labels.debiased(probs, None).tolist() == probs.tolist()
    assert np.isnan(pseudo_labels.debiased(probs, np.float32([1, math.nan, 1]))).tolist() == [
        [False, True, False]
    ]


def test_blending_cuts_off_after_the_mixture_as_the_release_does() -> None:
    old, crops, bias = np.float32([[0.1, 1.0]]), np.float32([[0.9, 0.9]]), np.float32([0.75, 0.75])
    new = pseudo_labels.debiased(crops, bias, clip=False)
    found = pseudo_labels.blended(old, new, 0.2)
    assert found == pytest.approx(np.array([[0.2 * 0.1 + 0.8 * 1.2, 1.0]]))
    assert found.dtype == np.float32
    assert pseudo_labels.blended(old, new, 1.0).tolist() == old.tolist()


@pytest.mark.parametrize("zeta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("views", [1, 2, 10])
def test_cdul_labels_are_those_of_the_graph(views: int, zeta: float) -> None:
    probs = random_probs(6, views, 5)
    theirs = snippets.aggregate(torch.from_numpy(probs), Aggregation("cdul", zeta)).numpy()
    np.testing.assert_array_equal(pseudo_labels.cdul_labels(probs, zeta), theirs)


def test_the_aggregate_on_numbers_one_can_check() -> None:
    probs = np.float32([[[0.9, 0.0], [0.6, 0.1], [0.2, 0.3]]])
    assert pseudo_labels.aggregate(probs, 0.5).tolist() == np.float32([[0.6, 0.1]]).tolist()
    assert pseudo_labels.aggregate(probs, 0.3).tolist() == np.float32([[0.6, 0.3]]).tolist()
    assert pseudo_labels.aggregate(probs[:, :1], 0.95).tolist() == np.float32([[0.9, 0]]).tolist()
    half = np.float32([[0.5 * 1.5 + 0.25 * 0.3, 0.15 + 0.25 * 0.3]])
    assert pseudo_labels.cdul_labels(probs, 0.0, 0.5) == pytest.approx(half)
    assert pseudo_labels.cdul_labels(probs, 0.0, 1.0) == pytest.approx(np.array([[0.9, 0.3]]))


def test_the_maximum_over_crops() -> None:
    crops = np.float32([[0.1, 0.8], [0.7, 0.2], [0.3, 0.3]])
    found = pseudo_labels.crop_maximum(crops, np.array([2, 0, 2]), 4)
    assert found.tolist() == np.float32([[0.7, 0.2], [0, 0], [0.3, 0.8], [0, 0]]).tolist()
    assert pseudo_labels.crop_maximum(crops[:0], np.zeros(0, int), 2).tolist() == [[0, 0], [0, 0]]


def test_top_1_and_partial_labels() -> None:
    probs = np.float32([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])
    assert pseudo_labels.top_1(probs).tolist() == [[False, True, False], [True, False, False]]
    known = pseudo_labels.partially_known(probs, 0.5, 0.3)
    assert known.dtype == np.int8
    assert known.tolist() == [[-1, 1, 0], [0, -1, 0]]


def released_walk(preds: np.ndarray, multiplier: float, bound: float) -> tuple[float, int, bool]:
    """The loop of the release's `train.py`, with its tensors and one image at a time."""
    average, windows = torch.tensor(0.0), 0
    for index, row in enumerate(torch.from_numpy(preds)):
        average = average + (row >= multiplier).float().sum() / 100
        if index % 100 == 0 and index != 0:
            windows += 1
            if bound < average < bound + 2:
                return multiplier, windows, True
            multiplier += 0.001
            average = torch.tensor(0.0)
    return multiplier, windows, False


@pytest.mark.parametrize("images", [50, 100, 101, 200, 201, 1717])
@pytest.mark.parametrize(("level", "bound"), [(0.045, 4.0), (0.06, 4.0), (0.2, 4.0), (0.055, 0.5)])
def test_the_walk_is_the_released_loop(images: int, level: float, bound: float) -> None:
    rng = np.random.default_rng(images)
    scores = rng.normal(level, 0.01, (images, 20)).astype(np.float32)
    assert tuple(pseudo_labels.walk_threshold(scores, 0.05, bound)) == released_walk(scores, 0.05, bound)


@pytest.mark.parametrize("seed", range(20))
def test_every_window_of_the_walk_is_the_released_one(seed: int) -> None:
    """Mean counts close to the bound on both sides, so that one image more or less ends another window."""
    scores = (np.random.default_rng(seed).random((901, 20)) < 0.19).astype(np.float32)
    assert tuple(pseudo_labels.walk_threshold(scores, 0.05, 4.0)) == released_walk(scores, 0.05, 4.0)


def test_the_first_window_has_one_image_more_and_the_walk_never_turns_back() -> None:
    # 101 images of 5.95 classes in the mean add up to 6.01 hundredths: not below 6.
    scores = np.where(np.arange(20) < 5, 0.9, 0.0).astype(np.float32) * np.ones((301, 1), np.float32)
    scores[:96, 5] = 0.9
    assert pseudo_labels.walk_threshold(scores, 0.05, 4.0) == (pytest.approx(0.051), 2, True)
    assert pseudo_labels.walk_threshold(scores[:, :3], 0.05, 4.0) == (pytest.approx(0.053), 3, False)


@settings(max_examples=200, deadline=None)
@given(scores=score_tables, share=st.floats(0, 1))
def test_no_threshold_comes_nearer_to_the_wanted_count(scores: np.ndarray, share: float) -> None:
    wanted = share * scores.shape[1]
    tau = pseudo_labels.quantile_threshold(scores, wanted)
    candidates = [*np.unique(scores).tolist(), 2.0]

    def miss(threshold: float) -> float:
        return abs(float((scores >= threshold).sum()) / len(scores) - wanted)

    assert miss(tau) <= min(map(miss, candidates)) + 1e-9


@settings(max_examples=100, deadline=None)
@given(scores=score_tables, shares=st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_each_class_gets_its_own_count(scores: np.ndarray, shares: list[float]) -> None:
    wanted = np.array(shares[: scores.shape[1]]) * len(scores)
    found = pseudo_labels.expected_count_thresholds(scores, wanted)
    alone = [pseudo_labels.quantile_threshold(scores[:, [c]], shares[c]) for c in range(scores.shape[1])]
    assert found.tolist() == pytest.approx(alone)


def test_thresholds_among_equal_scores() -> None:
    scores = np.float32([[0.5, 0.5], [0.5, 0.1]])
    assert pseudo_labels.quantile_threshold(scores, 1.4) == 0.5
    assert pseudo_labels.quantile_threshold(scores, 0.5) > 0.5
    assert pseudo_labels.quantile_threshold(scores, 2) == pytest.approx(0.1)
    taus = [pseudo_labels.quantile_threshold(random_probs(50, 4), k) for k in np.linspace(0, 4, 30)]
    assert all(lower >= higher for lower, higher in pairwise(taus))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1000), floor=st.floats(0, 0.2), ratio=st.floats(0, 1))
def test_labels_stay_probabilities(seed: int, floor: float, ratio: float) -> None:
    probs = random_probs(8, 5, 4, seed=seed)
    bias = pseudo_labels.clip_bias(probs[:, 0], guard="one").value_C
    whole = pseudo_labels.debiased(probs[:, 0], bias, floor)
    crops = pseudo_labels.debiased(probs[:, 1:].max(1), bias, floor, clip=False)
    for labels in (
        whole,
        pseudo_labels.blended(whole, crops, ratio),
        pseudo_labels.cdul_labels(probs, 0.1, 1.0),
    ):
        assert labels.dtype == np.float32
        assert ((labels >= 0) & (labels <= 1 + 1e-6)).all()
    # Debiasing never takes from a class: its divisor is at most 1.
    assert (whole >= probs[:, 0].clip(0, 1) - 1e-6).all()

"""The metrics, against cases computed by hand, plain loops and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from cliplet.errors import DataError
from cliplet.metrics import (
    agreement,
    average_precision,
    average_precisions,
    class_quality,
    co_occurrence,
    confusion,
    eleven_point_average_precision,
    eleven_point_average_precisions,
    mean_average_precision,
    micro_f1,
    overall_quality,
    precision_recall_curve,
    reliability,
)


@pytest.mark.parametrize(
    ("scores", "truth", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2),
        ([0.9, 0.8], [1, 1], 1.0),
        ([0.9, 0.8], [0, 1], 0.5),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 0.25),
        ([0.9, 0.8], [0, 0], 0.0),
    ],
)
def test_average_precision(scores: list[float], truth: list[int], expected: float) -> None:
    assert average_precision(np.array(scores), np.array(truth, bool)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (
            [1, 0, 1, 0],
            (6 * 1 + 5 * (2 / 3)) / 11,
        ),  # recall 1/2 reaches 0 … 0.5 with precision 1, the rest with 2/3
        ([0, 1, 0, 1, 1], 11 * (3 / 5) / 11),  # precision 1/2, 2/4, 3/5: the last is highest at every recall
        ([1, 1], 1.0),
        ([0, 1], 0.5),
        ([0, 0], 0.0),
        # Recall 3/10 counts at 0.3, which a threshold of 3 * 0.1 in floats would miss.
        ([1, 1, 1, *[0] * 7, *[1] * 7], (4 * 1 + 7 * (10 / 17)) / 11),
    ],
)
def test_eleven_points_by_hand(truth: list[int], expected: float) -> None:
    scores = -np.arange(len(truth), dtype=float)
    found = eleven_point_average_precision(scores, np.array(truth, bool))
    assert found == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40))
def test_eleven_points_by_counting(rows: list[tuple[int, bool]]) -> None:
    """Written with whole numbers: every threshold tags some images, and each of 11 recalls takes its best."""
    positives = sum(true for _, true in rows)
    best = [0.0] * 11
    for threshold in range(9):
        tagged = [true for score, true in rows if score >= threshold]
        for point in range(11):
            if tagged and positives and 10 * sum(tagged) >= point * positives:
                best[point] = max(best[point], sum(tagged) / len(tagged))
    scores, truth = zip(*rows, strict=True)
    given_ = np.array(scores, float)[:, None], np.array(truth, bool)[:, None]
    assert eleven_point_average_precisions(*given_)[0] == pytest.approx(sum(best) / 11)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_the_order_of_the_images_does_not_matter(rows: list[tuple[int, bool]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    values = []
    for order in (rows, shuffled):
        scores, truth = zip(*order, strict=True)
        values.append(average_precision(np.array(scores, float), np.array(truth, bool)))
    assert values[0] == pytest.approx(values[1])
    assert 0 <= values[0] <= 1 + 1e-12


def test_the_mean_is_over_classes_in_percent() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    truth = np.array([[True, True], [False, False]])
    assert mean_average_precision(scores, truth) == pytest.approx(100 * (1.0 + 0.5) / 2)
    with pytest.raises(DataError, match="against truth"):
        mean_average_precision(scores, truth[:1])


def test_micro_f1() -> None:
    tagged = np.array([[True, True], [False, False]])
    truth = np.array([[True, False], [True, False]])
    assert micro_f1(tagged, truth) == pytest.approx(0.5)
    assert micro_f1(~tagged & tagged, ~truth & truth) == 0


def random_case(seed: int, images: int = 60, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, truth, and tags; the last class is never true, the first one never tagged."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (images, classes)) / 12
    truth = rng.random((images, classes)) < 0.3
    truth[:, -1] = False
    tagged = scores >= 0.6
    tagged[:, 0] = False
    return scores, truth, tagged


@pytest.mark.parametrize("seed", range(4))
def test_against_scikit_learn(seed: int) -> None:
    scores, truth, tagged = random_case(seed)
    known = truth[:, :-1]
    np.testing.assert_allclose(
        average_precisions(scores[:, :-1], known),
        sklearn.metrics.average_precision_score(known, scores[:, :-1], average=None),
    )
    by_class = class_quality(tagged, truth)
    overall = overall_quality(tagged, truth)
    theirs = sklearn.metrics.precision_recall_fscore_support
    precision, recall, f1, _ = theirs(truth, tagged, average=None, zero_division=0)
    np.testing.assert_allclose(by_class.precision_C, precision)
    np.testing.assert_allclose(by_class.recall_C, recall)
    np.testing.assert_allclose(by_class.f1_C, f1)
    assert (overall.CP, overall.CR) == pytest.approx((precision.mean(), recall.mean()))
    precision, recall, f1, _ = theirs(truth, tagged, average="micro", zero_division=0)
    assert (overall.OP, overall.OR, overall.OF1) == pytest.approx((precision, recall, f1))
    for c, kappa in enumerate(agreement(tagged, truth)[1:-1], start=1):
        assert kappa == pytest.approx(sklearn.metrics.cohen_kappa_score(tagged[:, c], truth[:, c]))


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_that_of_scikit_learn(seed: int) -> None:
    scores, truth, _ = random_case(seed)
    curve = precision_recall_curve(scores[:, 0], truth[:, 0])
    # Theirs goes from the lowest threshold up and ends in a point that is none of the data's.
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(truth[:, 0], scores[:, 0])
    np.testing.assert_allclose(curve.threshold_K, thresholds[::-1])
    np.testing.assert_allclose(curve.precision_K, precision[-2::-1])
    np.testing.assert_allclose(curve.recall_K, recall[-2::-1])


def test_cf1_is_the_harmonic_mean_of_the_means_and_not_the_mean_of_f1() -> None:
    tagged = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], bool)
    truth = np.array([[1, 1], [1, 0], [0, 1], [0, 1]], bool)
    tagged[1, 0] = False
    # Class 0: precision 1/1, recall 1/2. Class 1: precision 2/2, recall 2/3.
    found = overall_quality(tagged, truth)
    assert (found.CP, found.CR) == pytest.approx((1.0, 7 / 12))
    assert found.CF1 == pytest.approx(2 * 1.0 * (7 / 12) / (1 + 7 / 12))
    assert found.CF1 != pytest.approx((2 / 3 + 4 / 5) / 2)
    assert (found.OP, found.OR, found.OF1) == pytest.approx((1.0, 3 / 5, 3 / 4))
    nothing = np.zeros_like(tagged)
    assert set(vars(overall_quality(nothing, nothing)).values()) == {0.0}


@pytest.mark.parametrize("seed", range(3))
def test_reliability_against_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random((50, 4)).astype(np.float32)
    truth = rng.random((50, 4)) < scores
    found = reliability(scores, truth, bins=10)
    share, score = calibration_curve(truth.ravel(), scores.ravel(), n_bins=10)
    some = found.pairs_B > 0
    np.testing.assert_allclose(found.share_B[some], share)
    np.testing.assert_allclose(found.score_B[some], score, rtol=1e-6)
    assert found.pairs_B.sum() == scores.size


def test_the_calibration_error_by_hand() -> None:
    # Bin 0..0.5: scores 0.1 and 0.3, none true: gap 0.2. Bin 0.5..1: 0.5 (the edge) and 1.0, one true: gap 0.25.
    scores = np.array([[0.1, 0.3], [0.5, 1.0]])
    truth = np.array([[False, False], [False, True]])
    found = reliability(scores, truth, bins=2)
    assert found.pairs_B.tolist() == [2, 2]
    assert found.expected_calibration_error == pytest.approx((2 * 0.2 + 2 * 0.25) / 4)
    assert reliability(truth.astype(float), truth).expected_calibration_error == 0


@pytest.mark.parametrize("seed", range(3))
def test_confusion_and_co_occurrence_by_counting(seed: int) -> None:
    _, truth, tagged = random_case(seed, images=25)
    shares, together = confusion(tagged, truth), co_occurrence(truth)
    for i, j in np.ndindex(shares.shape):
        rows = [n for n in range(len(truth)) if truth[n, i] and not truth[n, j]]
        expected = sum(tagged[n, j] for n in rows) / len(rows) if rows else np.nan
        np.testing.assert_equal(shares[i, j], expected)
        assert together[i, j] == sum(1 for row in truth if row[i] and row[j])
    assert np.isnan(shares.diagonal()).all()


def test_agreement_knows_chance() -> None:
    first = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
    second = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]], bool)
    np.testing.assert_equal(agreement(first, second), [1.0, 0.0, np.nan])


@pytest.mark.parametrize("measure", [class_quality, overall_quality, confusion, agreement, reliability])
@pytest.mark.parametrize(("rows", "truth_rows"), [(3, 2), (0, 0)])
def test_what_cannot_be_compared_is_refused(
    measure: Callable[..., object], rows: int, truth_rows: int
) -> None:
    with pytest.raises(DataError, match="against truth"):
        measure(np.zeros((rows, 2), bool), np.zeros((truth_rows, 2), bool))


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_calibration_is_about_probabilities(bad: float) -> None:
    with pytest.raises(DataError, match="probabilities"):
        reliability(np.array([[0.5, bad]]), np.array([[True, False]]))

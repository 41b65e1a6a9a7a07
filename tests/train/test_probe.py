"""Probes of features: against scikit-learn, against counting by hand, and on features whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier

from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.train.probe_judge import Judge, Labelled
from cliplet.train.probe_linear import (
    STEPS,
    LinearSettings,
    linear_probe,
    strength_of,
    sweep,
)
from cliplet.train.probe_logistic import fit_logistic
from cliplet.train.probe_measures import ProbeOptions, probe_features
from cliplet.train.probe_neighbours import neighbour_votes, retrieval


def unit(features: np.ndarray) -> np.ndarray:
    """The features with rows of length 1."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def labelled(
    seed: int, images: int = 120, classes: int = 4, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit features of which each class is a half-space, and the truth [images, classes]."""
    rng = np.random.default_rng(seed)
    features = unit(rng.normal(size=(images, 12)))
    margins = features @ rng.normal(size=(12, classes)) + noise * rng.normal(size=(images, classes))
    return features, margins > np.quantile(margins, 0.6, axis=0)


def by_scikit(features: np.ndarray, truth: np.ndarray, strength: float) -> np.ndarray:
    regression = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000)
    return np.asarray(
        OneVsRestClassifier(regression).fit(features, truth.astype(int)).decision_function(features)
    )


TIGHT = 1e-7


def logits(fit: torch.Tensor, features: np.ndarray) -> np.ndarray:
    return features @ fit[:-1].numpy() + fit[-1].numpy()


@pytest.mark.parametrize("strength", [1e-2, 1.0, 30.0])
def test_one_against_the_rest_is_that_of_scikit_learn(strength: float) -> None:
    features, truth = labelled(0, noise=0.5)
    fit = fit_logistic(
        torch.from_numpy(features), torch.from_numpy(truth.astype(float)), strength, tolerance=TIGHT
    )
    assert fit.converged
    np.testing.assert_allclose(logits(fit.theta, features), by_scikit(features, truth, strength), atol=1e-4)


def test_one_label_is_the_multinomial_of_scikit_learn() -> None:
    features, margins = labelled(1)
    which = np.random.default_rng(3).integers(0, 4, len(features))
    truth = np.eye(4)[which]
    fit = fit_logistic(
        torch.from_numpy(features), torch.from_numpy(truth), 0.5, one_label=True, tolerance=TIGHT
    )
    theirs = LogisticRegression(C=2, tol=1e-10, max_iter=10_000).fit(features, which)
    found = torch.from_numpy(logits(fit.theta, features)).softmax(1).numpy()
    np.testing.assert_allclose(found, theirs.predict_proba(features), atol=1e-5)


def test_the_strengths_are_those_of_the_paper() -> None:
    assert STEPS == 96
    assert [strength_of(step) for step in (0, 8, 96)] == pytest.approx([1e-6, 1e-5, 1e6])


@given(st.integers(0, STEPS))
def test_the_sweep_finds_any_single_peak(peak: int) -> None:
    best, found = sweep(lambda step: -abs(step - peak))
    assert best == peak
    assert len(found) <= 7 + 2 * 4
    assert set(range(0, 97, 16)) <= found.keys() <= set(range(97))


def test_of_equal_strengths_the_sweep_takes_the_middle() -> None:
    assert sweep(lambda step: 1.0)[0] == STEPS // 2
    best, found = sweep(lambda step: float(20 <= step <= 60))
    assert found[best] == 1
    assert 30 <= best <= 50


def test_the_sweep_measures_what_it_says() -> None:
    """Fits and judgements of the held-out images repeated with scikit-learn."""
    features, truth = labelled(2, images=150, noise=1.0)
    chosen = LinearSettings(features="unit", tolerance=1e-7, held_out=0.3, seed=5)
    probe = linear_probe(features, truth, chosen)
    shuffled = np.random.default_rng(5).permutation(150)
    held, fitted = np.sort(shuffled[:45]), np.sort(shuffled[45:])
    assert probe.held_out == 45
    for strength, value in probe.swept.items():
        if strength < 1e-1:  # nothing holds the weights, and both stop somewhere
            continue
        regression = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000)
        model = OneVsRestClassifier(regression).fit(features[fitted], truth[fitted].astype(int))
        theirs = average_precision_score(truth[held], model.decision_function(features[held]))
        assert value == pytest.approx(theirs, abs=1e-6), strength
    best = max(probe.swept.values())
    assert probe.strength == max(
        s for s, value in probe.swept.items() if value == pytest.approx(best, abs=1e-9)
    )
    np.testing.assert_allclose(probe.scores(features), by_scikit(features, truth, probe.strength), atol=1e-3)


def test_standardised_features_do_not_depend_on_their_units() -> None:
    features, truth = labelled(3, noise=0.5)
    scaled = features * np.geomspace(0.1, 10, 12) + 5
    found = [linear_probe(f, truth, LinearSettings(tolerance=1e-7)) for f in (features, scaled)]
    np.testing.assert_allclose(found[0].scores(features), found[1].scores(scaled), rtol=1e-3, atol=1e-3)
    other = [linear_probe(f, truth, LinearSettings(features="unit")) for f in (features, scaled)]
    assert not np.allclose(other[0].scores(features), other[1].scores(scaled), atol=1e-2)


def test_a_column_that_never_changes_does_no_harm() -> None:
    features, truth = labelled(4)
    constant = np.hstack([features, np.full((len(features), 1), 0.1)])
    probe = linear_probe(constant, truth, LinearSettings())
    assert np.isfinite(probe.scores(constant)).all()


@pytest.mark.parametrize("scaling", ["standardised", "unit"])
def test_separable_features_are_told_apart_and_shuffled_labels_are_not(scaling: str) -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((600, 3)) < 0.4
    features = unit(np.hstack([np.where(truth, 1.0, -1.0), 0.2 * rng.normal(size=(600, 5))]))
    chosen = LinearSettings(features=scaling)
    probe = linear_probe(features[:300], truth[:300], chosen)
    found = average_precision_score(truth[300:], probe.scores(features[300:]))
    assert found > 0.9999
    shuffled = rng.permutation(truth[:300])
    lost = linear_probe(features[:300], shuffled, chosen)
    chance = truth[300:].mean()
    assert average_precision_score(truth[300:], lost.scores(features[300:])) == pytest.approx(chance, abs=0.2)


def test_one_label_each_is_probed_by_accuracy() -> None:
    rng = np.random.default_rng(1)
    which = rng.integers(0, 3, 200)
    truth = np.eye(3, dtype=bool)[which]
    features = unit(np.hstack([np.eye(3)[which], 0.1 * rng.normal(size=(200, 3))]))
    probe = linear_probe(features, truth, LinearSettings())
    assert probe.one_label
    scores = probe.scores(features)
    assert (scores.argmax(1) == which).all()
    np.testing.assert_allclose(np.exp(scores).sum(1), 1)


def test_classes_without_positives_or_negatives_are_not_learned() -> None:
    features, truth = labelled(5)
    truth[:, 1], truth[:, 2] = False, True
    probe = linear_probe(features, truth, LinearSettings())
    assert probe.learned_C.tolist() == [True, False, False, True]
    scores = probe.scores(features)
    assert np.isneginf(scores[:, 1:3]).all()
    assert np.isfinite(scores[:, [0, 3]]).all()


def test_the_seed_chooses_the_held_out_images() -> None:
    features, truth = labelled(6, noise=1.5)
    runs = [linear_probe(features, truth, LinearSettings(seed=seed)) for seed in (0, 0, 1)]
    assert runs[0].swept == runs[1].swept != runs[2].swept


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: LinearSettings(features="whitened"), UsageError, "standardised, unit"),
        (lambda: LinearSettings(held_out=1.0), UsageError, "between 0 and 1"),
        (
            lambda: linear_probe(np.eye(4), np.zeros((4, 2), bool), LinearSettings()),
            DataError,
            "none of 2 classes can be judged on 1 held-out images",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(
    ask: Callable[[], object], error: type[ClipletError], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask()


@pytest.mark.parametrize("k", [1, 3, 10])
def test_votes_are_those_of_scikit_learn(k: int) -> None:
    features, truth = labelled(7)
    asked, _ = labelled(8, images=30)
    model = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine")
    model.fit(features, truth.astype(int))
    theirs = np.stack([shares[:, 1] for shares in model.predict_proba(asked)], 1)
    found = neighbour_votes(features, truth, asked, [1, k])
    np.testing.assert_allclose(found.scores[k], theirs, atol=1e-4)
    assert found.duplicates == 0


def test_votes_by_hand() -> None:
    features = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    truth = np.array([[True, False], [False, True], [True, True]])
    found = neighbour_votes(features, truth, features[:1], [1, 2, 3], temperature=0.4)
    weights = np.exp(np.array([1, 0.6, -1]) / 0.4)
    np.testing.assert_allclose(found.scores[1], [[1, 0]])
    np.testing.assert_allclose(found.scores[2], [weights[:2] / weights[:2].sum()], atol=1e-6)
    three = np.array([weights[0] + weights[2], weights[1] + weights[2]]) / weights.sum()
    np.testing.assert_allclose(found.scores[3], [three], atol=1e-6)
    assert found.duplicates == 1


def test_retrieval_by_hand() -> None:
    """Angles 0, 10, 30, 60, 100 degrees with labels a, b, a, ab, c: each looks at the others, nearest first."""
    angles = np.deg2rad([0, 10, 30, 60, 100])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    # 0: 10- 30+ 60+ 100-. R 2: second rank holds one hit with precision 1/2: (0 + 1/2) / 2.
    # 1 (b): 0- 30- 60+. R 1, first rank misses: 0.
    # 2 (a): 10- 0+ 60+. R 2: (0 + 1/2) / 2.
    # 3 (ab): 30+ 100- 10+ 0+. R 3: (1 + 0 + 2/3) / 3.
    # 4 (c): nobody.
    found = retrieval(features, truth, (1, 2, 3))
    assert (found.queries, found.without_match, found.duplicates) == (4, 1, 0)
    assert found.recall_at == pytest.approx({1: 1 / 4, 2: 3 / 4, 3: 1.0})
    assert found.map_at_r == pytest.approx((1 / 4 + 0 + 1 / 4 + (1 + 2 / 3) / 3) / 4)
    one = retrieval(features, truth, (1,), queries=np.array([3]))
    assert (one.queries, one.recall_at[1], one.map_at_r) == (1, 1.0, pytest.approx((1 + 2 / 3) / 3))


def test_duplicates_help_nobody() -> None:
    features, truth = labelled(9, images=40)
    alone = retrieval(features, truth)
    twice = retrieval(np.vstack([features, features]), np.vstack([truth, truth]), queries=np.arange(40))
    assert twice.duplicates == 40
    assert alone.duplicates == 0
    # Every other image is there twice, so the ranks double and the first hit stays where it was.
    assert twice.recall_at[1] == alone.recall_at[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 25))
def test_retrieval_by_loops(seed: int, images: int) -> None:
    rng = np.random.default_rng(seed)
    features = unit(rng.normal(size=(images, 6)))
    truth = rng.random((images, 4)) < 0.3
    recall, precision = [], []
    for i in range(images):
        others = sorted((j for j in range(images) if j != i), key=lambda j: -float(features[i] @ features[j]))
        hits = [bool((truth[i] & truth[j]).any()) for j in others]
        if any(hits):
            recall.append([any(hits[:k]) for k in (1, 5)])
            r = sum(hits)
            precision.append(sum(sum(hits[: n + 1]) / (n + 1) for n in range(r) if hits[n]) / r)
    found = retrieval(features, truth, (1, 5))
    assert found.queries == len(recall)
    assert list(found.recall_at.values()) == pytest.approx(np.mean(recall, 0) if recall else [0, 0])
    assert found.map_at_r == pytest.approx(np.mean(precision) if precision else 0)


NAMES = ("a", "b", "c", "d")


def as_labelled(features: np.ndarray, truth: np.ndarray) -> Labelled:
    return Labelled(features, truth, [f"{n}.jpg" for n in range(len(features))])


def test_the_judge_counts_as_scikit_learn_does_and_names_what_it_leaves_out() -> None:
    rng = np.random.default_rng(0)
    scores, truth, train = rng.random((50, 4)), rng.random((50, 4)) < 0.4, rng.random((50, 4)) < 0.4
    train[:, 1], truth[:, 2] = False, False
    judge = Judge.of(NAMES, train, truth)
    assert judge.left_out == {"b": "no positive in training", "c": "no positive in evaluation"}
    found = judge.quality(scores)
    theirs = average_precision_score(truth[:, [0, 3]], scores[:, [0, 3]], average=None)
    assert found["AP"] == pytest.approx(dict(zip("ad", 100 * theirs, strict=True)))
    assert found["mAP"] == pytest.approx(100 * theirs.mean())
    assert found["mAP_11_point"] == pytest.approx(np.mean(list(found["AP_11_point"].values())))
    assert found["mAP_11_point"] != pytest.approx(found["mAP"])
    assert judge.chance == pytest.approx(100 * truth[:, [0, 3]].mean())
    assert "top_1" not in found


def test_top_1_is_counted_where_every_image_has_one_label() -> None:
    truth = np.eye(3, dtype=bool)[[0, 1, 2, 0]]
    scores = np.eye(3)[[0, 1, 0, 0]]
    assert Judge.of(NAMES[:3], truth, truth).quality(scores)["top_1"] == 75
    # An image of a class that cannot be learned is counted too, and is wrong.
    train = truth.copy()
    train[2] = [True, False, False]
    judge = Judge.of(NAMES[:3], train, truth)
    assert list(judge.left_out) == ["c"]
    assert judge.quality(scores)["top_1"] == 75


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f, t: (f[:-1], t), "119 rows of features and 120 of labels for 119 images"),
        (lambda f, t: (f[:0], t[:0]), "0 rows of features"),
        (lambda f, t: (np.where(np.arange(120)[:, None] == 7, np.nan, f), t), "1 of 120 images .*: 7.jpg"),
        (lambda f, t: (f * (np.arange(120)[:, None] > 1), t), "2 of 120 images .*: 0.jpg, 1.jpg"),
        (lambda f, t: (np.where(f == f[3, 3], np.inf, f), t), "not finite or all 0: 3.jpg"),
    ],
)
def test_broken_features_are_named(
    broken: Callable[..., tuple[np.ndarray, np.ndarray]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        as_labelled(*broken(*labelled(0)))


def test_classes_that_nothing_can_measure_are_refused() -> None:
    features, truth = labelled(0)
    with pytest.raises(DataError, match="none of 4 classes can be measured; a: no positive in training"):
        probe_features(
            as_labelled(features, ~truth & truth), as_labelled(features, truth), NAMES, ProbeOptions()
        )


def test_all_measures_of_known_features() -> None:
    """Features that are their labels: everything finds everything."""
    rng = np.random.default_rng(2)
    truth = np.eye(3, dtype=bool)[rng.integers(0, 3, 80)]
    features = truth + 0.05 * rng.normal(size=(80, 3))
    train, evaluation = as_labelled(features[:40], truth[:40]), as_labelled(3 * features[40:], truth[40:])
    found = probe_features(
        train,
        evaluation,
        NAMES[:3],
        ProbeOptions(queries=25),
        measures=("linear", "knn", "retrieval", "zero-shot"),
        text_scores=lambda unit_rows: {"cosine": unit_rows},
    )
    measured = found["measured"]
    for quality in (measured["linear"], *measured["knn"].values(), measured["zero-shot"]["cosine"]):
        assert (quality["mAP"], quality["mAP_11_point"], quality["top_1"]) == pytest.approx((100, 100, 100))
    assert measured["linear"]["loss"] == "multinomial"
    assert list(measured["knn"]) == ["1", "5", "10", "20"]
    assert measured["retrieval"]["queries"] == 25
    assert measured["retrieval"]["gallery"] == 40
    assert measured["retrieval"]["recall_at_1"] == measured["retrieval"]["mAP_at_R"] == pytest.approx(100)
    assert set(found["seconds"]) == set(measured)


def test_what_limits_the_numbers_is_noted() -> None:
    features, truth = labelled(11, images=30)
    both = as_labelled(features[:15], truth[:15]), as_labelled(features, truth)
    found = probe_features(*both, NAMES, ProbeOptions(), measures=("knn",))
    assert "no more than 10 neighbours of 15 training images" in found["notes"]
    assert "15 evaluation images have a duplicate in training" in found["notes"]


def test_the_end_of_the_sweep_and_fits_that_stop_early_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    both = as_labelled(*labelled(12))
    monkeypatch.setattr("cliplet.train.probe_linear.sweep", lambda measure: (0, {0: measure(0)}))
    monkeypatch.setattr(
        ProbeOptions, "linear_settings", lambda self: LinearSettings(iterations=3, tolerance=1e-7)
    )
    found = probe_features(both, both, NAMES, ProbeOptions(), measures=("linear",))
    assert found["notes"] == [
        "the L2 strength 1e-06 is at the end of the sweep",
        "2 fits of the linear probe ended before they had converged",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ("linear", "colour")}, "no measure is called 'colour'"),
        ({"evaluation_share": 1.0}, "evaluation share of 1.0"),
        ({"held_out": 0.0}, "held_out 0.0"),
        ({"features": "raw"}, "standardised, unit"),
    ],
)
def test_options_are_refused_before_anything_runs(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ProbeOptions(**options)  # type: ignore[arg-type]

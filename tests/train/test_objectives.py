"""What each method minimises and how its labels move: by hand, from METHODS' equations, through `Objective.loss`.

Legend: N images, B images of a batch, C classes; z logits, p their sigmoids.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.train.classifier_recipe import METHODS, ClassifierRecipe
from cliplet.train.objectives import Ccd, Cdul, Objective, Step, baseline
from cliplet.train.recipes import scenes_ccd, voc12_ccd_released, with_method

# Probabilities 3/4, 1/4, 1/2 and 9/10, 1/10, 3/4 as logits.
P = np.array([[0.75, 0.25, 0.5], [0.9, 0.1, 0.75]])
Z = torch.tensor(np.log(P / (1 - P)), dtype=torch.float32)
# Five images of a data set, of which a batch holds numbers 3 and 1; the top-1 classes of those are 0 and 2.
PROBS = np.array(
    [[0.2, 0.5, 0.3], [0.005, 0.3, 0.695], [0.1, 0.1, 0.8], [0.9, 0.06, 0.04], [0.3, 0.4, 0.3]], np.float32
)
BATCH = np.array([3, 1])
OBSERVED = np.array([[1, 0, 0], [0, 0, 1]])


def recipe_of(method: str, **changes: Any) -> ClassifierRecipe:
    return replace(with_method(scenes_ccd(), method), **changes)


def step(epoch: int = 0, strong: Tensor | None = None, table: Tensor | None = None) -> Step:
    return Step(BATCH, Z.clone(), strong, table, epoch)


def ce(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def loss_of(objective: Objective, taken: Step) -> float:
    return float(objective.loss(taken))


# Expected scalars, each written from the formula of its paper with probabilities in place of logits.
Y = OBSERVED
AN = ce(Y, P)
COUNT = P.sum(1).mean()
G = -40 / 9 * (2 / 3) + 49 / 9
BY_HAND = {
    "an": AN.mean(),
    "an_ls": ce(np.where(Y, 0.9, 0.1), P).mean(),
    "wan": np.where(Y, AN, AN / 2).mean(),
    "epr": (-Y * np.log(P)).sum() / 6 + ((COUNT - 2.5) / 3) ** 2,
    # Image 3 knows class 0 alone to be there and none to be absent; image 1 that class 2 is and class 0 is not.
    "durand": ((-40 / 9 / 3 + 49 / 9) * -math.log(0.75) + G * (-math.log(0.75) - math.log(1 - 0.9))) / 6,
    "asl": np.where(
        Y, -np.log(P), -(np.maximum(P - 0.05, 0) ** 4) * np.log(1 - np.maximum(P - 0.05, 0))
    ).mean(),
    "bce": ce(np.array([[1, 1, 0], [0, 0, 1]]), P).mean(),
    "bce_ls": ce(np.array([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]), P).mean(),
}
TRUTH = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]], bool)


@pytest.mark.parametrize("method", BY_HAND)
def test_a_loss_is_its_formula_on_the_batchs_own_labels(method: str) -> None:
    objective = baseline(recipe_of(method), PROBS, TRUTH)
    assert loss_of(objective, step()) == pytest.approx(BY_HAND[method], rel=1e-5)
    assert objective.table() is None and not objective.wants_strong(5)
    assert set(objective.state()) == {"labels"}


def test_settings_of_the_losses_reach_them() -> None:
    smooth = baseline(recipe_of("an_ls", smoothing=0.2), PROBS, None)
    assert loss_of(smooth, step()) == pytest.approx(ce(np.where(Y, 0.8, 0.2), P).mean(), rel=1e-5)
    few = baseline(recipe_of("epr", expected_count=1.0), PROBS, None)
    assert loss_of(few, step()) == pytest.approx(
        (-Y * np.log(P)).sum() / 6 + ((COUNT - 1) / 3) ** 2, rel=1e-5
    )
    focus = baseline(recipe_of("asl", focus_negative=1.0, focus_positive=2.0, focus_clip=0.0), PROBS, None)
    wanted = np.where(Y, -((1 - P) ** 2) * np.log(P), -P * np.log(1 - P)).mean()
    assert loss_of(focus, step()) == pytest.approx(wanted, rel=1e-5)


def test_durand_knows_the_top_class_and_those_that_are_surely_absent() -> None:
    objective = baseline(recipe_of("durand"), PROBS, None)
    wanted = [[0, 1, 0], [-1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert objective.labels_NC.tolist() == wanted
    more = baseline(recipe_of("durand", known_negative_below=0.95), PROBS, None)
    assert more.labels_NC.tolist() == (2.0 * np.eye(3)[PROBS.argmax(1)] - 1).tolist(), "top-1 stays positive"
    assert objective.positives_NC.tolist() == (np.array(wanted) == 1).tolist()


def test_role_learns_a_table_beside_the_classifier() -> None:
    objective = baseline(recipe_of("role", expected_count=1.5), PROBS, None)
    table = objective.table()
    assert table is not None
    start = table.sigmoid().numpy()
    top = np.eye(3, dtype=bool)[PROBS.argmax(1)]
    np.testing.assert_allclose(start[top], 0.995, atol=1e-6)
    assert (start[~top] >= 0.4).all() and (start[~top] <= 0.6).all() and np.ptp(start[~top]) > 0.05
    again = baseline(recipe_of("role"), PROBS, None).table()
    other = baseline(recipe_of("role", seed=1), PROBS, None).table()
    assert again is not None and other is not None
    assert again.equal(table) and not other.equal(table)

    theta = torch.tensor([[2.0, -1.0, 0.5], [-0.5, 0.0, 1.0]])
    g = 1 / (1 + np.exp(-theta.numpy()))

    def half(f: np.ndarray, partner: np.ndarray) -> float:
        regulariser = ((f.sum(1).mean() - 1.5) / 3) ** 2
        return float((-Y * np.log(f)).sum() / 6 + ce(partner, f).mean() + regulariser)

    found = loss_of(objective, step(table=theta))
    assert found == pytest.approx(0.5 * (half(P, g) + half(g, P)), rel=1e-5)


# delta 20 %: of the 6 entries, ceil(6 * 0.2 * (epoch from 0)); the largest losses of unknown entries are
# P = 0.9 (image 1, class 0), then 0.5 (image 3, class 2), then 0.25, then 0.1.
@pytest.mark.parametrize(
    ("method", "epoch", "changed"),
    [
        ("ll_r", 0, []),
        ("ll_r", 1, [(1, 0), (0, 2)]),
        ("ll_r", 2, [(1, 0), (0, 2), (0, 1)]),
        ("ll_ct", 0, []),
        ("ll_ct", 1, [(1, 0), (0, 2)]),
        ("ll_ct", 3, [(1, 0), (0, 2), (0, 1), (1, 1)]),
        ("ll_cp", 0, []),
        ("ll_cp", 1, [(1, 0), (0, 2)]),
        ("ll_cp", 3, [(1, 0), (0, 2)]),
    ],
)
def test_large_losses_are_rejected_or_corrected(
    method: str, epoch: int, changed: list[tuple[int, int]]
) -> None:
    objective = baseline(recipe_of(method, large_loss_percent=20.0), PROBS, None)
    before = objective.labels_NC.copy()
    wanted = AN.copy()
    for place in changed:
        wanted[place] = 0 if method == "ll_r" else -math.log(P[place])
    assert loss_of(objective, step(epoch)) == pytest.approx(wanted.mean(), rel=1e-5)
    if method == "ll_cp":
        for row, column in changed:
            before[BATCH[row], column] = 1
    assert np.array_equal(objective.labels_NC, before), "only LL-Cp keeps what it corrects"


def test_flips_of_ll_cp_stay_add_up_and_survive_a_checkpoint() -> None:
    objective = baseline(recipe_of("ll_cp", large_loss_percent=20.0), PROBS, None)
    objective.loss(step(1))
    resumed = baseline(recipe_of("ll_cp", large_loss_percent=20.0), PROBS, None)
    resumed.load_state(objective.state())
    for each in (objective, resumed):
        each.loss(step(2))
    # The two next largest of what is still unknown.
    assert objective.labels_NC[BATCH].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert np.array_equal(objective.labels_NC, resumed.labels_NC)
    assert objective.labels_NC[[0, 2, 4]].sum() == 3


def test_cdul_learns_by_kl_and_moves_its_labels_towards_the_classifier() -> None:
    """CDUL, equations 7 and 8, in float64 with the logarithms written out."""
    labels = np.array([[0.5, 0.2, 0.9], [0.7, 0.05, 0.6], [0.0, 1.0, 0.3], [0.6, 0.3, 0.1], [0.5, 0.5, 0.5]])
    objective = Cdul(recipe_of("cdul"), labels)
    y = labels[BATCH]
    kl = y * np.log(y / P) + (1 - y) * np.log((1 - y) / (1 - P))
    assert loss_of(objective, step()) == pytest.approx(kl.mean(), rel=1e-5)

    logits = np.random.default_rng(0).normal(0, 2, labels.shape).astype(np.float32)
    inside = labels.clip(1e-6, 1 - 1e-6)
    p = 1 / (1 + np.exp(-logits.astype(float)))
    gradient = np.log(inside / p) - np.log((1 - inside) / (1 - p))
    psi = np.exp(-0.5 * (inside - 0.5) ** 2) / math.sqrt(2 * math.pi)
    latent = np.log(inside / (1 - inside)) - psi * gradient
    objective.update(logits)
    np.testing.assert_allclose(objective.labels_NC, 1 / (1 + np.exp(-latent)), rtol=1e-4, atol=1e-7)
    towards = np.abs(objective.labels_NC - p) < np.abs(inside - p)
    assert towards.all()

    resumed = Cdul(recipe_of("cdul"), np.zeros_like(labels))
    resumed.load_state(objective.state())
    for each in (objective, resumed):
        each.update(-logits)
    assert np.array_equal(objective.labels_NC, resumed.labels_NC)
    assert np.array_equal(objective.latent_NC, resumed.latent_NC)
    y = 1 / (1 + np.exp(-latent))
    twice = latent - np.exp(-0.5 * (y - 0.5) ** 2) / math.sqrt(2 * math.pi) * (latent + logits)
    np.testing.assert_allclose(objective.latent_NC, twice, rtol=1e-4, atol=1e-4)


BIAS = np.array([0.9, 0.8, 0.5], np.float32)
SURE = np.array([True, False, True, True, True])


def test_ccd_starts_from_debiased_labels_and_warms_up_on_them_alone() -> None:
    """CCD's public code: clip(max(p, 1/L) / b, 0, 1), then the mean BCE whatever the weights."""
    objective = Ccd(replace(voc12_ccd_released(), unsure_weight=0.1), PROBS, BIAS, SURE)
    wanted = np.clip(np.maximum(PROBS, 0.05) / BIAS, 0, 1)
    np.testing.assert_allclose(objective.labels_NC, wanted, rtol=1e-6)
    assert objective.labels_NC[3, 0] == 1
    for epoch in (0, 1):
        assert not objective.wants_strong(epoch)
        assert loss_of(objective, step(epoch)) == pytest.approx(ce(wanted[BATCH], P).mean(), rel=1e-5)
    plain = Ccd(replace(voc12_ccd_released(), floor=0.0), PROBS, None, SURE)
    np.testing.assert_array_equal(plain.labels_NC, PROBS)
    # A negative floor is 1 / C; here 1 / 3.
    floor = Ccd(recipe_of("ccd"), PROBS, None, SURE)
    np.testing.assert_allclose(floor.labels_NC, np.maximum(PROBS, 1 / 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("unsure_weight", "weights"), [(1.0, [1.0, 1.0]), (0.1, [1.0, 0.1]), (0.0, [1.0, 0.0])]
)
@pytest.mark.parametrize("consistency", [1.0, 0.25])
def test_ccd_later_weighs_images_and_adds_consistency(
    unsure_weight: float, weights: list[float], consistency: float
) -> None:
    recipe = replace(voc12_ccd_released(), unsure_weight=unsure_weight, consistency=consistency)
    objective = Ccd(recipe, PROBS, BIAS, SURE)
    y = np.clip(np.maximum(PROBS, 0.05) / BIAS, 0, 1)[BATCH]
    strong_p = np.array([[0.6, 0.3, 0.2], [0.5, 0.4, 0.8]])
    strong = torch.tensor(np.log(strong_p / (1 - strong_p)), dtype=torch.float32)
    weighed = (np.array(weights)[:, None] * ce(y, P)).mean()
    wanted = weighed + consistency * ce(P, strong_p).mean()
    assert objective.wants_strong(2)
    assert loss_of(objective, step(2, strong)) == pytest.approx(wanted, rel=1e-5)


def test_no_gradient_flows_through_the_view_that_teaches() -> None:
    objective = Ccd(replace(voc12_ccd_released(), unsure_weight=0.0), PROBS, BIAS, np.zeros_like(SURE))
    plain, strong = Z.clone().requires_grad_(), (Z + 0.5).requires_grad_()
    objective.loss(Step(BATCH, plain, strong, None, 4)).backward()
    assert plain.grad is not None and strong.grad is not None
    # All weights are 0 here, so the only term left is consistency.
    assert plain.grad.abs().max() == 0 and strong.grad.abs().min() > 0


def test_without_consistency_there_is_no_second_view() -> None:
    objective = Ccd(replace(voc12_ccd_released(), consistency=0.0), PROBS, BIAS, SURE)
    assert not objective.wants_strong(9)
    y = np.clip(np.maximum(PROBS, 0.05) / BIAS, 0, 1)[BATCH]
    assert loss_of(objective, step(9)) == pytest.approx(ce(y, P).mean(), rel=1e-5)


def test_ccds_update_is_one_blend_cut_off_after_it() -> None:
    """CCD's public code: clip(r y + (1 - r) max(q, 1/L) / b, 0, 1), the crops' labels above 1 until then."""
    objective = Ccd(replace(voc12_ccd_released(), blend=0.4), PROBS, BIAS, SURE)
    old = objective.labels_NC.copy()
    q = np.array([[0.95, 0.0, 0.3], [0.0, 0.0, 0.0], [0.2, 0.6, 0.9], [0.7, 0.7, 0.7], [1, 1, 1]], np.float32)
    asked = np.array([True, True, True, False, True])
    objective.update(q, asked)
    wanted = np.clip(0.4 * old + 0.6 * np.maximum(q, 0.05) / BIAS, 0, 1)
    wanted[3] = old[3]
    np.testing.assert_allclose(objective.labels_NC, wanted, rtol=1e-6)
    # Class 0 of image 0: 0.4 * 2/9 + 0.6 * 19/18; were the crops' part cut off at 1 first, it would be less.
    assert objective.labels_NC[0, 0] == pytest.approx(0.4 * 2 / 9 + 0.6 * 19 / 18, rel=1e-6)
    assert objective.labels_NC.dtype == np.float32
    resumed = Ccd(voc12_ccd_released(), PROBS, BIAS, SURE)
    resumed.load_state(objective.state())
    assert np.array_equal(resumed.labels_NC, objective.labels_NC)


def test_labels_are_a_copy_of_what_was_given() -> None:
    given = PROBS.copy()
    objective = baseline(recipe_of("ll_cp", large_loss_percent=20.0), given, None)
    objective.loss(step(1))
    kept = {name: array.copy() for name, array in objective.state().items()}
    resumed = baseline(recipe_of("ll_cp", large_loss_percent=20.0), given, None)
    resumed.load_state(kept)
    resumed.loss(step(4))
    assert np.array_equal(kept["labels"], objective.labels_NC) and np.array_equal(given, PROBS)


@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        ("bce", DataError, "method bce learns from true labels"),
        ("bce_ls", DataError, "method bce_ls learns from true labels"),
        ("ccd", UsageError, "'ccd' is no baseline"),
        ("cdul", UsageError, "'cdul' is no baseline"),
    ],
)
def test_what_a_method_lacks_is_said(method: str, error: type[ClipletError], said: str) -> None:
    with pytest.raises(error, match=said):
        baseline(recipe_of(method), PROBS, None)


def test_every_method_has_an_objective_with_a_finite_loss() -> None:
    for method in METHODS:
        recipe = recipe_of(method)
        objective: Objective
        if method == "ccd":
            objective = Ccd(recipe, PROBS, BIAS, SURE)
        elif method == "cdul":
            objective = Cdul(recipe, PROBS)
        else:
            objective = baseline(recipe, PROBS, TRUTH)
        table = objective.table()
        logits = Z.clone().requires_grad_()
        loss = objective.loss(Step(BATCH, logits, Z, None if table is None else table[BATCH], 3))
        loss.backward()
        assert (
            math.isfinite(float(loss.detach()))
            and logits.grad is not None
            and torch.isfinite(logits.grad).all()
        )
        assert objective.labels_NC.shape == PROBS.shape

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cliplet.errors import UsageError
from cliplet.train.losses import (
    LargeLossScheme,
    asymmetric,
    bce,
    bernoulli_kl,
    cdul_label_step,
    consistency,
    epr,
    expected_positives,
    large_loss,
    large_loss_share,
    partial_bce,
    role,
    sample_weights,
    smoothed,
    wan,
)

# Logits whose probabilities are 1/2, 3/4, 1/4 and 9/10.
HALF, THREE_QUARTERS, QUARTER, NINE_TENTHS = 0.0, math.log(3), -math.log(3), math.log(9)


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_batch(seed: int = 0, images: int = 4, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits, and observed labels with one positive an image."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    positives = torch.randint(classes, (images,), generator=generator)
    return logits, functional.one_hot(positives, classes).double()


# Every loss as a function of logits, observed labels and, where there is one, a partner's logits.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "bce": lambda z, y, _: bce(z, y),
    "bce smoothed": lambda z, y, _: bce(z, smoothed(y)),
    "wan": lambda z, y, _: wan(z, y),
    "expected positives": lambda z, _, __: expected_positives(z, 1.5),
    "epr": lambda z, y, _: epr(z, y, 1.5),
    "role": lambda z, y, w: role(z, w, y, 1.5),
    "partial bce": lambda z, y, _: partial_bce(z, y),
    "large loss": lambda z, y, _: large_loss(z, y, 0.2, "LL-Ct")[0],
    "asymmetric": lambda z, y, _: asymmetric(z, y),
    "asymmetric unclipped": lambda z, y, _: asymmetric(z, y, 0.5, 0.5, clip=0.0),
    "asymmetric with roots": lambda z, y, _: asymmetric(z, y, 0.5, 0.5, clip=0.1),
    "consistency": lambda z, _, w: consistency(z, w),
    "bernoulli kl": lambda z, y, _: bernoulli_kl(y, z),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_extreme_logits_give_finite_losses_and_gradients(loss: Loss) -> None:
    logits = torch.tensor([[100.0, -100.0, 100.0, -100.0], [0.0, 50.0, -3e4, 3e4]], requires_grad=True)
    value = loss(logits, torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]), logits.flip(0))
    value.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()


# Finite differences see what ROLE's other half detaches; its gradient is worked out by hand below.
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"role"}))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    logits, observed = random_batch()
    partner = random_batch(1)[0]
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, observed, partner), logits.requires_grad_())


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(5)), st.integers(0, 99))
def test_losses_do_not_depend_on_the_order_of_images_and_classes(
    images: list[int], classes: list[int], seed: int
) -> None:
    batch = (*random_batch(seed), random_batch(seed + 1)[0])
    moved = [t[images][:, classes] for t in batch]
    for name, loss in LOSSES.items():
        before = loss(*batch)
        expected = before if before.ndim == 0 else before[images][:, classes]
        torch.testing.assert_close(loss(*moved), expected, msg=lambda text, name=name: f"{name}: {text}")


def test_bce_by_hand_and_with_soft_targets() -> None:
    logits = f64([HALF, THREE_QUARTERS, QUARTER, NINE_TENTHS])
    targets = f64([1.0, 0.0, 1.0, 0.5])
    by_hand = [math.log(2), math.log(4), math.log(4), -0.5 * math.log(0.9) - 0.5 * math.log(0.1)]
    torch.testing.assert_close(bce(logits, targets), f64(by_hand))


def test_smoothing_moves_targets_by_all_of_epsilon() -> None:
    torch.testing.assert_close(smoothed(f64([1.0, 0.0, 0.5])), f64([0.9, 0.1, 0.5]))
    torch.testing.assert_close(smoothed(f64([1.0, 0.0]), epsilon=0.25), f64([0.75, 0.25]))


def test_bce_ls_weighs_both_answers_as_the_public_code_writes_it() -> None:
    logits, observed = random_batch()
    p = logits.sigmoid()
    positive = -0.9 * torch.log(p) - 0.1 * torch.log(1 - p)
    negative = -0.9 * torch.log(1 - p) - 0.1 * torch.log(p)
    torch.testing.assert_close(
        bce(logits, smoothed(observed, 0.1)), torch.where(observed == 1, positive, negative)
    )


def test_wan_weighs_unknown_entries_by_one_over_the_other_classes() -> None:
    logits = f64([HALF, THREE_QUARTERS, QUARTER])
    by_hand = [math.log(2), math.log(4) / 2, math.log(4 / 3) / 2]
    torch.testing.assert_close(wan(logits, f64([1.0, 0.0, 0.0])), f64(by_hand))


def test_wan_refuses_a_single_class() -> None:
    with pytest.raises(UsageError, match="one class"):
        wan(f64([0.0]), f64([1.0]))


def test_expected_positives_by_hand() -> None:
    # Sums of p are 1.25 and 1.65, their mean 1.45: (1.45 - 1) ^ 2 / 2 ^ 2.
    logits = f64([HALF, THREE_QUARTERS], [THREE_QUARTERS, NINE_TENTHS])
    torch.testing.assert_close(
        expected_positives(logits, 1.0), torch.tensor(0.45**2 / 4, dtype=torch.float64)
    )
    assert float(expected_positives(logits, 1.45)) == pytest.approx(0.0, abs=1e-30)


def test_epr_by_hand() -> None:
    # The positives' losses over B C = 4, and the term above.
    logits = f64([HALF, THREE_QUARTERS], [THREE_QUARTERS, NINE_TENTHS])
    value = epr(logits, f64([1.0, 0.0], [0.0, 1.0]), 1.0)
    assert float(value) == pytest.approx((math.log(2) - math.log(0.9)) / 4 + 0.45**2 / 4)


def test_role_by_hand() -> None:
    classifier, table = f64([HALF, THREE_QUARTERS]), f64([THREE_QUARTERS, QUARTER])
    # Classifier f = 1/2, 3/4; table g = 3/4, 1/4; the first class observed; one positive expected.
    positives = math.log(2) + math.log(4 / 3)
    f_against_g = math.log(2) + (0.25 * math.log(4 / 3) + 0.75 * math.log(4))
    g_against_f = (0.5 * math.log(4 / 3) + 0.5 * math.log(4)) + (0.75 * math.log(4) + 0.25 * math.log(4 / 3))
    regularisers = (1.25 - 1) ** 2 / 4 + 0.0
    by_hand = 0.5 * ((positives + f_against_g + g_against_f) / 2 + regularisers)
    assert float(role(classifier, table, f64([1.0, 0.0]), 1.0)) == pytest.approx(by_hand)


def test_role_moves_either_player_by_its_own_half_alone() -> None:
    logits, observed = random_batch()
    table = random_batch(1)[0]
    value = role(logits.requires_grad_(), table.requires_grad_(), observed, 1.5)
    for_classifier, for_table = torch.autograd.grad(value, [logits, table])
    for player, partner, gradient in ((logits, table, for_classifier), (table, logits, for_table)):
        p, q = player.detach().sigmoid(), partner.detach().sigmoid()
        # By hand: p - q of the cross-entropy, p - 1 of the positives, the chain rule through the squared mean.
        mean_count = p.sum(1).mean()
        by_hand = ((p - q) + observed * (p - 1)) / 20 + 2 * (mean_count - 1.5) / 25 * p * (1 - p) / 4
        torch.testing.assert_close(gradient, 0.5 * by_hand)


@pytest.mark.parametrize(
    "known, weight",
    [
        ([1, -1, -1, 1, -1, -1, -1, -1, -1, -1], 1.0),
        ([0, 0, 0, 1, 0, 0, 0, 0, 0, 0], 5.0),
        ([0, -1, 0, 1, 0, -1, 0, -1, 0, 1], 29 / 9),
        ([0] * 10, 0.0),
    ],
    ids=["all", "a tenth", "half", "none"],
)
def test_partial_bce_weighs_what_is_known(known: list[float], weight: float) -> None:
    logits = random_batch(classes=10)[0][:1]
    p = logits.sigmoid().numpy()[0]
    plain = [{1: -math.log(q), -1: -math.log(1 - q), 0: 0.0}[int(k)] for k, q in zip(known, p, strict=True)]
    torch.testing.assert_close(
        partial_bce(logits, f64([float(k) for k in known])), f64([weight * v for v in plain])
    )


@pytest.mark.parametrize(
    "scheme, epoch, share",
    [
        ("LL-R", 1, 0.0),
        ("LL-R", 2, 0.002),
        ("LL-R", 10, 0.018),
        ("LL-Ct", 4, 0.006),
        ("LL-R", 900, 1.0),
        ("LL-Cp", 1, 0.0),
        ("LL-Cp", 2, 0.002),
        ("LL-Cp", 10, 0.002),
    ],
)
def test_large_loss_share_grows_from_the_second_epoch(
    scheme: LargeLossScheme, epoch: int, share: float
) -> None:
    assert large_loss_share(epoch, 0.2, scheme) == pytest.approx(share)


@pytest.mark.parametrize(
    "scheme, changed",
    [
        ("LL-R", [0.0, 0.0]),
        ("LL-Ct", [-math.log(0.9), -math.log(0.75)]),
        ("LL-Cp", [-math.log(0.9), -math.log(0.75)]),
    ],
)
def test_large_loss_changes_the_largest_losses_of_unknown_entries(
    scheme: LargeLossScheme, changed: list[float]
) -> None:
    # The largest loss of all belongs to the observed positive of the first image.
    logits = f64([-9.0, HALF, NINE_TENTHS], [THREE_QUARTERS, QUARTER, NINE_TENTHS])
    observed = f64([1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    # ceil(6 * 0.2) = 2: in the first image the third class, in the second the first.
    loss, mask = large_loss(logits, observed, 0.2, scheme)
    assert mask.tolist() == [[False, False, True], [True, False, False]]
    torch.testing.assert_close(loss[mask], torch.tensor(changed, dtype=torch.float64))
    torch.testing.assert_close(loss[~mask], bce(logits, observed)[~mask])


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.001, 1), (0.07, 7), (0.071, 8), (1.0, 80)])
def test_large_loss_changes_as_many_as_the_share_says_and_no_observed_positive(
    share: float, count: int
) -> None:
    # Ties everywhere: the number has to hold all the same.
    observed = torch.zeros(10, 10)
    observed[:2] = 1
    loss, mask = large_loss(torch.zeros(10, 10), observed, share, "LL-R")
    assert int(mask.sum()) == count and not mask[:2].any()
    assert float(loss.sum()) == pytest.approx((100 - count) * math.log(2), rel=1e-5)


def test_rejected_entries_have_no_gradient() -> None:
    logits, observed = random_batch()
    loss, mask = large_loss(logits.requires_grad_(), observed, 0.25, "LL-R")
    loss.sum().backward()
    assert logits.grad is not None
    assert mask.any() and not logits.grad[mask].any() and logits.grad[~mask].all()


def test_an_unknown_large_loss_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match=r"LL-X[\s\S]*LL-R, LL-Ct, LL-Cp"):
        large_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0.5, "LL-X")


def test_asymmetric_by_hand() -> None:
    logits = f64([NINE_TENTHS, NINE_TENTHS, QUARTER, -math.log(24), -math.log(19)])
    targets = f64([1.0, 0.0, 0.0, 0.0, 0.0])
    # The last two have p = 0.04 and 0.05: at or below the clip.
    by_hand = [-math.log(0.9), 0.85**4 * -math.log(0.15), 0.2**4 * -math.log(0.8), 0.0, 0.0]
    torch.testing.assert_close(asymmetric(logits, targets), f64(by_hand))
    focused = asymmetric(logits, targets, gamma_negative=1, gamma_positive=2, clip=0.0)
    torch.testing.assert_close(focused[0, :2], f64([0.1**2 * -math.log(0.9), 0.9 * -math.log(0.1)])[0])


def test_asymmetric_clips_without_focus_too() -> None:
    logits = f64([NINE_TENTHS, -math.log(24)])
    torch.testing.assert_close(asymmetric(logits, f64([0.0, 0.0]), 0, 0), f64([-math.log(0.15), 0.0]))


def test_asymmetric_without_focus_and_clip_is_bce() -> None:
    logits, observed = random_batch()
    torch.testing.assert_close(asymmetric(logits, observed, 0, 0, clip=0.0), bce(logits, observed))


def test_consistency_sends_no_gradient_through_the_plain_view() -> None:
    strong, plain = (random_batch(seed)[0].requires_grad_() for seed in (0, 1))
    loss = consistency(strong, plain)
    loss.mean().backward()
    p, q = strong.sigmoid(), plain.sigmoid()
    torch.testing.assert_close(loss, -q * torch.log(p) - (1 - q) * torch.log(1 - p))
    assert plain.grad is None
    torch.testing.assert_close(strong.grad, (p - q).detach() / 20)


@pytest.mark.parametrize(
    "coefficient, expected", [(0.0, [0, 1]), (0.1, [0.1, 1]), (1.0, [1, 1]), (-0.5, [0, 0.5])]
)
def test_sample_weights(coefficient: float, expected: list[float]) -> None:
    weights = sample_weights(torch.tensor([0.0, 1.0]), coefficient)
    assert weights.tolist() == pytest.approx(expected)


def test_bernoulli_kl_is_that_of_torch_distributions_and_zero_at_the_target() -> None:
    logits, _ = random_batch()
    targets = random_batch(1)[0].sigmoid()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(targets), torch.distributions.Bernoulli(logits=logits)
    )
    torch.testing.assert_close(bernoulli_kl(targets, logits), expected)
    torch.testing.assert_close(bernoulli_kl(logits.sigmoid(), logits), torch.zeros_like(logits))


def test_bernoulli_kl_of_certain_targets_is_bce() -> None:
    logits, observed = random_batch()
    torch.testing.assert_close(bernoulli_kl(observed, logits), bce(logits, observed))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_the_label_step_descends_the_divergence_that_autograd_sees(sigma: float) -> None:
    latent, logits = random_batch(2)[0], random_batch(3)[0]
    labels = latent.sigmoid().requires_grad_()
    (gradient,) = torch.autograd.grad(bernoulli_kl(labels, logits).sum(), labels)
    density = np.exp(-0.5 * ((labels.detach().numpy() - 0.5) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    torch.testing.assert_close(
        cdul_label_step(latent, logits, sigma), latent - torch.from_numpy(density) * gradient
    )


def test_the_label_step_by_hand() -> None:
    # psi(0.5) = 0.39894 of the way from 0 to 2; nothing to do where label and prediction agree.
    moved = cdul_label_step(f64([0.0, 1.0]), f64([2.0, 1.0]))
    torch.testing.assert_close(moved, f64([0.7978845608, 1.0]))


def test_repeated_label_steps_arrive_at_the_prediction() -> None:
    latent, logits = random_batch(4)[0], random_batch(5)[0]
    before = bernoulli_kl(latent.sigmoid(), logits)
    for _ in range(60):
        latent = cdul_label_step(latent, logits)
        after = bernoulli_kl(latent.sigmoid(), logits)
        assert (after <= before + 1e-12).all()
        before = after
    torch.testing.assert_close(latent, logits, rtol=0, atol=1e-6)

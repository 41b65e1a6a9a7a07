from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cliplet.errors import UsageError
from cliplet.train.cluster_losses import (
    LOG_OF_NOTHING,
    LossKind,
    LossSettings,
    combined,
    log_sum_exp,
    mlc,
    mlcd,
    unicom,
)

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "mlcd": mlcd,
    "mlc": mlc,
    "unicom": lambda p, n: unicom(p[:, 0].tanh(), n.tanh(), scale=4.0),
}


def similarities(images: int = 4, positives: int = 3, negatives: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(images, positives, generator=generator, dtype=torch.float64),
        torch.randn(images, negatives, generator=generator, dtype=torch.float64),
    )


def f64(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_mlcd_by_hand() -> None:
    # e^{-s} of the positives: 1/2 and 1/4; e^{s} of the negatives: 3 and 1.
    found = mlcd(f64(math.log(2), math.log(4)), f64(math.log(3), 0.0))
    assert found.tolist() == pytest.approx([math.log(1.75) + math.log(5)])


def test_mlc_by_hand() -> None:
    found = mlc(f64(math.log(2), math.log(4)), f64(math.log(3), 0.0))
    assert found.tolist() == pytest.approx([math.log(1 + 0.75 * 4)])


def test_unicom_by_hand() -> None:
    # 60 degrees and 30 more make a cosine of 0, hence e^0 against e^{2 * 0.5} and e^{-2}.
    found = unicom(f64(0.5)[0], f64(0.5, -1.0), scale=2.0, angle=math.pi / 6)
    assert found.tolist() == pytest.approx([math.log(1 + math.e + math.exp(-2))])
    shifted = unicom(f64(0.5)[0], f64(0.5, -1.0), scale=2.0, angle=0.0, margin=0.25)
    assert shifted.tolist() == pytest.approx([math.log(math.exp(0.5) + math.e + math.exp(-2)) - 0.5])


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=6), st.lists(st.floats(-30, 30), min_size=1, max_size=6)
)
def test_numpy_says_the_same(positive: list[float], negative: list[float]) -> None:
    """Equation 5 as its four sums, equation 4 pair by pair: no log-sum-exp in either."""
    pulls, pushes = np.exp(-np.array(positive)), np.exp(np.array(negative))
    pairs = sum(float(push * pull) for push in pushes for pull in pulls)
    assert mlcd(f64(*positive), f64(*negative)).item() == pytest.approx(
        np.log1p(pairs + pushes.sum() + pulls.sum()), rel=1e-10
    )
    assert mlc(f64(*positive), f64(*negative)).item() == pytest.approx(np.log1p(pairs), rel=1e-10)


def test_unicom_is_the_cross_entropy_of_a_margin_softmax() -> None:
    positive, negative = ((s / 2).tanh() for s in similarities(positives=1))
    logits = 8 * torch.cat([torch.cos(positive.arccos() + 0.3) - 0.1, negative], dim=1)
    targets = torch.zeros(len(logits), dtype=torch.int64)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    found = unicom(positive[:, 0], negative, scale=8, angle=0.3, margin=0.1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_those_of_finite_differences(loss: Loss) -> None:
    positive, negative = (s.requires_grad_() for s in similarities())
    assert torch.autograd.gradcheck(loss, (positive, negative))


def test_each_side_of_mlcd_is_a_softmax_with_a_logit_of_0() -> None:
    positive, negative = (s.requires_grad_() for s in similarities())
    mlcd(positive, negative).sum().backward()
    zero = torch.zeros(len(positive), 1)
    torch.testing.assert_close(positive.grad, -torch.cat([zero, -positive], 1).softmax(1)[:, 1:])
    torch.testing.assert_close(negative.grad, torch.cat([zero, negative], 1).softmax(1)[:, 1:])


@pytest.mark.parametrize("shift", [-2.0, 0.7, 30.0])
def test_only_gaps_count_in_mlc_and_not_in_mlcd(shift: float) -> None:
    positive, negative = similarities()
    torch.testing.assert_close(mlc(positive + shift, negative + shift), mlc(positive, negative))
    assert not torch.isclose(mlcd(positive + shift, negative + shift), mlcd(positive, negative)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [mlcd, mlc])
def test_extreme_similarities_give_finite_losses_and_gradients(loss: Loss, dtype: torch.dtype) -> None:
    positive = torch.tensor([[3e4, 3e4], [-3e4, 1.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    negative = torch.tensor([[3e4, -3e4], [3e4, 3e4], [-3e4, -3e4]], dtype=dtype, requires_grad=True)
    value = loss(positive, negative)
    value.sum().backward()
    assert positive.grad is not None and negative.grad is not None
    assert all(torch.isfinite(t).all() for t in (value, positive.grad, negative.grad))
    assert value[1].item() == pytest.approx(6e4, rel=1e-4)


@pytest.mark.parametrize("loss", [mlcd, mlc])
def test_absent_similarities_are_no_terms(loss: Loss) -> None:
    positive, negative = (s.requires_grad_() for s in similarities(images=1))
    more = (
        torch.cat([positive, f64(math.inf)], 1),
        torch.cat([f64(-math.inf), negative], 1),
    )
    torch.testing.assert_close(loss(*more), loss(positive, negative))
    nothing = (f64(math.inf).requires_grad_(), f64(-math.inf).requires_grad_())
    value = loss(*nothing)
    value.sum().backward()
    assert value.item() == 0
    assert [float(t.grad.item()) for t in nothing if t.grad is not None] == [0, 0]


@pytest.mark.parametrize("kind", ["mlcd", "mlc", "unicom"])
def test_a_side_without_terms_costs_and_pulls_nothing(kind: LossKind) -> None:
    some = torch.tensor([2.0], requires_grad=True)
    none = log_sum_exp(torch.zeros(1, 0))
    assert none.item() == pytest.approx(LOG_OF_NOTHING)
    value = combined(kind, none, some)
    value.sum().backward()
    assert some.grad is not None
    expected = (math.log1p(math.exp(2)), 1 / (1 + math.exp(-2))) if kind == "mlcd" else (0, 0)
    assert (value.item(), some.grad.item()) == pytest.approx(expected)


def test_settings_say_how_a_cosine_becomes_a_similarity() -> None:
    settings = LossSettings(scale=10, margin=0.1, threshold=0.2, angle=0.3)
    cosines = torch.tensor([-0.9, 0.0, 0.5, 0.999], dtype=torch.float64)
    expected = 10 * (torch.cos(cosines.arccos() + 0.3) - 0.3)
    torch.testing.assert_close(settings.positive(cosines), expected)
    torch.testing.assert_close(settings.negative(cosines), 10 * cosines - 2)
    plain = LossSettings()
    assert plain.positive(cosines).equal(plain.negative(cosines))


def test_positive_similarity_rises_with_the_cosine_from_end_to_end() -> None:
    """Also where the angle plus the margin's exceeds 180 degrees, and with slopes that are finite."""
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
    similarity = LossSettings(kind="unicom", angle=0.5).positive(cosines)
    similarity.sum().backward()
    assert (similarity.diff() > 0).all()
    assert cosines.grad is not None
    assert torch.isfinite(cosines.grad).all() and (cosines.grad > 0).all()


def test_an_image_has_one_positive_in_unicom_and_those_of_the_settings_elsewhere() -> None:
    assert [LossSettings(kind=k).used_positives for k in ("mlcd", "mlc", "unicom")] == [8, 8, 1]


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"kind": "arcface"}, "kind arcface"),
        ({"scale": 0}, "scale 0"),
        ({"scale": math.nan}, "scale nan"),
        ({"margin": -0.1}, "margin -0.1"),
        ({"angle": 2}, "angle 2"),
        ({"threshold": 1}, "threshold 1"),
        ({"negative_rate": 0}, "negative_rate 0"),
        ({"negative_rate": 1.5}, "negative_rate 1.5"),
        ({"positives": 0}, "positives 0"),
        ({"kind": "mlc", "threshold": 0.1}, "threshold 0.1 with the loss mlc"),
        ({"kind": "unicom", "threshold": 0.1}, "threshold 0.1 with the loss unicom"),
    ],
)
def test_settings_of_no_loss_are_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LossSettings(**given_)


def test_weights_at_the_start_are_those_that_the_defaults_were_chosen_by() -> None:
    """Where all cosines are 0, MLCD pulls with L / (1 + L) and pushes with R / (1 + R); a threshold stops the push."""

    def weights(settings: LossSettings) -> tuple[float, float]:
        positive, negative = torch.zeros(1, 8, requires_grad=True), torch.zeros(1, 100, requires_grad=True)
        mlcd(settings.positive(positive), settings.negative(negative)).sum().backward()
        assert positive.grad is not None and negative.grad is not None
        return -positive.grad.sum().item() / settings.scale, negative.grad.sum().item() / settings.scale

    assert weights(LossSettings()) == pytest.approx((8 / 9, 100 / 101))
    assert weights(LossSettings(threshold=0.36))[1] == pytest.approx(0.001, rel=0.05)

"""Logistic regression of many classes at once, by L-BFGS: the solver of linear probes.

Legend: N images, C classes, D width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

HISTORY = 20  # pairs of steps from which L-BFGS guesses the curvature
# Products of an evaluation; below, one thread is nearly as fast, and far faster on a busy machine.
FEW_PRODUCTS = 100_000_000
NO_PROGRESS = 1e-14  # of the mean loss in a step: what is left is rounding


@dataclass(frozen=True, eq=False)
class Fit:
    """Logistic regressions of all classes.

    Attributes:
        theta: float64 [D + 1, C], the intercepts in the last row.
        converged: whether the gradient is as small as it was to be.
    """

    theta: Tensor
    converged: bool


def fit_logistic(
    features_ND: Tensor,
    truth_NC: Tensor,
    strength: float,
    *,
    one_label: bool = False,
    iterations: int = 1000,
    tolerance: float = 1e-4,
    start: Tensor | None = None,
) -> Fit:
    """The minimum of sum over images of the loss + strength / 2 * |weights|^2; intercepts are not penalised.

    That is scikit-learn's `LogisticRegression` with C = 1 / strength, solver lbfgs.

    Args:
        features_ND: float64.
        truth_NC: float64, 0 or 1.
        one_label: a softmax over the classes (multinomial) instead of a sigmoid of each (one-vs-rest).
        iterations: of L-BFGS at most.
        tolerance: where no component of the gradient of the mean loss is larger, the fit has converged; parameters
            are measured so that no curvature of that loss is above 1.
        start: theta to begin at.
    """
    count, width = features_ND.shape
    # Neither changes the optimum, and both save iterations: the intercept takes up a shift of the features, and
    # no parameter's curvature is above 1 in the units of `scaled` (a sigmoid's is at most 1/4).
    shift_D = features_ND.mean(0)
    centred_ND = features_ND - shift_D
    unit_D = (strength / count + centred_ND.square().mean(0) / 4).clamp(min=1e-12).rsqrt().unsqueeze(1)
    scaled = torch.zeros(width + 1, truth_NC.shape[1], dtype=torch.float64, device=features_ND.device)
    if start is not None:
        scaled[:-1] = start[:-1] / unit_D
        scaled[-1] = (start[-1] + shift_D @ start[:-1]) / 2
    scaled.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [scaled],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=NO_PROGRESS,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    loss_of = functional.cross_entropy if one_label else functional.binary_cross_entropy_with_logits

    def objective() -> Tensor:
        solver.zero_grad()
        weights_DC = unit_D * scaled[:-1]
        logits_NC = torch.addmm(2 * scaled[-1], centred_ND, weights_DC)
        loss = loss_of(logits_NC, truth_NC, reduction="sum") + strength / 2 * weights_DC.square().sum()
        mean = loss / count
        mean.backward()
        return mean

    with _threads_worth(features_ND.shape[0] * width * truth_NC.shape[1]):
        solver.step(objective)
        objective()
    assert scaled.grad is not None
    weights_DC = unit_D * scaled.detach()[:-1]
    theta = torch.cat([weights_DC, (2 * scaled.detach()[-1] - shift_D @ weights_DC).unsqueeze(0)])
    return Fit(theta, bool(scaled.grad.abs().max() <= tolerance))


@contextmanager
def _threads_worth(products: int) -> Iterator[None]:
    """Context in which torch uses one thread for so few products: waiting for others takes longer than the work."""
    before = torch.get_num_threads()
    if products < FEW_PRODUCTS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""A linear probe: logistic regression on features that do not learn, its strength swept as the CLIP papers sweep it.

    found = linear_probe(features_ND, truth_NC, LinearSettings(seed=0))
    scores_MC = found.scores(other_features_MD)

CLIP (Radford et al. 2021, appendix A.3) fits with L-BFGS and at most 1,000 iterations; the L2 strength lambda lies
between 1e-6 and 1e6, on a grid of 96 logarithmic steps, and is found on images that the fit does not see: 1e-6, 1e-4,
… 1e6 first, then the interval around the best is halved until steps are an eighth of a decade. The probe is then
fitted to all images. Here as there, lambda weighs against the sum over the images, whatever their number.
Three things differ here. The images that the sweep measures on are always a random part of the training split, also
where a data set brings a part of its own for that. CLIP and MLCD probe what a tower gives before its projection into
the space of the text, and not normalised; these features are what the embedder gives, usually after it. And
scikit-learn's solver is replaced by torch's, which fits all classes at once; the optimum is the same.

Legend: N, M images, C classes, D width of the features, K directions in which they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cliplet.errors import DataError, UsageError
from cliplet.metrics import average_precisions

from .probe_logistic import Fit, fit_logistic

SCALINGS = ("standardised", "unit")
STEPS_PER_DECADE = 8
LOWEST_DECADE, HIGHEST_DECADE = -6, 6
STEPS = STEPS_PER_DECADE * (HIGHEST_DECADE - LOWEST_DECADE)
COARSE = 2 * STEPS_PER_DECADE


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How a linear probe is fitted.

    Attributes:
        features: `standardised`: every column has mean 0 and deviation 1 on the images that are fitted to.
            `unit`: rows of length 1, as they are.
        held_out: the share of the training images that the sweep measures on.
        iterations, tolerance: of L-BFGS; see `fit_logistic`.
        seed: of the choice of held-out images.
        device: of torch.
    """

    features: str = SCALINGS[0]
    held_out: float = 0.2
    iterations: int = 1000
    tolerance: float = 1e-4
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.features not in SCALINGS:
            raise UsageError(f"features {self.features!r}", f"one of {', '.join(SCALINGS)}")
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out {self.held_out}", "a share between 0 and 1", "--held-out 0.2")


def strength_of(step: int) -> float:
    """L2 strength of a step of the sweep: 1e-6 at 0, 1e6 at the last."""
    return float(10 ** (LOWEST_DECADE + step / STEPS_PER_DECADE))


def sweep(measure: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """The step where `measure` is highest, and all that was measured, by step.

    The parametric binary search of CLIP, from the strongest step on: seven steps two decades apart, then twice as fine around the best until
    neighbours have been compared. It finds the highest of all steps wherever there is one peak. Of equals it takes
    the middle one: at the edge of a plateau, the fit to all images may fall off it.
    """
    found: dict[int, float] = {}

    def best_of(steps: range | tuple[int, ...]) -> int:
        for step in steps:
            if 0 <= step <= STEPS and step not in found:
                found[step] = measure(step)
        highest = max(round(value, 9) for value in found.values())
        tied = sorted(step for step, value in found.items() if round(value, 9) == highest)
        return tied[len(tied) // 2]

    best = best_of(range(STEPS, -1, -COARSE))
    distance = COARSE // 2
    while distance:
        best = best_of((best - distance, best + distance))
        distance //= 2
    return best, dict(sorted(found.items()))


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe.

    Attributes:
        fit: of the classes in `learned_C`.
        learned_C: bool [C], classes with both positives and negatives to learn from.
        mean_D, deviation_D: what features are shifted and divided by.
        one_label: whether it is multinomial.
        strength: lambda that the sweep chose.
        swept: lambda to what was measured with it on the held-out images, 0..1.
        held_out: number of these.
        unconverged: fits of the sweep, and the last one, that ended before they had converged.
    """

    fit: Fit
    learned_C: np.ndarray
    mean_D: Tensor
    deviation_D: Tensor
    one_label: bool
    strength: float
    swept: dict[float, float] = field(default_factory=dict)
    held_out: int = 0
    unconverged: int = 0

    def scores(self, features_MD: np.ndarray) -> np.ndarray:
        """Log-odds float64 [M, C], or log-probabilities of a multinomial probe; -inf for classes not learned."""
        theta = self.fit.theta
        scaled_MD = (_tensor(features_MD, theta.device) - self.mean_D) / self.deviation_D
        logits = torch.addmm(theta[-1], scaled_MD, theta[:-1])
        found_MC = np.full((len(features_MD), len(self.learned_C)), -np.inf)
        found_MC[:, self.learned_C] = (logits.log_softmax(1) if self.one_label else logits).cpu().numpy()
        return found_MC


def linear_probe(features_ND: np.ndarray, truth_NC: np.ndarray, settings: LinearSettings) -> LinearProbe:
    """The probe with the strength that did best on held-out images, fitted to all of them.

    Best is the highest mean of the all-points average precisions. Where every image has exactly one label, the
    probe is multinomial, as in CLIP's evaluation, and best is the highest top-1 accuracy.

    Args:
        features_ND: float, unit rows.
        truth_NC: bool.

    Raises:
        DataError: no class has positives and negatives on both sides of the split.
    """
    one_label = bool((truth_NC.sum(1) == 1).all()) and truth_NC.shape[1] > 1
    shuffled = np.random.default_rng(settings.seed).permutation(len(features_ND))
    cut = min(max(round(settings.held_out * len(shuffled)), 1), len(shuffled) - 1)
    held, fitted = np.sort(shuffled[:cut]), np.sort(shuffled[cut:])
    judged_C = is_learnable(truth_NC[fitted]) & truth_NC[held].any(0)
    if not judged_C.any():
        raise DataError(
            f"none of {truth_NC.shape[1]} classes can be judged on {len(held)} held-out images of {len(shuffled)}",
            "a class with positives on both sides, and images without it",
            "label more images, or change the seed or the held-out share",
        )
    trial = _Fitter(features_ND[fitted], truth_NC[fitted], one_label, settings)

    def measure(step: int) -> float:
        scores_MC = trial.probe(strength_of(step)).scores(features_ND[held])
        if one_label:
            return float(truth_NC[held][np.arange(len(held)), scores_MC.argmax(1)].mean())
        return float(average_precisions(scores_MC[:, judged_C], truth_NC[held][:, judged_C]).mean())

    best, found = sweep(measure)
    final = _Fitter(features_ND, truth_NC, one_label, settings)
    return replace(
        final.probe(strength_of(best)),
        swept={strength_of(step): value for step, value in found.items()},
        held_out=len(held),
        unconverged=trial.unconverged + final.unconverged,
    )


def is_learnable(truth_NC: np.ndarray) -> np.ndarray:
    """Which classes have both positives and negatives, bool [C]."""
    return np.asarray(truth_NC.any(0) & ~truth_NC.all(0))


class _Fitter:
    """Fits with several strengths on the same images, each starting where the last one ended.

    They run along the principal axes of the features. Turning changes neither the loss nor the penalty, so the optimum
    is the same; but each axis has a curvature of its own, by which the solver then measures it, and correlated features
    cost it hundreds of iterations less.
    """

    def __init__(
        self, features_ND: np.ndarray, truth_NC: np.ndarray, one_label: bool, settings: LinearSettings
    ) -> None:
        device = torch.device(settings.device)
        features = _tensor(features_ND, device)
        self.mean_D = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
        self.deviation_D = torch.ones_like(self.mean_D)
        if settings.features == "standardised":
            self.mean_D = features.mean(0)
            deviation_D = features.std(0, correction=0)
            # A column that is the same everywhere says nothing; rounding leaves it a deviation near 0.
            self.deviation_D = torch.where(deviation_D > 1e-9, deviation_D, self.deviation_D)
        scaled_ND = (features - self.mean_D) / self.deviation_D
        self.basis_DK = _principal_axes(scaled_ND)
        self.features_NK = scaled_ND @ self.basis_DK
        self.learned_C = is_learnable(truth_NC)
        self.truth_NC = _tensor(truth_NC[:, self.learned_C], device)
        self.one_label, self.settings = one_label, settings
        self.unconverged = 0
        self._last: Tensor | None = None

    def probe(self, strength: float) -> LinearProbe:
        fit = fit_logistic(
            self.features_NK,
            self.truth_NC,
            strength,
            one_label=self.one_label,
            iterations=self.settings.iterations,
            tolerance=self.settings.tolerance,
            start=self._last,
        )
        self._last = fit.theta
        self.unconverged += not fit.converged
        theta = torch.cat([self.basis_DK @ fit.theta[:-1], fit.theta[-1:]])
        fit = Fit(theta, fit.converged)
        return LinearProbe(fit, self.learned_C, self.mean_D, self.deviation_D, self.one_label, strength)


def _principal_axes(features_ND: Tensor) -> Tensor:
    """Directions in which features differ, orthonormal columns float64 [D, K]; the others can hold no weight."""
    centred_ND = features_ND - features_ND.mean(0)
    variance_D, axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(features_ND))
    return axes_DD[:, variance_D > 1e-12 * variance_D[-1]]


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float64)).to(device)

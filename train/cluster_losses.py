"""The losses that discriminate clusters: MLCD, plain multi-label contrast (MLC), UNICOM's margin softmax.

All three are made of two numbers an image, each a log-sum-exp, so whoever holds only some of the clusters can
compute its part of either, and `combined` makes the loss of the two:

    P = log sum_i e^{-s_i} over the positives i        Q = log sum_j e^{s_j} over the negatives j
    MLCD: softplus(P) + softplus(Q)                    MLC, UNICOM: softplus(P + Q)

softplus(x) = log(1 + e^x) is where the constant 1 of the equations, a logit of 0, comes in; no exponential is ever
taken of anything but a difference from a maximum.

Equations are those of An et al. (2024), "Multi-label Cluster Discrimination for Visual Representation Learning".

Legend: B images, L positives an image, R negatives. s is a scaled similarity, `LossSettings` says how it is made
of a cosine. A positive that an image lacks is +inf, a negative that it lacks -inf: their terms are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cliplet.errors import UsageError

LossKind = Literal["mlcd", "mlc", "unicom"]

# Stands for the logarithm of 0. Finite, so that sums without a term have gradients of 0 instead of NaN.
LOG_OF_NOTHING = -1e30


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised. `mlcd_recipe` has the values for a kind, with smaller scales for short runs.

    Similarities of cosines, theta being the angle between an image and a centre:

        positive: s_i = scale * (cos(theta_i + angle) - margin - threshold)
        negative: s_j = scale * (cos(theta_j) - threshold)

    The paper speaks of a margin and prints plain s: it gives neither scale nor margin, so these are ours. With plain
    cosines (scale 1) the loss is degenerate: R negatives weigh at least R e^-1 against the constant 1, whatever the
    features, and all of them alike. The loss can only tell positives from negatives where e^(scale * gap) exceeds the
    number of pairs R * L that it outweighs; `scale` 32, which UNICOM's code fine-tunes with, does so from a gap of
    0.5 in cosine up to R * L = e^16, nine million. At the start, where cosines are about 0, the two sides of MLCD
    pull with weights L / (1 + L) and R / (1 + R) for `threshold` 0, both near 1 for 8 positives and any R from ten
    on. A threshold t turns the second into x / (1 + x) of x = R e^(-scale * t), 0.001 for t = 0.36 and a hundred
    negatives: nothing pushes until everything has been pulled together. Hence a threshold of 0, the paper's bound,
    and no margin, the paper's own equation, are the defaults.

    Attributes:
        kind: `mlcd` is equation 5, `mlc` equation 4, `unicom` a softmax over the nearest centre and the negatives.
        scale: of cosines. margin: what a positive's cosine loses (CosFace). angle: radians that are added to a
            positive's angle (ArcFace). threshold: the cosine where MLCD parts positives from negatives (its zero
            bound); it cancels in the other two, which know only the gap, and is refused there.
        negative_rate: chance of a negative to be drawn (r). positives: nearest clusters of an image that count as
            positives (l); `unicom` has one whatever it says here, see `used_positives`.

    Raises:
        UsageError: a value that no loss has.
    """

    kind: LossKind = "mlcd"
    scale: float = 32.0
    margin: float = 0.0
    angle: float = 0.0
    threshold: float = 0.0
    negative_rate: float = 0.1
    positives: int = 8

    def __post_init__(self) -> None:
        checks = {
            "kind": (self.kind in get_args(LossKind), " or ".join(get_args(LossKind))),
            "scale": (0 < self.scale < math.inf, "a number above 0"),
            "margin": (0 <= self.margin < 2, "a difference of cosines from 0 to 2"),
            "angle": (0 <= self.angle < math.pi / 2, "radians from 0 to pi / 2"),
            "threshold": (-1 < self.threshold < 1, "a cosine between -1 and 1"),
            "negative_rate": (0 < self.negative_rate <= 1, "a share above 0, at most 1"),
            "positives": (self.positives >= 1, "1 or more"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise UsageError(f"{name} {getattr(self, name)} of a cluster loss", expected)
        if self.threshold and self.kind != "mlcd":
            raise UsageError(
                f"threshold {self.threshold} with the loss {self.kind}",
                "0, for only the gap between positives and negatives counts there",
                "--loss mlcd, or no threshold",
            )

    @property
    def used_positives(self) -> int:
        """How many of an image's clusters, nearest first, are its positives."""
        return 1 if self.kind == "unicom" else self.positives

    def positive(self, cosines: Tensor) -> Tensor:
        """s_i of cosines with positive centres, of any shape."""
        return self.scale * (_turned(cosines, self.angle) - self.margin - self.threshold)

    def negative(self, cosines: Tensor) -> Tensor:
        """s_j of cosines with negative centres, of any shape."""
        return self.scale * (cosines - self.threshold)


def mlcd(positive_BL: Tensor, negative_BR: Tensor) -> Tensor:
    """Multi-label cluster discrimination [B], of scaled similarities: equation 5,

        log(1 + sum_i e^{-s_i}) + log(1 + sum_j e^{s_j})
      = log(1 + sum_j e^{s_j} sum_i e^{-s_i} + sum_j e^{s_j} + sum_i e^{-s_i}).

    Positives are pulled above 0 and negatives pushed below it, each side by itself: a softmax with a logit of 0.
    The form is that of ZLPR (Su et al. 2022).
    """
    return combined("mlcd", log_sum_exp(-positive_BL), log_sum_exp(negative_BR))


def mlc(positive_BL: Tensor, negative_BR: Tensor) -> Tensor:
    """Multi-label contrast [B], of scaled similarities: equation 4, log(1 + sum_j e^{s_j} sum_i e^{-s_i}).

    Circle loss's unified form (Sun et al. 2020): only the gaps s_j - s_i count, not where they lie.
    """
    return combined("mlc", log_sum_exp(-positive_BL), log_sum_exp(negative_BR))


def unicom(
    positive_B: Tensor, negative_BR: Tensor, *, scale: float = 32.0, angle: float = 0.3, margin: float = 0.0
) -> Tensor:
    """Margin softmax [B] of one positive, of cosines:

        -log(e^{s} / (e^{s} + sum_j e^{scale * cos_j})),    s = scale * (cos(theta + angle) - margin).

    `angle` alone is ArcFace (Deng et al. 2019), `margin` alone CosFace (Wang et al. 2018). UNICOM's (An et al. 2023)
    other part, a random choice of the feature's dimensions a step, is not in it.
    """
    settings = LossSettings(kind="unicom", scale=scale, angle=angle, margin=margin)
    positive_BL = settings.positive(positive_B)[:, None]
    return combined("unicom", log_sum_exp(-positive_BL), log_sum_exp(settings.negative(negative_BR)))


def combined(kind: LossKind, positive_B: Tensor, negative_B: Tensor) -> Tensor:
    """The loss [B] of log sum_i e^{-s_i} and log sum_j e^{s_j}."""
    if kind == "mlcd":
        return _softplus(positive_B) + _softplus(negative_B)
    return _softplus(positive_B + negative_B)


def log_sum_exp(logits_BR: Tensor) -> Tensor:
    """log sum_r e^{z_r} [B]; a term of -inf is none, and a row without any is `LOG_OF_NOTHING`."""
    if logits_BR.shape[1] == 0:
        return logits_BR.new_full((len(logits_BR),), LOG_OF_NOTHING)
    return logits_BR.clamp(min=LOG_OF_NOTHING).logsumexp(1)


def _softplus(x: Tensor) -> Tensor:
    # By default torch takes x for it from 20 on, which costs float64 its last digits.
    return functional.softplus(x, threshold=40)


def _turned(cosines: Tensor, angle: float) -> Tensor:
    """cos(theta + angle), going on downwards where theta + angle exceeds pi: ArcFace's own bound."""
    if angle == 0:
        return cosines
    # The sine's slope is infinite at the ends; a cosine of 1 is rounded there often enough.
    sines = (1 - cosines.square()).clamp(min=1e-6).sqrt()
    turned = cosines * math.cos(angle) - sines * math.sin(angle)
    return torch.where(cosines > -math.cos(angle), turned, cosines - math.sin(angle) * angle)

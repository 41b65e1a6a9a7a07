"""The losses of every training method, and CDUL's update of its labels.

Unless it says otherwise, a loss is the matrix [B, C] whose mean over images and classes is minimised, so that a
caller can weigh images, mask entries or name the image of a NaN before it takes the mean. All take logits and
stay finite for any finite logit: log p is -softplus(-z), never the logarithm of a sigmoid.

Legend: B images of a batch, C classes, N images of a data set; z logits, p = sigmoid(z).
`observed_BC` is 1 for an observed positive and 0 for unknown; `known_BC` is 1, -1 (negative) or 0 (unknown).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cliplet.errors import UsageError

# Durand et al.'s g(q) = alpha q^gamma + beta with gamma = 1, from g(1) = 1 (all labels known: plain BCE) and
# g(0.1) = 5 (a tenth known: weigh what is known five times as much).
DURAND_ALPHA = -40 / 9
DURAND_BETA = 49 / 9

LargeLossScheme = Literal["LL-R", "LL-Ct", "LL-Cp"]


def bce(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Binary cross-entropy [B, C], -y log p - (1 - y) log(1 - p), of targets y in 0..1.

    With `observed_BC` as targets this is Assume Negative (AN).
    """
    return functional.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none")


def smoothed(targets_BC: Tensor, epsilon: float = 0.1) -> Tensor:
    """Targets [B, C] with 1 turned into 1 - epsilon and 0 into epsilon, and in proportion between.

    Label smoothing of Szegedy et al. (2016) as single-positive learning uses it (Cole et al. 2021): in full, not
    halved. BCE-LS smooths full labels, AN-LS observed ones.
    """
    return targets_BC * (1 - 2 * epsilon) + epsilon


def wan(logits_BC: Tensor, observed_BC: Tensor) -> Tensor:
    """Weak Assume Negative [B, C]: `bce` with weight 1 / (C - 1) on the unknown entries.

    One observed positive then weighs as much as all unknown entries of its image (Mac Aodha et al. 2019, in the
    form of Cole et al. 2021).

    Raises:
        UsageError: there is a single class.
    """
    num_classes = logits_BC.shape[1]
    if num_classes < 2:
        raise UsageError("WAN with one class", "two classes or more", "add a class, or choose another method")
    loss_BC = bce(logits_BC, observed_BC)
    return torch.where(observed_BC > 0, loss_BC, loss_BC / (num_classes - 1))


def expected_positives(logits_BC: Tensor, expected_count: float) -> Tensor:
    """Scalar ((mean over images of sum over classes of p) - k)^2 / C^2, k positives being expected an image.

    The regulariser of EPR and ROLE (Cole et al. 2021). It knows the batch's mean alone, hence no matrix.
    """
    mean_count = logits_BC.sigmoid().sum(dim=1).mean()
    return ((mean_count - expected_count) / logits_BC.shape[1]) ** 2


def epr(logits_BC: Tensor, observed_BC: Tensor, expected_count: float) -> Tensor:
    """Scalar of Expected Positive Regularisation: mean over B*C of -log p of positives, + `expected_positives`.

    Cole et al. 2021. Their public code has log(p + 1e-5) where this has log p.
    """
    return _positives(logits_BC, observed_BC).mean() + expected_positives(logits_BC, expected_count)


def role(logits_BC: Tensor, label_logits_BC: Tensor, observed_BC: Tensor, expected_count: float) -> Tensor:
    """Scalar of Regularised Online Label Estimation: half the classifier's loss plus half the label table's.

    Each of the two is `epr` plus the mean `bce` against the other's probabilities, through which no gradient
    flows (Cole et al. 2021).

    Args:
        label_logits_BC: rows of the label table for the images of the batch, before the sigmoid.
    """
    classifier = _role_half(logits_BC, label_logits_BC, observed_BC, expected_count)
    labels = _role_half(label_logits_BC, logits_BC, observed_BC, expected_count)
    return 0.5 * (classifier + labels)


def _role_half(logits_BC: Tensor, partner_BC: Tensor, observed_BC: Tensor, expected_count: float) -> Tensor:
    return epr(logits_BC, observed_BC, expected_count) + consistency(logits_BC, partner_BC).mean()


def partial_bce(logits_BC: Tensor, known_BC: Tensor) -> Tensor:
    """Partial BCE [B, C]: g(q) `bce` on known entries, 0 on unknown ones; q is the image's share of known entries.

    Durand et al. 2019, whose loss of an image, g(q) / C times the sum over known classes, is the mean of a row.
    """
    is_known_BC = known_BC != 0
    share_B1 = is_known_BC.float().mean(dim=1, keepdim=True)
    weight_B1 = DURAND_ALPHA * share_B1 + DURAND_BETA
    return torch.where(is_known_BC, weight_B1 * bce(logits_BC, (known_BC > 0).to(logits_BC)), 0.0)


def large_loss_share(epoch: int, delta_percent: float, scheme: LargeLossScheme) -> float:
    """Share of a batch's entries that `large_loss` changes in `epoch`, counted from 1: none in the first epoch.

    From the second on it grows by `delta_percent` an epoch, up to all of them; LL-Cp, whose changes stay, takes
    `delta_percent` of them every time (Kim et al. 2022).
    """
    steps = min(epoch - 1, 1) if scheme == "LL-Cp" else epoch - 1
    return min(steps * delta_percent / 100, 1.0)


def large_loss(
    logits_BC: Tensor, observed_BC: Tensor, share: float, scheme: LargeLossScheme
) -> tuple[Tensor, Tensor]:
    """Large-loss modification: the loss [B, C], and the mask bool [B, C] of the entries that were changed.

    Of Assume Negative's losses the ceil(B C share) largest among the unknown entries of the batch, which are
    likely to be positives that nobody observed, are rejected (LL-R: 0) or corrected (LL-Ct, LL-Cp: the loss of a
    positive). For LL-Cp the caller sets the masked labels to 1 for good. Kim et al. 2022.

    Exactly that many entries are changed, or all unknown ones if they are fewer. The public code also changes
    ties with the last of them, and keeps for good only entries above it: with one entry a batch, none.

    Raises:
        UsageError: `scheme` is not one of the three.
    """
    if scheme not in get_args(LargeLossScheme):
        raise UsageError(f"large-loss scheme {scheme!r}", f"one of {', '.join(get_args(LargeLossScheme))}")
    loss_BC = bce(logits_BC, observed_BC)
    mask_BC = _largest(loss_BC, observed_BC <= 0, share)
    changed_BC = functional.softplus(-logits_BC) if scheme != "LL-R" else torch.zeros_like(loss_BC)
    return torch.where(mask_BC, changed_BC, loss_BC), mask_BC


def _largest(values_BC: Tensor, eligible_BC: Tensor, share: float) -> Tensor:
    """Mask of the ceil(B C share) largest eligible values."""
    # Rounded first: 100 * 0.07 is 7.000000000000001, which would give 8.
    wanted = math.ceil(round(values_BC.numel() * share, 6))
    count = min(wanted, int(eligible_BC.sum()))
    ranked = torch.where(eligible_BC, values_BC, -math.inf).flatten()
    mask = torch.zeros_like(ranked, dtype=torch.bool)
    mask[ranked.topk(count).indices] = True
    return mask.view_as(values_BC)


def asymmetric(
    logits_BC: Tensor,
    targets_BC: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    clip: float = 0.05,
) -> Tensor:
    """Asymmetric loss (ASL) [B, C], which its paper sums: -y (1 - p)^g+ log p - (1 - y) pm^g- log(1 - pm).

    pm = max(p - clip, 0), so negatives with p <= clip cost nothing (Ridnik et al. 2021). The gradient is the
    formula's; the public training script takes the powers for constants instead.
    """
    # Powers below 1 have no finite gradient at 0.
    tiny = torch.finfo(logits_BC.dtype).tiny
    absent_BC = (-logits_BC).sigmoid()
    shifted_BC = (logits_BC.sigmoid() - clip).clamp(min=tiny)
    # log(1 - pm) = log(min(1 - p + clip, 1)), by logarithms so that a clip of 0 stays finite too.
    log_clip = logits_BC.new_tensor(clip).log()
    log_absent_BC = torch.logaddexp(functional.logsigmoid(-logits_BC), log_clip).clamp(max=0)
    positive_BC = absent_BC.clamp(min=tiny) ** gamma_positive * functional.softplus(-logits_BC)
    negative_BC = -(shifted_BC**gamma_negative) * log_absent_BC
    return targets_BC * positive_BC + (1 - targets_BC) * negative_BC


def consistency(strong_logits_BC: Tensor, plain_logits_BC: Tensor) -> Tensor:
    """CCD's consistency loss [B, C]: `bce` of the strongly augmented view against the plain view's probabilities.

    No gradient flows through the plain view (Kim & Shim 2025).
    """
    return bce(strong_logits_BC, plain_logits_BC.detach().sigmoid())


def sample_weights(flag_B: Tensor, loss_coeff: float) -> Tensor:
    """CCD's weight [B] of each image's BCE, clip(flag + loss_coeff, 0, 1), flag 1 for a low-entropy image.

    CCD's published command has `loss_coeff` 1, with which every weight is 1.
    """
    return (flag_B + loss_coeff).clamp(0, 1)


def bernoulli_kl(targets_BC: Tensor, logits_BC: Tensor) -> Tensor:
    """KL(target || prediction) [B, C] of the Bernoulli distributions of each class; 0 where they agree.

    CDUL's loss for a classifier with sigmoids: y log(y / p) + (1 - y) log((1 - y) / (1 - p)), with 0 log 0 = 0.
    """
    negative_entropy_BC = torch.xlogy(targets_BC, targets_BC) + torch.xlogy(1 - targets_BC, 1 - targets_BC)
    return negative_entropy_BC + bce(logits_BC, targets_BC)


def cdul_label_step(latent_NC: Tensor, logits_NC: Tensor, sigma: float = 1.0) -> Tensor:
    """Latent labels u [N, C] after one step towards the predictions' logits, labels near 0.5 moving most.

    CDUL's equations 7 and 8 (Abdelfattah et al. 2023): u <- u - psi(y) dL/dy with y = sigmoid(u) and psi the
    density of a normal distribution with mean 0.5 and deviation `sigma`. For L = KL(y || p), `bernoulli_kl`,

        dL/dy = log(y / p) - log((1 - y) / (1 - p)) = logit(y) - logit(p) = u - z,

    so u moves the share psi(y) of its way to z. Below a `sigma` of 0.4 psi(0.5) exceeds 1 and a step overshoots.
    """
    density_NC = torch.exp(-0.5 * ((latent_NC.sigmoid() - 0.5) / sigma) ** 2) / (
        sigma * math.sqrt(2 * math.pi)
    )
    return latent_NC - density_NC * (latent_NC - logits_NC)


def _positives(logits_BC: Tensor, observed_BC: Tensor) -> Tensor:
    """-log p [B, C] at observed positives, 0 elsewhere."""
    return torch.where(observed_BC > 0, functional.softplus(-logits_BC), 0.0)

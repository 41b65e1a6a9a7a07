"""What each method asks of a classifier: its labels, its loss, and how the labels change while it learns.

An objective holds the labels of the training images and knows the loss of a batch. `Ccd` and `Cdul` also change
their labels between epochs; `loop` calls `update` where the recipe says so.

Legend: N training images, B images of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cliplet.errors import DataError, UsageError
from cliplet.pseudo_labels import blended, debiased, partially_known, top_1

from . import losses
from .classifier_recipe import WITH_TRUTH, ClassifierRecipe

LARGE_LOSS_SCHEMES: dict[str, losses.LargeLossScheme] = {"ll_r": "LL-R", "ll_ct": "LL-Ct", "ll_cp": "LL-Cp"}
OBSERVED_LABEL = 0.995  # probability of an observed positive in ROLE's table at the start
UNKNOWN_LABELS = (0.4, 0.6)  # range of the others


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass of a batch.

    Attributes:
        indices_B: int64 [B], positions of the images in the data set.
        logits_BC: float32, of the plain view; strong_BC: of the colour-jittered view, if there is one.
        table_BC: rows of the learned label table, if there is one.
        epoch: from 0 on.
    """

    indices_B: np.ndarray
    logits_BC: Tensor
    strong_BC: Tensor | None
    table_BC: Tensor | None
    epoch: int


class Objective:
    """Labels that stay, and one loss against them. Methods with more to do are subclasses.

    Attributes:
        labels_NC: float32 [N, C], what the loss compares with.
    """

    def __init__(self, recipe: ClassifierRecipe, labels_NC: np.ndarray) -> None:
        self.recipe = recipe
        self.labels_NC = labels_NC.astype(np.float32)

    @property
    def positives_NC(self) -> np.ndarray:
        """The labels as yes or no, bool [N, C], for the selection of a model."""
        return self.labels_NC >= 0.5

    def wants_strong(self, epoch: int) -> bool:
        """Whether the batches of `epoch` need a colour-jittered view."""
        return False

    def loss(self, step: Step) -> Tensor:
        """The scalar that is minimised."""
        targets_BC = self.rows(self.labels_NC, step)
        return LOSSES[self.recipe.method](step.logits_BC, targets_BC, self.recipe)

    def table(self) -> Tensor | None:
        """First value of a learned label table float32 [N, C], for the method that has one."""
        return None

    def state(self) -> dict[str, np.ndarray]:
        """What changes while it learns, for the checkpoint."""
        return {"labels": self.labels_NC}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state` returned."""
        self.labels_NC = np.array(state["labels"])

    @staticmethod
    def rows(array_NC: np.ndarray, step: Step) -> Tensor:
        """The batch's rows of an array, where the logits are."""
        return torch.from_numpy(array_NC[step.indices_B]).to(step.logits_BC.device)


# Of the losses that need nothing but logits and labels; durand's labels are 1, 0, -1.
LOSSES: dict[str, Callable[[Tensor, Tensor, ClassifierRecipe], Tensor]] = {
    "an": lambda z, y, r: losses.bce(z, y).mean(),
    "an_ls": lambda z, y, r: losses.bce(z, losses.smoothed(y, r.smoothing)).mean(),
    "bce": lambda z, y, r: losses.bce(z, y).mean(),
    "bce_ls": lambda z, y, r: losses.bce(z, losses.smoothed(y, r.smoothing)).mean(),
    "wan": lambda z, y, r: losses.wan(z, y).mean(),
    "epr": lambda z, y, r: losses.epr(z, y, r.expected_count),
    "durand": lambda z, y, r: losses.partial_bce(z, y).mean(),
    "asl": lambda z, y, r: losses.asymmetric(z, y, r.focus_negative, r.focus_positive, r.focus_clip).mean(),
}


class Role(Objective):
    """ROLE: a table of labels is learned beside the classifier, each pulled towards the other."""

    def table(self) -> Tensor:
        low, high = UNKNOWN_LABELS
        unknown_NC = np.random.default_rng([self.recipe.seed, 1]).uniform(low, high, self.labels_NC.shape)
        probs_NC = np.where(self.labels_NC > 0, OBSERVED_LABEL, unknown_NC)
        return torch.from_numpy(probs_NC.astype(np.float32)).logit()

    def loss(self, step: Step) -> Tensor:
        assert step.table_BC is not None
        observed_BC = self.rows(self.labels_NC, step)
        return losses.role(step.logits_BC, step.table_BC, observed_BC, self.recipe.expected_count)


class LargeLoss(Objective):
    """LL-R, LL-Ct, LL-Cp: the largest losses of unknown classes are rejected or taken for positives."""

    def loss(self, step: Step) -> Tensor:
        scheme = LARGE_LOSS_SCHEMES[self.recipe.method]
        share = losses.large_loss_share(step.epoch + 1, self.recipe.large_loss_percent, scheme)
        observed_BC = self.rows(self.labels_NC, step)
        loss_BC, changed_BC = losses.large_loss(step.logits_BC, observed_BC, share, scheme)
        if scheme == "LL-Cp":
            self.labels_NC[step.indices_B] = (observed_BC.bool() | changed_BC).float().cpu().numpy()
        return loss_BC.mean()


class Cdul(Objective):
    """CDUL: the classifier learns from soft labels by KL; between epochs the labels move towards what it says."""

    def __init__(self, recipe: ClassifierRecipe, labels_NC: np.ndarray) -> None:
        super().__init__(recipe, labels_NC)
        # Probabilities of exactly 0 and 1 have no finite logit and would never move.
        self.latent_NC = torch.from_numpy(self.labels_NC).double().logit(eps=1e-6).float().numpy()

    def loss(self, step: Step) -> Tensor:
        return losses.bernoulli_kl(self.rows(self.labels_NC, step), step.logits_BC).mean()

    def update(self, logits_NC: np.ndarray) -> None:
        """One step of the latent labels towards the classifier's logits float32 [N, C] (equations 7 and 8)."""
        moved = losses.cdul_label_step(
            torch.from_numpy(self.latent_NC), torch.from_numpy(logits_NC), self.recipe.label_step_sigma
        )
        self.latent_NC = moved.numpy()
        self.labels_NC = moved.sigmoid().numpy()

    def state(self) -> dict[str, np.ndarray]:
        return {**super().state(), "latent": self.latent_NC}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        super().load_state(state)
        self.latent_NC = np.array(state["latent"])


class Ccd(Objective):
    """CCD: debiased soft labels, blended with what the teacher says of the classifier's regions.

    Attributes:
        bias_C: CLIP's bias, or None without debiasing.
        weights_N: float32 [N], of the images in the loss: 1 for those that the teacher is sure of.
    """

    def __init__(
        self, recipe: ClassifierRecipe, probs_NC: np.ndarray, bias_C: np.ndarray | None, sure_N: np.ndarray
    ) -> None:
        floor = recipe.floor if recipe.floor >= 0 else 1 / probs_NC.shape[1]
        super().__init__(recipe, debiased(probs_NC, bias_C, floor))
        self.floor = floor
        self.bias_C = bias_C
        flags_N = torch.from_numpy(sure_N.astype(np.float32))
        self.weights_N = losses.sample_weights(flags_N, recipe.unsure_weight).numpy()

    def wants_strong(self, epoch: int) -> bool:
        return epoch >= self.recipe.warmup_epochs and self.recipe.consistency > 0

    def loss(self, step: Step) -> Tensor:
        entropy_BC = losses.bce(step.logits_BC, self.rows(self.labels_NC, step))
        if step.epoch < self.recipe.warmup_epochs:
            return entropy_BC.mean()
        total = (self.rows(self.weights_N, step)[:, None] * entropy_BC).mean()
        if step.strong_BC is None:
            return total
        agreement_BC = losses.consistency(step.strong_BC, step.logits_BC)
        return total + self.recipe.consistency * agreement_BC.mean()

    def update(self, crop_probs_NC: np.ndarray, asked_N: np.ndarray) -> None:
        """Blend the labels with the crops' class-wise maximum q float32 [N, C], 0 where there was no crop.

        Args:
            asked_N: bool [N]; the labels of other images stay.
        """
        new_NC = debiased(crop_probs_NC, self.bias_C, self.floor, clip=False)
        blended_NC = blended(self.labels_NC, new_NC, self.recipe.blend)
        self.labels_NC = np.where(asked_N[:, None], blended_NC, self.labels_NC)


def baseline(recipe: ClassifierRecipe, probs_NC: np.ndarray, truth_NC: np.ndarray | None) -> Objective:
    """The objective of a method other than CCD and CDUL: CLIP's top-1 class is the one observed positive.

    Durand's loss also has to know some classes to be absent: those below `known_negative_below`.

    Raises:
        DataError: an upper bound on images without labels.
    """
    if recipe.method in WITH_TRUTH:
        if truth_NC is None:
            raise DataError(
                f"method {recipe.method} learns from true labels, and these images have none",
                "a data set with labels",
                "choose a method that needs none, such as ccd",
            )
        return Objective(recipe, truth_NC)
    observed_NC = top_1(probs_NC)
    if recipe.method == "durand":
        negative_NC = partially_known(probs_NC, 1.0, recipe.known_negative_below) < 0
        return Objective(recipe, observed_NC.astype(np.float32) - (negative_NC & ~observed_NC))
    if recipe.method == "role":
        return Role(recipe, observed_NC)
    if recipe.method in LARGE_LOSS_SCHEMES:
        return LargeLoss(recipe, observed_NC)
    if recipe.method not in LOSSES:
        raise UsageError(f"method {recipe.method!r} is no baseline", f"one of {', '.join(LOSSES)}")
    return Objective(recipe, observed_NC)

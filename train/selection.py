"""Which epoch's classifier is kept: decided from pseudo-labels, never from ground truth.

Legend: N images, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cliplet.metrics import average_precisions

from .classifier_recipe import ClassifierRecipe


def held_out_map(scores_NC: np.ndarray, positives_NC: np.ndarray) -> float:
    """mAP in percent against pseudo-labels, over the classes that they name at all; nan if they name none."""
    named_C = positives_NC.any(axis=0)
    if not named_C.any():
        return float("nan")
    return 100 * float(np.mean(average_precisions(scores_NC[:, named_C], positives_NC[:, named_C])))


def is_chosen(
    recipe: ClassifierRecipe, history: list[dict[str, Any]], row: dict[str, Any], chosen: int
) -> bool:
    """Whether the epoch of `row` is to be kept in place of epoch `chosen` (-1: none yet).

    `held_out`: the best held-out mAP among the epochs since the labels last changed; earlier ones were judged by
    other labels; the latest where the labels name no class at all, since nothing tells epochs apart then.
    `released`: CCD's public code: the first epoch in which the gain of the training mAP, against labels
    of exactly 1, is larger than the epoch before's; until that happens, the latest. `last`: the last.
    """
    epoch = row["epoch"]
    if recipe.selection == "last" or chosen < 0:
        return True
    if recipe.selection == "released":
        return not _has_fired(history)
    last_change = max(recipe.update_epochs, default=0) if recipe.method in ("ccd", "cdul") else 0
    if epoch < last_change or chosen < last_change:
        return True
    best = history[chosen].get("held_out_map", math.nan)
    return math.isnan(best) or bool(row.get("held_out_map", math.nan) > best)


def _has_fired(history: list[dict[str, Any]]) -> bool:
    """Whether the public code's rule has found its epoch among these.

    With M the training mAP and g its gain, it is the first epoch with g > g of the epoch before; the first two
    epochs, whose g starts from 100, cannot be it.
    """
    values = [row["train_map"] for row in history]
    gains = np.diff(values)
    return bool((np.diff(gains) > 0).any())

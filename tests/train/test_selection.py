"""Which epoch is kept: against rules written down once more, over random histories."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.recipes import scenes_ccd, scenes_ccd_released, with_method
from cliplet.train.selection import held_out_map, is_chosen

# Whole numbers, so that gains are exact and ties happen.
MAPS = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=12)


def kept(recipe: ClassifierRecipe, name: str, values: list[float]) -> int:
    """The epoch whose classifier is left in the end, the epochs coming one by one."""
    history: list[dict[str, Any]] = []
    chosen = -1
    for epoch, value in enumerate(values):
        row = {"epoch": epoch, name: value}
        if is_chosen(recipe, history, row, chosen):
            chosen = epoch
        history.append(row)
    return chosen


@given(MAPS)
def test_the_released_rule_keeps_the_first_epoch_whose_gain_grows(values: list[float]) -> None:
    """CCD's public code, as the code has it: the gain starts from 100, and the last epoch is left if none fires."""
    previous_map, gain, fired = 0.0, 100.0, None
    for epoch, value in enumerate(values):
        new_gain = value - previous_map if epoch else 100.0
        if new_gain - gain > 0 and fired is None:
            fired = epoch
        previous_map, gain = value, new_gain
    assert fired is None or fired >= 2
    wanted = len(values) - 1 if fired is None else fired
    assert kept(scenes_ccd_released(), "train_map", values) == wanted


@given(MAPS, st.integers(0, 4), st.integers(0, 3), st.integers(1, 3))
def test_held_out_keeps_the_best_since_the_labels_last_changed(
    values: list[float], warmup: int, updates: int, every: int
) -> None:
    recipe = replace(
        scenes_ccd(), epochs=len(values), warmup_epochs=warmup, updates=updates, update_every=every
    )
    changes = [warmup + k * every for k in range(updates) if warmup + k * every < len(values)]
    begin = max(changes, default=0)
    judged = values[begin:]
    assert kept(recipe, "held_out_map", values) == begin + judged.index(max(judged))


@given(MAPS)
def test_methods_whose_labels_stay_compare_all_epochs(values: list[float]) -> None:
    for recipe in (with_method(scenes_ccd(), "an"), replace(scenes_ccd(), label_update=False)):
        recipe = replace(recipe, epochs=len(values), warmup_epochs=1)
        assert kept(recipe, "held_out_map", values) == values.index(max(values))
    last = replace(scenes_ccd(), selection="last")
    assert kept(last, "held_out_map", values) == len(values) - 1


def test_cdul_changes_its_labels_too() -> None:
    recipe = replace(with_method(scenes_ccd(), "cdul"), epochs=5, warmup_epochs=2)
    assert kept(recipe, "held_out_map", [9, 9, 1, 3, 2]) == 4
    judged = replace(recipe, selection="held_out", held_out=0.1, updates=1)
    assert kept(judged, "held_out_map", [9, 9, 1, 3, 2]) == 3


def test_without_a_number_the_latest_is_kept() -> None:
    recipe = replace(scenes_ccd(), epochs=4)
    assert kept(recipe, "held_out_map", [math.nan] * 4) == 3
    assert kept(replace(recipe, warmup_epochs=0), "held_out_map", [math.nan, 5.0, 4.0, math.nan]) == 1


def test_the_held_out_map_is_over_the_classes_that_the_labels_name() -> None:
    scores = np.array([[0.9, 0.2, 0.5], [0.8, 0.3, 0.5], [0.1, 0.9, 0.5]])
    positives = np.array([[True, False, False], [False, False, False], [True, True, False]])
    # Class 0: right at rank 1 and at rank 3; class 1: right at rank 1; class 2 is named by no label.
    assert held_out_map(scores, positives) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)
    assert math.isnan(held_out_map(scores, np.zeros((3, 3), bool)))

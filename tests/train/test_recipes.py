"""Recipes: all names build, published values are the published ones, every setting is used, bad ones are refused."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fields_read import attributes_read

import cliplet.train
from cliplet.datasets import SPLITS
from cliplet.errors import UsageError
from cliplet.train.classifier_recipe import CHOICES, METHODS, RANGES, ClassifierRecipe
from cliplet.train.recipes import (
    classifier_recipe,
    classifier_recipes,
    data_sets,
    scenes_ccd,
    scenes_ccd_released,
    voc12_ccd,
    voc12_ccd_released,
    with_method,
)
from cliplet.train.train_commands import parsed_settings
from cliplet.views import Views
from cliplet.vocabulary import PROMPT_SETS, prompt_set

SOURCES = Path(cliplet.train.__path__[0])
FIELDS = [field.name for field in fields(ClassifierRecipe)]


@pytest.mark.parametrize("name", classifier_recipes())
def test_every_recipe_builds_and_fits_its_name(name: str) -> None:
    recipe = classifier_recipe(name)
    data, method = name.removesuffix("_released").split("_", 1)
    assert (recipe.dataset, recipe.method) == (data, method)
    assert recipe.train_split in SPLITS[data] and (not recipe.eval_split or recipe.eval_split in SPLITS[data])
    assert prompt_set(recipe.prompts) == PROMPT_SETS[recipe.prompts]
    assert Views.parse(recipe.views).count == (10 if method == "cdul" else 1)
    assert ClassifierRecipe(**json.loads(json.dumps(recipe.to_json()))) == recipe


def test_names_are_one_for_each_data_set_and_method() -> None:
    names = classifier_recipes()
    assert len(names) == len(set(names)) == 8 * len(METHODS) + 2
    assert {"coco17_ccd", "ccd_ccd", "ccd_an"} <= set(names)
    assert data_sets() == ["scenes", "voc12", "voc07", "coco14", "coco17", "nus", "ccd", "folder"]
    assert {"scenes_ccd", "voc12_ll_cp", "nus_bce_ls", "folder_ccd", "voc12_ccd_released"} <= set(names)


@pytest.mark.parametrize(
    ("name", "closest"), [("voc12_cdd", "voc12_ccd"), ("scene_ccd", "scenes_ccd"), ("???", "scenes_ccd")]
)
def test_an_unknown_name_is_told_the_closest(name: str, closest: str) -> None:
    with pytest.raises(UsageError, match="no recipe is called") as caught:
        classifier_recipe(name)
    assert caught.value.fix == f"cliplet train {closest}"


def test_the_released_recipe_is_the_published_command_to_the_letter() -> None:
    """CCD's public code, under the names of the public code."""
    recipe = voc12_ccd_released()
    published = {
        "bsize": (recipe.batch, 16),
        "lr": (recipe.learning_rate, 1e-5),
        "lr of the head": (recipe.learning_rate * recipe.head_factor, 1e-4),
        "num_epochs": (recipe.epochs, 10),
        "offset_size": (recipe.crop_margin * recipe.region_size, 80),
        "coeff": (recipe.boost, 3),
        "loss_coeff": (recipe.unsure_weight, 1),
        "ratio": (recipe.blend, 0.2),
        "LS_coeff": (1 / recipe.floor, 20),
        "bound": (recipe.mean_classes, 4),
        "inf_num": (recipe.updates, 1),
        "use_consist": (recipe.consistency, 1),
        "train_resize": (recipe.image_size, 448),
        "resize": (recipe.region_size, 640),
        "size of CLIP's images": (recipe.teacher_size, 640),
        "what models.py builds": (recipe.trunk, "resnet50.tv_in1k"),
        "CLIP": (recipe.teacher, "open_clip:RN50x64/openai"),
        "prompt": (PROMPT_SETS[recipe.prompts].templates, ("a photo of the {}",)),
        "normalisation": (recipe.teacher_normalisation, "imagenet"),
        "scale": (recipe.softmax_scale, 100),
        "entropy": (recipe.max_entropy, 2),
        "guard of 0 / 0": (recipe.bias_guard, "none"),
        "CAM threshold": (recipe.cam_threshold, 0.95),
        "corners": (recipe.box_rule, "first_last"),
        "aspect of crops": (recipe.crop_shape, "stretched"),
        "crops an image": (recipe.max_regions, 20),
        "search": ((recipe.threshold_search, recipe.threshold_start), ("walk", 0.05)),
        "epochs with an update": (list(recipe.update_epochs), [2]),
        "jitter": (recipe.jitter, 0.5),
        "weight decay": (recipe.weight_decay, 0),
        "average of the weights": (recipe.average, 0),
        "precision": (recipe.precision, "fp32"),
        "selection": (recipe.selection, "released"),
        "held-out images": (recipe.held_out, 0),
        "one by one": (recipe.scoring, "one_by_one"),
        "splits": ((recipe.train_split, recipe.eval_split, recipe.difficult), ("train", "val", "negative")),
    }
    for name, (found, wanted) in published.items():
        same = found == pytest.approx(wanted) if isinstance(wanted, float | int) else found == wanted
        assert same, f"{name}: {found}, published {wanted}"


def test_the_small_released_recipe_differs_in_sizes_alone() -> None:
    small, large = scenes_ccd_released(), voc12_ccd_released()
    for name in ("scoring", "bias_guard", "floor", "box_rule", "crop_shape", "threshold_search", "selection"):
        assert getattr(small, name) == getattr(large, name)
    assert small.region_size / small.image_size == pytest.approx(640 / 448, abs=0.05)
    mended = voc12_ccd()
    assert (mended.box_rule, mended.bias_guard, mended.floor) == ("bounding", "mean", -1)


def test_every_field_is_read_somewhere_and_described() -> None:
    sources = [
        path.read_text()
        for path in SOURCES.glob("*.py")
        if path.name not in ("classifier_recipe.py", "recipes.py")
    ]
    assert len(sources) > 20
    # The losses' table calls it by a letter.
    read = attributes_read(sources, ["recipe", "r"])
    assert ClassifierRecipe.update_epochs.fget is not None
    schedule = textwrap.dedent(inspect.getsource(ClassifierRecipe.update_epochs.fget))
    if "update_epochs" in read:
        read |= attributes_read([schedule], ["self"])
    for name in FIELDS:
        assert name in read, f"nothing reads {name}"
        assert name in str(ClassifierRecipe.__doc__), f"{name} is not described"


@pytest.mark.parametrize(
    ("method", "changes", "epochs"),
    [
        ("ccd", {}, [2]),
        ("ccd", {"updates": 3}, [2, 3]),
        ("ccd", {"updates": 3, "epochs": 12, "update_every": 4}, [2, 6, 10]),
        ("ccd", {"updates": 0}, []),
        ("ccd", {"label_update": False}, []),
        ("ccd", {"warmup_epochs": 0}, [0]),
        ("ccd", {"epochs": 2}, []),
        ("cdul", {"label_update": False, "updates": 2, "epochs": 9}, [2, 3]),
        ("cdul", {}, [2, 3]),
        ("cdul", {"epochs": 7}, [2, 3, 4, 5, 6]),
    ],
)
def test_epochs_that_begin_with_a_label_update(
    method: str, changes: dict[str, Any], epochs: list[int]
) -> None:
    recipe = replace(with_method(scenes_ccd(), method), **changes)
    assert list(recipe.update_epochs) == epochs


@pytest.mark.parametrize("name", [name for name in classifier_recipes() if name.endswith("_cdul")])
def test_cdul_alternates_in_every_epoch_after_the_warm_up(name: str) -> None:
    recipe = classifier_recipe(name)
    assert list(recipe.update_epochs) == list(range(recipe.warmup_epochs, recipe.epochs))
    assert len(recipe.update_epochs) >= 2


@pytest.mark.parametrize("name", CHOICES)
def test_a_word_that_is_no_choice_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} 'other' in a recipe"):
        replace(scenes_ccd(), **{name: "other"})
    assert getattr(scenes_ccd(), name) in CHOICES[name]


@pytest.mark.parametrize("name", RANGES)
def test_a_number_out_of_its_range_is_refused(name: str) -> None:
    least, largest = RANGES[name]
    with pytest.raises(UsageError, match=f"{name} is"):
        replace(scenes_ccd(), **{name: least - 1})
    if largest < math.inf:
        with pytest.raises(UsageError, match=f"{least} to {largest}"):
            replace(scenes_ccd(), **{name: largest + 0.1})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"held_out": 0.0}, "held_out is 0.0 with selection 'held_out'"),
        ({"held_out": 1.0, "selection": "last"}, "held_out is 1.0"),
        ({"average": 1.0}, "average is 1.0"),
        ({"expected_count": -3.0}, "expected_count is -3.0"),
        ({"expected_count": 0.0}, "expected_count is 0.0"),
        ({"large_loss_percent": -5.0}, "large_loss_percent is -5.0"),
        ({"mean_classes": -1.0}, "mean_classes is -1.0"),
        ({"max_entropy": -1.0}, "max_entropy is -1.0"),
        ({"focus_clip": 1.5}, "focus_clip is 1.5"),
        ({"scoring": "one_by_one"}, "teacher_size 0"),
        ({"teacher_size": 96}, "scoring 'batched' with teacher_size 96"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"mean_classes": math.inf}, "mean_classes is inf"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(scenes_ccd(), **changes)


def test_settings_of_the_command_line_get_their_fields_types() -> None:
    found = parsed_settings(
        ("boost=2", "epochs=7", "debias=no", "label_update=TRUE", "teacher=open_clip:a/b=c", "eval_split=")
    )
    assert found == {
        "boost": 2.0,
        "epochs": 7,
        "debias": False,
        "label_update": True,
        "teacher": "open_clip:a/b=c",
        "eval_split": "",
    }
    assert isinstance(found["boost"], float) and isinstance(found["debias"], bool)
    assert parsed_settings(("seed=1", "seed=2")) == {"seed": 2} and parsed_settings(()) == {}


@pytest.mark.parametrize(
    ("setting", "happened", "expected", "fix"),
    [
        ("bost=2", "--set bost=2", "NAME=VALUE with one of", "--set boost=VALUE"),
        ("boost", "--set boost", "NAME=VALUE", "--set boost=VALUE"),
        ("dataset=voc12", "--set dataset=voc12", "NAME=VALUE", ""),
        ("=3", "--set =3", "NAME=VALUE", "--set seed=VALUE"),
        ("epochs=2.5", "--set epochs=2.5", "a value that is a int", ""),
        ("boost=big", "--set boost=big", "a value that is a float", ""),
        ("debias=maybe", "--set debias=maybe", "a value that is a bool", ""),
        ("debias=", "--set debias=", "a value that is a bool", ""),
    ],
)
def test_settings_that_are_none_are_refused(setting: str, happened: str, expected: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed_settings((setting,))
    assert caught.value.happened == happened
    assert caught.value.expected.startswith(expected) and caught.value.fix.startswith(fix)

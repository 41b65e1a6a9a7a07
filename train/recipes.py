"""Complete settings of a run, each built by a function that names it: `tiny_clip()`, `scenes_ccd()`.

A recipe is frozen and every field is read somewhere. The resolved one is saved beside the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from cliplet.errors import UsageError

from .classifier_recipe import METHODS, ClassifierRecipe

EVERY_EPOCH = 1_000_000  # label updates: more than any run has epochs, whatever --epochs says


@dataclass(frozen=True, kw_only=True)
class TinyClipRecipe:
    """Settings of the embedded CLIP: its shape, its images, its training and its evaluation.

    Args:
        seed: of everything random.
        image_size: side of the square the encoder sees.
        embed_dim: length of an embedding.
        vision_tower: timm's name of the image tower: a residual net of four basic blocks, 0.4 M parameters.
        text_width, text_layers, text_heads, context_length: shape of the text tower.
        scenes: scenes made for training.
        fragments_per_scene: grid cells and boxes around objects cut from a scene beside the whole image.
        empty_kept: chance that a fragment without objects is kept.
        tail: exponent of the long tail of classes in training scenes.
        max_objects: most objects in a scene, in training and in evaluation.
        steps: optimiser steps.
        batch: image-caption pairs in a step.
        learning_rate, weight_decay, warmup_steps: of AdamW; the rate then falls as a cosine.
        max_logit_scale: bound of the learned scale; a low one keeps empty views undecided.
        calm: weight of the pull that keeps class prompts equally likely on empty fragments.
        average: decay of the running average of the weights, which is what is saved.
        colour, blur, erase, gray: how strong or how frequent each augmentation is.
        turn_degrees, zoom: reach of the geometric augmentation.
        bfloat16: whether to train in mixed precision.
        workers: processes that make scenes.
        evaluation_scenes: scenes for each number measured.
    """

    seed: int = 0
    image_size: int = 64
    embed_dim: int = 128
    vision_tower: str = "test_resnet"
    text_width: int = 48
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 16
    scenes: int = 16000
    fragments_per_scene: int = 5
    empty_kept: float = 0.5
    tail: float = 0.4
    max_objects: int = 5
    steps: int = 20000
    batch: int = 64
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    max_logit_scale: float = 30.0
    calm: float = 0.1
    average: float = 0.998
    colour: float = 0.4
    blur: float = 0.15
    erase: float = 0.05
    gray: float = 0.04
    turn_degrees: float = 6.0
    zoom: float = 0.12
    bfloat16: bool = True
    workers: int = 2
    evaluation_scenes: int = 1000


def tiny_clip() -> TinyClipRecipe:
    """The recipe of the shipped asset `tiny`."""
    return TinyClipRecipe()


def voc12_ccd_released() -> ClassifierRecipe:
    """CCD on VOC 2012 as the public code runs it, what is odd in it included."""
    return ClassifierRecipe(
        dataset="voc12",
        eval_split="val",
        prompts="ccd",
        scoring="one_by_one",
        teacher_size=640,
        teacher_normalisation="imagenet",
        softmax_scale=100.0,
        bias_guard="none",
        floor=1 / 20,
        trunk="resnet50.tv_in1k",
        precision="fp32",
        channels_last=False,
        box_rule="first_last",
        crop_shape="stretched",
        threshold_search="walk",
        mean_classes=4.0,
        max_regions=20,
        selection="released",
        held_out=0.0,
    )


def voc12_ccd() -> ClassifierRecipe:
    """CCD on VOC 2012, mended: what `ClassifierRecipe` has by default."""
    return ClassifierRecipe(dataset="voc12", eval_split="val")


def voc07_ccd() -> ClassifierRecipe:
    """CCD on VOC 2007, mended; nothing about the published settings for it is known."""
    return ClassifierRecipe(dataset="voc07", train_split="trainval", eval_split="test")


def coco14_ccd() -> ClassifierRecipe:
    """CCD on COCO 2014, mended; nothing about the published settings for it is known."""
    return ClassifierRecipe(dataset="coco14", eval_split="val", expected_count=2.9, large_loss_percent=0.4)


def coco17_ccd() -> ClassifierRecipe:
    """CCD on COCO 2017, mended: the settings of COCO 2014, whose images it divides otherwise."""
    return replace(coco14_ccd(), dataset="coco17")


def nus_ccd() -> ClassifierRecipe:
    """CCD on NUS-WIDE, mended; nothing about the published settings for it is known."""
    return ClassifierRecipe(dataset="nus", expected_count=1.9, large_loss_percent=0.4)


def ccd_ccd() -> ClassifierRecipe:
    """CCD, mended, on the arrays that its public code reads, whichever data set they are of.

    Positives an image (`expected_count`) are Pascal VOC's: 2.9 are COCO's, 1.9 NUS-WIDE's.
    """
    return ClassifierRecipe(dataset="ccd", eval_split="val")


def folder_ccd() -> ClassifierRecipe:
    """CCD on a folder of images of one's own."""
    return ClassifierRecipe(dataset="folder", train_split="all", eval_split="")


def scenes_ccd() -> ClassifierRecipe:
    """CCD on the scene world, mended, small enough for two cores: `tiny` teaches its own trunk to see 160 pixels."""
    return ClassifierRecipe(
        dataset="scenes",
        eval_split="test-seen",
        train_scenes=4000,
        eval_scenes=2000,
        teacher="tiny",
        trunk="test_resnet",
        trunk_weights="teacher",
        image_size=160,
        region_size=224,
        epochs=4,
        batch=32,
        learning_rate=1e-3,
        expected_count=2.5,
    )


def scenes_ccd_released() -> ClassifierRecipe:
    """The public code's way on the scene world: its rules, with sizes in the proportion 448 : 640.

    The softmax scale stays the teacher's own, as it is in the public code: its 100 is RN50x64's own; `tiny`
    learned 17.4.
    """
    return replace(
        scenes_ccd(),
        **{
            name: getattr(voc12_ccd_released(), name)
            for name in (
                "scoring", "teacher_normalisation", "bias_guard", "floor", "box_rule", "crop_shape",
                "threshold_search", "mean_classes", "max_regions", "selection", "held_out",
            )
        },
        teacher_size=96,
    )  # fmt: skip


def with_method(recipe: ClassifierRecipe, method: str) -> ClassifierRecipe:
    """The same data, student and schedule with another method, looking where that method looks.

    CDUL alternates (Abdelfattah et al. 2023): its labels move before every epoch after the warm-up. So no two epochs
    are judged by the same labels, and the last one is kept.
    """
    if method == "cdul":
        recipe = replace(recipe, updates=EVERY_EPOCH, update_every=1, selection="last", held_out=0.0)
        return replace(recipe, method=method, views="1+3x3")
    return replace(recipe, method=method, views="1")


def classifier_recipe(name: str) -> ClassifierRecipe:
    """The recipe called `name`: `voc12_ccd`, `voc12_ccd_released`, `scenes_ll_r`, …

    Raises:
        UsageError: there is none.
    """
    names = classifier_recipes()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        raise UsageError(
            f"no recipe is called {name!r}",
            f"DATASET_METHOD with one of {', '.join(_prefix(base) for base in _CCD)} and one of {', '.join(METHODS)}",
            f"cliplet train {close[0] if close else names[0]}",
        )
    complete = {f.__name__: f for f in (*_CCD, voc12_ccd_released, scenes_ccd_released)}
    if name in complete:
        return complete[name]()
    base = next(f for f in _CCD if name.startswith(_prefix(f)))
    return with_method(base(), name.removeprefix(_prefix(base)))


def data_sets() -> list[str]:
    """Kinds of data sets that have recipes."""
    return [base().dataset for base in _CCD]


def classifier_recipes() -> list[str]:
    """Names of all recipes of classifiers, data set by data set."""
    names = []
    for base in _CCD:
        names += [_prefix(base) + method for method in METHODS]
        if base in (voc12_ccd, scenes_ccd):
            names.append(f"{base.__name__}_released")
    return names


def _prefix(base: Callable[[], ClassifierRecipe]) -> str:
    """`voc12_` of `voc12_ccd`."""
    return base.__name__.removesuffix("ccd")


_CCD = (scenes_ccd, voc12_ccd, voc07_ccd, coco14_ccd, coco17_ccd, nus_ccd, ccd_ccd, folder_ccd)

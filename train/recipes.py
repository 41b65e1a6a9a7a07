"""Complete settings of a run, each built by a function that names it: `tiny_clip()`.

A recipe is frozen and every field is read somewhere. The resolved one is saved beside the result.
"""

from __future__ import annotations

from dataclasses import dataclass


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

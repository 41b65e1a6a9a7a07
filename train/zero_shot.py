"""How well a CLIP folder names the objects of scenes: top-1, mAP by views, bias of classes, thresholds.

measured = evaluate(Path("runs/tiny"), tiny_clip(), progress)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from cliplet.metrics import average_precisions, mean_average_precision
from cliplet.pseudo_labels import clip_bias as class_bias
from cliplet.scenes import Scene, SceneWorld, scene_world

from .captions import PROMPT
from .fragments import grid_boxes
from .recipes import TinyClipRecipe

# Legend: N images, V views, C classes, D embedding.

GRIDS = (2, 3)
# Which columns of V = 1 + 4 + 9 views (whole image, 2x2 cells, 3x3 cells) each view set looks at.
VIEW_SETS = {"whole": [0], "1+2x2": [0, *range(1, 5)], "1+3x3": [0, *range(5, 14)]}
Progress = Callable[[str, int, int], None]  # stage, items just done, items in all
FAR_AWAY = 10_000_000  # scenes of the training part from here on are in no training bank


class ZeroShot:
    """A CLIP folder with a set of class names: images in, class probabilities out."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.model.eval()
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        with torch.inference_mode():
            tokens = tokenizer([PROMPT.format(name) for name in classes])
            self.text_CD = self.model.encode_text(tokens, normalize=True)

    def probabilities(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Class probabilities of each image, float32 [N, C]."""
        found = []
        with torch.inference_mode():
            for start in range(0, len(images), 256):
                batch = torch.stack([self.preprocess(image) for image in images[start : start + 256]])
                image_ND = self.model.encode_image(batch, normalize=True)
                logits_NC = self.model.logit_scale.exp() * image_ND @ self.text_CD.T
                found.append(logits_NC.softmax(-1))
        return torch.cat(found).numpy()


def views(image: Image.Image, grids: Sequence[int]) -> list[Image.Image]:
    """The whole image and then the cells of each grid."""
    boxes = [box for cells in grids for box in grid_boxes(image.width, image.height, cells)]
    return [image, *(image.crop(box) for box in boxes)]


def view_scores(probs_NVC: np.ndarray) -> np.ndarray:
    """Score of each class in each image, float32 [N, C]: half the whole image's, half the best cell's."""
    if probs_NVC.shape[1] == 1:
        return probs_NVC[:, 0]
    return 0.5 * (probs_NVC[:, 0] + probs_NVC[:, 1:].max(1))


@dataclass(frozen=True)
class Threshold:
    """The score from which a class is said, and the micro-F1 in percent that it gives."""

    value: float
    micro_f1: float


def best_threshold(scores_NC: np.ndarray, truth_NC: np.ndarray) -> Threshold:
    """The threshold with the highest micro-F1 on these images."""
    order = np.argsort(-scores_NC.ravel(), kind="stable")
    hits = np.cumsum(truth_NC.ravel()[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + truth_NC.sum())
    best = int(f1.argmax())
    return Threshold(float(scores_NC.ravel()[order[best]]), 100 * float(f1[best]))


def truth_matrix(scenes: Sequence[Scene], classes: Sequence[str]) -> np.ndarray:
    """Which class is in which scene, bool [N, C]."""
    return np.array([[name in scene.classes for name in classes] for scene in scenes])


def scene_views(zero_shot: ZeroShot, scenes: Sequence[Scene], grids: Sequence[int]) -> np.ndarray:
    """Class probabilities of every view of every scene, float32 [N, V, C]."""
    per_scene = [views(Image.fromarray(scene.image), grids) for scene in scenes]
    probs = zero_shot.probabilities([view for some in per_scene for view in some])
    return probs.reshape(len(scenes), len(per_scene[0]), -1)


def top_1(zero_shot: ZeroShot, world: SceneWorld, count: int) -> float:
    """Share of single-object scenes, in percent, whose object is the most probable class."""
    scenes = [scene for scene in map(world.scene, range(count)) if len(scene.objects) == 1]
    best_N = scene_views(zero_shot, scenes, ())[:, 0].argmax(1)
    right = [scene.objects[0].name == world.classes[k] for scene, k in zip(scenes, best_N, strict=True)]
    return 100 * float(np.mean(right))


def evaluate(folder: Path, recipe: TinyClipRecipe, progress: Progress) -> dict[str, Any]:
    """All numbers of a CLIP folder on the scene world, ready for JSON.

    Crowded scenes have up to the recipe's number of objects and the world's own long tail; single-object
    scenes have every class equally often.
    """
    count, crowd = recipe.evaluation_scenes, recipe.max_objects
    world = scene_world("test-seen", seed=recipe.seed, max_objects=crowd)
    zero_shot = ZeroShot(folder, world.classes)
    measured: dict[str, Any] = {"scenes": count, "prompt": PROMPT, "classes": list(world.classes)}
    for part in ("test-seen", "test-unseen"):
        single = scene_world(part, seed=recipe.seed + 1, max_objects=1, tail=0.0)
        crowded = scene_world(part, seed=recipe.seed, max_objects=crowd)
        measured[part] = {
            "single_object_top1": top_1(zero_shot, single, count),
            **_multi_label(zero_shot, crowded, count),
        }
        progress("evaluation", 1, 3)
    held_out = scene_world("train", seed=recipe.seed, max_objects=crowd)
    measured["held_out"] = _calibration(zero_shot, held_out, count)
    progress("evaluation", 1, 3)
    return measured


def _multi_label(zero_shot: ZeroShot, world: SceneWorld, count: int) -> dict[str, Any]:
    scenes = [world.scene(index) for index in range(count)]
    truth_NC = truth_matrix(scenes, world.classes)
    probs_NVC = scene_views(zero_shot, scenes, GRIDS)
    measured: dict[str, Any] = {}
    for name, columns in VIEW_SETS.items():
        scores_NC = view_scores(probs_NVC[:, columns])
        precisions = 100 * average_precisions(scores_NC, truth_NC)
        measured[name] = {
            "mAP": mean_average_precision(scores_NC, truth_NC),
            "AP": dict(zip(world.classes, precisions.tolist(), strict=True)),
        }
    return measured


def _calibration(zero_shot: ZeroShot, world: SceneWorld, count: int) -> dict[str, Any]:
    scenes = [world.scene(FAR_AWAY + index) for index in range(count)]
    truth_NC = truth_matrix(scenes, world.classes)
    probs_NVC = scene_views(zero_shot, scenes, GRIDS)
    thresholds = {}
    for name, columns in VIEW_SETS.items():
        best = best_threshold(view_scores(probs_NVC[:, columns]), truth_NC)
        thresholds[name] = {"threshold": best.value, "micro_f1": best.micro_f1}
    bias_C, counts_C = class_bias(probs_NVC[:, 0])
    bias = {
        name: {"bias": None if counts_C[c] == 0 else float(bias_C[c]), "images": int(counts_C[c])}
        for c, name in enumerate(world.classes)
    }
    return {"thresholds": thresholds, "bias": bias}

"""The phases of CCD (Kim & Shim 2025), by their names: score globally, estimate the bias, debias, warm up, find
the threshold, find regions, score regions, blend, train on.

`objectives.Ccd` holds the labels and the loss; here is what changes the labels.

Legend: N images, C classes, r regions of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cliplet.datasets import Dataset
from cliplet.errors import DataError, UsageError
from cliplet.images import Picture
from cliplet.metrics import mean_average_precision
from cliplet.pseudo_labels import ClipBias, clip_bias, is_sure, quantile_threshold, walk_threshold

from .classifier_recipe import ClassifierRecipe
from .feed import epoch_batches, image_batches
from .jitter import flips, mirrored, step_generator
from .loop import Learning
from .objectives import Ccd, Cdul
from .predict import PREDICTION_BATCH, prediction_batches, scored_batches, unit_pixels
from .regions import Regions, find_regions, squared
from .teacher_labels import PassOptions, teacher_labels
from .world import summed

SEARCH_EPOCH = 1_000_000  # names the random order of the threshold search, apart from all training epochs


def estimated_bias(recipe: ClassifierRecipe, probs_NC: np.ndarray, classes: tuple[str, ...]) -> ClipBias:
    """The teacher's bias on these images, every value finite.

    Raises:
        DataError: a class without a sure image, and the recipe has no guard for it (the public code divides by
            zero there).
    """
    bias = clip_bias(probs_NC, recipe.max_entropy, recipe.bias_guard)  # type: ignore[arg-type]
    empty = [name for name, count in zip(classes, bias.images_C, strict=True) if count == 0]
    if empty and recipe.bias_guard == "none":
        raise DataError(
            f"no image is surely of the class {', '.join(map(repr, empty))}: its bias would be 0 / 0",
            "an image of each class with an entropy of at most "
            f"{recipe.max_entropy} nats where it is the most probable one, or a guard",
            "--set bias_guard=mean",
        )
    return bias


def ccd_objective(
    recipe: ClassifierRecipe,
    probs_NC: np.ndarray,
    classes: tuple[str, ...],
    scores_NC: np.ndarray | None = None,
) -> Ccd:
    """CCD's first labels: the teacher's probabilities, debiased.

    Args:
        probs_NC: of the whole images; the bias, and of which images the teacher is sure, come from them.
        scores_NC: what is debiased in their place, where the recipe also looks at snippets.

    Raises:
        DataError: see `estimated_bias`.
        UsageError: regions of more classes than there are would be searched for after the warm-up.
    """
    if recipe.label_update and recipe.threshold_search == "quantile" and recipe.mean_classes > len(classes):
        raise UsageError(
            f"mean_classes {recipe.mean_classes} with {len(classes)} classes",
            "no more regions an image than there are classes",
            f"--set mean_classes={max(1, len(classes) // 4)}",
        )
    bias_C = estimated_bias(recipe, probs_NC, classes).value_C if recipe.debias else None
    first_NC = probs_NC if scores_NC is None else scores_NC
    return Ccd(recipe, first_NC, bias_C, is_sure(probs_NC, recipe.max_entropy))


def update_labels(learning: Learning, options: PassOptions) -> dict[str, Any]:
    """CCD's label update: what was found goes into the history.

    An image that cannot be read any more keeps its labels and is noted as skipped.
    """
    recipe, data, objective = learning.recipe, learning.data, learning.objective
    assert isinstance(objective, Ccd)
    regions = all_regions(learning)
    threshold, said = search_threshold(learning, regions)
    counts_N = [len(regions.of_image(i, threshold)) for i in range(len(data.images))]
    # Sigmoids are above 0; only an image that could not be read has none, hence no regions to ask about.
    seen_N = regions.scores_NC.any(axis=1)

    def boxes(rows: np.ndarray, pictures: list[Picture]) -> list[np.ndarray]:
        found = [regions.of_image(int(i), threshold) for i in rows]
        if recipe.crop_shape == "stretched":
            return found
        return [squared(r, p.width, p.height) for r, p in zip(found, pictures, strict=True)]

    purpose = {"regions": regions.digest(threshold), "crop_shape": recipe.crop_shape}
    found = teacher_labels(recipe, data, learning.fabric, options, boxes=boxes, purpose=purpose)
    learning.progress.skipped |= {e.path: f"{e.stage}: {e.reason}" for e in found.errors}
    objective.update(found.probs_NVC[:, 0], found.done_N & seen_N)
    return {**said, "regions_per_image": float(np.mean(counts_N)), **label_quality(objective.labels_NC, data)}


def label_quality(labels_NC: np.ndarray, data: Dataset) -> dict[str, float]:
    """mAP in percent of labels against the truth, where there is one: looked at, never used."""
    if data.truth_NC is None:
        return {}
    return {"label_map": mean_average_precision(labels_NC, data.truth_NC)}


def all_regions(learning: Learning) -> Regions:
    """The regions of all training images, held-out ones included, at the recipe's size for them."""
    recipe, data = learning.recipe, learning.data
    classes = len(data.vocabulary.names)
    kept = min(recipe.max_regions, classes)
    scores_NC = np.zeros((len(data.images), classes), np.float32)
    classes_NK = np.zeros((len(data.images), kept), np.int64)
    boxes_NK4 = np.zeros((len(data.images), kept, 4), np.float32)
    for scored in scored_batches(
        learning.classifier,
        data.images,
        _own_batches(learning),
        size=recipe.region_size,
        workers=learning.options.workers,
        precision=recipe.precision,
        cache=learning.options.cache,
    ):
        learning.note_skipped(scored.images)
        rows = scored.images.indices_B
        found = find_regions(scored.logits_BC, scored.cam_BChw, recipe)
        scores_NC[rows], classes_NK[rows], boxes_NK4[rows] = (
            found.scores_NC,
            found.classes_NK,
            found.boxes_NK4,
        )
    fabric = learning.fabric
    return Regions(summed(fabric, scores_NC), summed(fabric, classes_NK), summed(fabric, boxes_NK4))


def _own_batches(learning: Learning) -> list[np.ndarray]:
    """This process's share of the batches in which the training images are predicted."""
    fabric = learning.fabric
    return prediction_batches(len(learning.data.images), fabric.global_rank, fabric.world_size)


def search_threshold(learning: Learning, regions: Regions) -> tuple[float, dict[str, Any]]:
    """The score from which a class has a region, and what is to be said of the search.

    `quantile` finds it from the scores that come with the regions; `walk` is the public code's search, over
    training views in random order.
    """
    recipe = learning.recipe
    if recipe.threshold_search == "quantile":
        seen_N = regions.scores_NC.any(axis=1)
        threshold = quantile_threshold(regions.scores_NC[seen_N], recipe.mean_classes)
        return threshold, {"threshold": threshold}
    walked = walk_threshold(training_view_scores(learning), recipe.threshold_start, recipe.mean_classes)
    return walked.tau, {"threshold": walked.tau, "threshold_found": walked.found, "windows": walked.windows}


@torch.inference_mode()
def training_view_scores(learning: Learning) -> np.ndarray:
    """Scores float32 [N, C] of flipped training views in random order, the network in evaluation mode."""
    recipe, data, classifier = learning.recipe, learning.data, learning.classifier
    batches = epoch_batches(np.arange(len(data.images)), PREDICTION_BATCH, recipe.seed, SEARCH_EPOCH)
    classifier.eval()
    rows = []
    options = learning.options
    feed = image_batches(data.images, batches, recipe.image_size, options.workers, options.cache)
    for step, batch in enumerate(feed):
        generator = step_generator(recipe.seed, SEARCH_EPOCH, step)
        flip = flips(len(batches[step]), generator)[torch.from_numpy(batch.places_B)]
        pixels = mirrored(unit_pixels(batch.pixels_BSS3, learning.fabric.device), flip)
        with learning.fabric.autocast():
            logits, _ = classifier(pixels)
        rows.append(logits.float().sigmoid().cpu().numpy())
    return np.concatenate(rows)


def update_latent_labels(learning: Learning) -> dict[str, Any]:
    """CDUL's label update with the network fixed: labels move towards the predictions."""
    data, objective = learning.data, learning.objective
    assert isinstance(objective, Cdul)
    logits_NC = np.zeros(objective.labels_NC.shape, np.float32)
    seen_N = np.zeros(len(logits_NC), np.uint8)
    for scored in scored_batches(
        learning.classifier,
        data.images,
        _own_batches(learning),
        workers=learning.options.workers,
        precision=learning.recipe.precision,
        cache=learning.options.cache,
    ):
        learning.note_skipped(scored.images)
        logits_NC[scored.images.indices_B] = scored.logits_BC.cpu().numpy()
        seen_N[scored.images.indices_B] = 1
    logits_NC, seen_N = summed(learning.fabric, logits_NC), summed(learning.fabric, seen_N)
    # An image that cannot be read any more keeps its labels.
    objective.update(np.where(seen_N[:, None], logits_NC, objective.latent_NC))
    return label_quality(objective.labels_NC, data)

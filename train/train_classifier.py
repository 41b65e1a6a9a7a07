"""One run from unlabelled images to an evaluated classifier; `cliplet train RECIPE` is this.

    OUT/run.json           the recipe, the data: what a later call must agree with to continue
    OUT/scenes/            the images, for recipes of the scene world without a --root
    OUT/banks/             what the teacher said
    OUT/checkpoint/        where the run stands
    OUT/classifier/        the classifier that was chosen, for `cliplet eval` and `cliplet calibrate`
    OUT/report.json        what was measured; OUT/tensorboard/ the curves

Legend: N training images, V views, C classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from cliplet.artifact import library_versions
from cliplet.classifier import Classifier, ClassifierConfig
from cliplet.datasets import Dataset
from cliplet.errors import UsageError
from cliplet.labels import write_atomically
from cliplet.lock import lock_folder
from cliplet.pseudo_labels import cdul_labels
from cliplet.vocabulary import Vocabulary

from .ccd import ccd_objective, estimated_bias, label_quality, update_labels, update_latent_labels
from .classifier_recipe import WITH_TRUTH, ClassifierRecipe
from .loop import Learning, RunOptions, learn, read_back_precision
from .measuring import Watch, evaluated
from .objectives import Ccd, Cdul, Objective, baseline
from .run_data import DataOptions, refuse_too_few, run_data
from .run_folder import begin_run, clear_run, described
from .teacher_labels import PassOptions, TeacherLabels, teacher_labels
from .trunk_weights import load_trunk_weights, student_input, student_trunk, trunk_sha256
from .world import launched

SELECTION_SALT = 2  # tells the random choice of held-out images from others of the same seed


@dataclass(frozen=True)
class TrainOptions:
    """Where a run finds its images and how it is carried out.

    Nothing here changes what it ends with, but for the rounding of the device and of the teacher's engine.

    Attributes:
        banks: folder of the label banks, by default in the run's own.
        threads: of torch on the CPU; 0 leaves torch's choice.
        teacher_runtime: see `PassOptions`.
        overwrite: forget what an earlier run left in the folder.
    """

    data: DataOptions = DataOptions()
    banks: Path | None = None
    device: str = "cpu"
    threads: int = 0
    teacher_runtime: str | None = None
    overwrite: bool = False
    run: RunOptions = RunOptions()


def train_classifier(recipe: ClassifierRecipe, out: Path, options: TrainOptions) -> dict[str, Any]:
    """What was measured, after leaving in `out` a chosen classifier; continues a run that was stopped there.

    Raises:
        UsageError: `out` holds another run, or another process is writing it.
        DataError: the images are not what the recipe wants, or a loss is not finite.
        EnvironmentError_: weights or a device are missing.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    fabric = launched(recipe.precision, options.device, out)
    lock = lock_folder(out) if fabric.is_global_zero else None
    try:
        if recipe.batch < fabric.world_size:
            raise UsageError(
                f"batches of {recipe.batch} for {fabric.world_size} processes",
                "an image of each batch for every process",
                f"--batch-size {fabric.world_size}",
            )
        if fabric.is_global_zero and options.overwrite:
            clear_run(out)
        fabric.barrier()
        data, evaluation = run_data(recipe, out, options.data, fabric, options.run.quiet)
        told = [described(d) for d in (data, evaluation) if d is not None]
        finished = begin_run(recipe, told, out, fabric.is_global_zero, trunk_sha256(recipe))
        fabric.barrier()
        return finished or _train(recipe, data, evaluation, out, options, fabric)
    finally:
        if lock is not None:
            os.close(lock)


def _train(
    recipe: ClassifierRecipe,
    data: Dataset,
    evaluation: Dataset | None,
    out: Path,
    options: TrainOptions,
    fabric: Fabric,
) -> dict[str, Any]:
    banks = options.banks or out / "banks"
    passes = PassOptions(banks, options.run.workers, options.run.quiet, options.teacher_runtime)
    taught = None if recipe.method in WITH_TRUTH else teacher_labels(recipe, data, fabric, passes)
    kept = data if taught is None or taught.done_N.all() else data.subset(np.flatnonzero(taught.done_N))
    held_out, learned = split_held_out(recipe, len(kept.images))
    refuse_too_few(len(learned), len(held_out), recipe.batch, _unreadable(taught))
    probs_NVC = None if taught is None else taught.probs_NVC[taught.done_N]
    objective = make_objective(recipe, probs_NVC, kept)
    first = _first_labels(recipe, probs_NVC, objective, kept)
    torch.manual_seed(recipe.seed)
    classifier = new_classifier(recipe, kept.vocabulary)
    if recipe.method == "ccd" and recipe.label_update:
        refuse_fixed_size(classifier, recipe)
    learning = Learning(recipe, fabric, objective, classifier, kept, learned, out / "checkpoint", options.run)
    learning.resume()
    precision = read_back_precision(learning)
    # What the regions scored serves this run alone.
    own_passes = replace(passes, banks=out / "banks")
    learn(learning, _update(recipe, own_passes), Watch(out / "classifier", held_out, evaluation).measure)
    report = {
        "recipe": recipe.to_json(),
        "data": described(data),
        "evaluation": None if evaluation is None else described(evaluation),
        "images": {"learned": len(learned), "held_out": len(held_out), "unreadable": _unreadable(taught)},
        "skipped": learning.progress.skipped,
        "precision": precision,
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "labels": first,
        "history": learning.progress.history,
        "chosen_epoch": learning.progress.chosen,
        "measured": evaluated(learning.progress, out / "classifier", evaluation, learning),
        "versions": library_versions(),
    }
    if fabric.is_global_zero:
        write_atomically(out / "report.json", json.dumps(report, indent=2).encode())
    fabric.barrier()
    return report


def _unreadable(taught: TeacherLabels | None) -> dict[str, str]:
    return {} if taught is None else {e.path: f"{e.stage}: {e.reason}" for e in taught.errors}


def _first_labels(
    recipe: ClassifierRecipe, probs_NVC: np.ndarray | None, objective: Objective, data: Dataset
) -> dict[str, Any]:
    """What is known of the labels before anything is learned; with a truth, how good they are."""
    said: dict[str, Any] = {"per_image": float(objective.labels_NC.clip(0).sum(1).mean())}
    if probs_NVC is None:
        return said
    said |= label_quality(objective.labels_NC, data)
    if isinstance(objective, Ccd) and recipe.debias:
        bias = estimated_bias(recipe, probs_NVC[:, 0], data.vocabulary.names)
        named = zip(data.vocabulary.names, bias.value_C.tolist(), bias.images_C.tolist(), strict=True)
        said["bias"] = {name: {"value": value, "sure_images": count} for name, value, count in named}
    return said


def make_objective(recipe: ClassifierRecipe, probs_NVC: np.ndarray | None, data: Dataset) -> Objective:
    """The recipe's objective with its first labels."""
    if recipe.method == "ccd":
        assert probs_NVC is not None
        scores_NC = cdul_labels(probs_NVC, recipe.local_threshold)  # of one view, its own probabilities
        return ccd_objective(recipe, probs_NVC[:, 0], data.vocabulary.names, scores_NC)
    if recipe.method == "cdul":
        assert probs_NVC is not None
        return Cdul(recipe, cdul_labels(probs_NVC, recipe.local_threshold))
    whole_NC = np.zeros((0, 0), np.float32) if probs_NVC is None else probs_NVC[:, 0]
    return baseline(recipe, whole_NC, data.truth_NC)


def new_classifier(recipe: ClassifierRecipe, vocabulary: Vocabulary) -> Classifier:
    """An untrained classifier with the recipe's trunk, which it names so that it needs no folder of a trunk later."""
    config = ClassifierConfig(
        trunk=student_trunk(recipe), boost=recipe.boost, preprocessing=student_input(recipe)
    )
    classifier = Classifier(config, vocabulary)
    load_trunk_weights(classifier, recipe)
    return classifier


@torch.inference_mode()
def refuse_fixed_size(classifier: Classifier, recipe: ClassifierRecipe) -> None:
    """Raise `UsageError` if the trunk takes no images of the size at which regions are searched for."""
    classifier.eval()
    try:
        classifier(torch.zeros(1, 3, recipe.region_size, recipe.region_size))
    # Trunks complain of a size in whatever way comes first.
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"the trunk {recipe.trunk} sees images of {recipe.image_size} pixels only, regions are searched for at "
            f"{recipe.region_size}",
            "a convolutional trunk, or one size for both",
            f"--set region_size={recipe.image_size}",
        ) from error


def split_held_out(recipe: ClassifierRecipe, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the images that are held out and of those that are learned from, ascending."""
    chosen = np.random.default_rng([recipe.seed, SELECTION_SALT]).permutation(count)
    held_out = round(recipe.held_out * count) if recipe.selection == "held_out" else 0
    return np.sort(chosen[:held_out]), np.sort(chosen[held_out:])


def _update(recipe: ClassifierRecipe, passes: PassOptions) -> Callable[[Learning], dict[str, Any]]:
    if recipe.method == "ccd":
        return lambda learning: update_labels(learning, passes)
    if recipe.method == "cdul":
        return update_latent_labels
    return lambda learning: {}

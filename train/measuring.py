"""What is measured while a classifier learns and when it has learned.

Legend: N images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cliplet.classifier import Classifier, load_classifier, save_classifier
from cliplet.datasets import Dataset
from cliplet.metrics import average_precisions, mean_average_precision

from .loop import Learning
from .predict import prediction_batches, scored_batches
from .run_state import Progress
from .selection import held_out_map, is_chosen
from .world import gathered, summed


@dataclass(frozen=True, eq=False)
class Watch:
    """Measures after every epoch and keeps the classifier that the recipe's rule chooses."""

    folder: Path
    held_out: np.ndarray
    evaluation: Dataset | None

    def measure(self, learning: Learning, row: dict[str, Any]) -> None:
        recipe, progress = learning.recipe, learning.progress
        positives_NC = learning.objective.positives_NC
        if len(self.held_out):
            part = learning.data.subset(self.held_out)
            found = predictions(learning, part).scores_NC
            seen = np.isfinite(found).all(1)
            held_out = held_out_map(found[seen], positives_NC[self.held_out][seen])
            # Labels that name no class judge nothing, and JSON has no nan.
            if not np.isnan(held_out):
                row["held_out_map"] = held_out
        if recipe.selection == "released":
            exact_NC = learning.objective.labels_NC[learning.indices] == 1
            row["train_map"] = mean_average_precision(learning.train_scores_NC[learning.indices], exact_NC)
        last = row["epoch"] + 1 == recipe.epochs
        if self.evaluation is not None and (last or learning.options.evaluate_epochs):
            scores_NC = predictions(learning, self.evaluation).scores_NC
            row["eval_map"] = evaluation_map(scores_NC, self.evaluation)
        if is_chosen(recipe, progress.history, row, progress.chosen):
            progress.chosen = row["epoch"]
            if learning.fabric.is_global_zero:
                details = {"recipe": recipe.to_json(), "epoch": row["epoch"], "measured": dict(row)}
                save_classifier(self.folder, learning.classifier, details)


@dataclass(frozen=True, eq=False)
class Measured:
    """What a classifier says of a data set.

    Attributes:
        scores_NC: float32 [N, C], rows of unreadable images are nan.
        unreadable: path to reason of these.
    """

    scores_NC: np.ndarray
    unreadable: dict[str, str]


def predictions(learning: Learning, data: Dataset, classifier: Classifier | None = None) -> Measured:
    """Scores of the classifier under way, or of another; the processes share the work."""
    fabric = learning.fabric
    scores_NC = np.zeros((len(data.images), len(data.vocabulary.names)), np.float32)
    seen_N = np.zeros(len(data.images), np.uint8)
    unreadable: list[tuple[str, str]] = []
    for scored in scored_batches(
        classifier or learning.classifier,
        data.images,
        prediction_batches(len(data.images), fabric.global_rank, fabric.world_size),
        workers=learning.options.workers,
        precision=learning.recipe.precision,
        cache=learning.options.cache,
    ):
        scores_NC[scored.images.indices_B] = scored.logits_BC.sigmoid().cpu().numpy()
        seen_N[scored.images.indices_B] = 1
        unreadable += [(data.images[index].path, reason) for index, reason in scored.images.failed]
    whole_NC = summed(fabric, scores_NC)
    whole_NC[summed(fabric, seen_N) == 0] = np.nan
    return Measured(whole_NC, dict(gathered(fabric, unreadable)))


def evaluation_map(scores_NC: np.ndarray, data: Dataset) -> float:
    """mAP in percent over the images that could be read."""
    assert data.truth_NC is not None
    seen = np.isfinite(scores_NC).all(1)
    return mean_average_precision(scores_NC[seen], data.truth_NC[seen])


def evaluated(
    progress: Progress, folder: Path, evaluation: Dataset | None, learning: Learning
) -> dict[str, Any]:
    """How the chosen epoch's classifier does on the evaluation split, beside the last and the best epoch's.

    The best is known only because there is a truth to look at; nothing was chosen by it.
    """
    if evaluation is None:
        return {}
    chosen = classifier_from(folder, learning)
    found = predictions(learning, evaluation, chosen)
    seen = np.isfinite(found.scores_NC).all(1)
    assert evaluation.truth_NC is not None
    precisions = 100 * average_precisions(found.scores_NC[seen], evaluation.truth_NC[seen])
    each = [row["eval_map"] for row in progress.history if "eval_map" in row]
    return {
        "map": float(precisions.mean()),
        "last_map": each[-1],
        "best_map": max(each),
        "ap": dict(zip(evaluation.vocabulary.names, precisions.tolist(), strict=True)),
        "unreadable": found.unreadable,
    }


def classifier_from(folder: Path, learning: Learning) -> Classifier:
    """The kept classifier, on the device of the run and in its memory format."""
    layout = torch.channels_last if learning.recipe.channels_last else torch.contiguous_format
    return load_classifier(folder).to(device=learning.fabric.device, memory_format=layout)

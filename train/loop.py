"""The training loop: epochs of steps, with label updates, checkpoints and measurements at named places.

    learning = Learning(recipe, fabric, objective, classifier, data, out)
    learn(learning, update, measure)

Killed at any moment and started again, it ends with the weights of an undisturbed run.

Legend: B images of a batch, C classes, N training images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cliplet.classifier import Classifier
from cliplet.datasets import Dataset
from cliplet.errors import DataError
from cliplet.progress import ProgressBar

from .classifier_recipe import ClassifierRecipe
from .feed import SMALLEST_BATCH, ImageBatch, PixelCache, epoch_batches, image_batches, share_of
from .jitter import flips, jitter_parameters, jittered, mirrored, seed_layers, step_generator
from .objectives import Objective, Step
from .predict import PRECISIONS, unit_pixels
from .run_state import Progress, has_run_state, load_run_state, save_run_state
from .world import averaged_buffers, gathered, summed

CHECKPOINT_STEPS = 1000
LOG_STEPS = 20


class Learner(nn.Module):
    """What the optimiser changes: the classifier, and a table of labels for the method that learns one."""

    def __init__(self, classifier: Classifier, table_NC: Tensor | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.table = None if table_NC is None else nn.Parameter(table_NC)

    def forward(self, pixels_B3SS: Tensor, rows_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C], and the images' rows of the table."""
        logits_BC, _ = self.classifier(pixels_B3SS)
        return logits_BC, None if self.table is None else self.table[rows_B]


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes what it ends with.

    Attributes:
        workers: threads that decode.
        checkpoint_steps: steps between checkpoints; there is one at the end of each epoch anyway.
        cache: keeps decoded images in memory.
        evaluate_epochs: look at the evaluation split after every epoch, not only at the end.
        quiet: no progress bar.
    """

    workers: int = 1
    checkpoint_steps: int = CHECKPOINT_STEPS
    cache: PixelCache | None = None
    evaluate_epochs: bool = True
    quiet: bool = False


class Learning:
    """A run while it learns.

    Args:
        data: all training images, held-out ones included; `indices` are those that are learned from.
        folder: where the checkpoint lies.
    """

    def __init__(
        self,
        recipe: ClassifierRecipe,
        fabric: Fabric,
        objective: Objective,
        classifier: Classifier,
        data: Dataset,
        indices: np.ndarray,
        folder: Path,
        options: RunOptions,
    ) -> None:
        self.recipe = recipe
        self.fabric = fabric
        self.objective = objective
        self.data = data
        self.indices = indices
        self.folder = folder
        self.options = options
        self.progress = Progress()
        # Scores while training, for the public code's way to choose an epoch.
        self.train_scores_NC = np.zeros(objective.labels_NC.shape, np.float32)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.learner = Learner(classifier.to(memory_format=layout), objective.table())
        model, optimizer = fabric.setup(self.learner, _optimizer(self.learner, recipe))
        self.model, self.optimizer = model, optimizer
        self.averaged = (
            AveragedModel(self.learner, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
            if recipe.average
            else None
        )

    @property
    def classifier(self) -> Classifier:
        """What is evaluated and kept: the classifier, or the running average of it."""
        learner = self.averaged.module if self.averaged is not None else self.learner
        classifier: Classifier = learner.classifier
        return classifier

    def batches(self) -> list[np.ndarray]:
        """Positions of the images of each batch of the epoch that the progress stands at, over all processes."""
        recipe = self.recipe
        least = max(SMALLEST_BATCH, self.fabric.world_size)
        return epoch_batches(self.indices, recipe.batch, recipe.seed, self.progress.epoch, least)

    def share(self) -> None:
        """Make what each process noted of its own images known to all, and their batch statistics one.

        The first process then holds the epoch's sums, the others nothing, so that they add up as before.
        """
        if self.fabric.world_size == 1:
            return
        rank, world = self.fabric.global_rank, self.fabric.world_size
        own = np.concatenate([share_of(batch, rank, world) for batch in self.batches()])
        for array_NC in (self.train_scores_NC, self.objective.labels_NC):
            mine_NC = np.zeros_like(array_NC)
            mine_NC[own] = array_NC[own]
            array_NC[self.indices] = summed(self.fabric, mine_NC)[self.indices]
        self.progress.skipped = dict(gathered(self.fabric, list(self.progress.skipped.items())))
        sums = summed(self.fabric, np.array([self.progress.loss_sum, self.progress.images]))
        if rank > 0:
            sums[:] = 0
        self.progress.loss_sum, self.progress.images = float(sums[0]), int(sums[1])
        for module in self._modules().values():
            averaged_buffers(self.fabric, module)

    def note_skipped(self, batch: ImageBatch) -> None:
        """Keep the names of images that could not be read, and why."""
        for index, reason in batch.failed:
            self.progress.skipped[self.data.images[index].path] = reason

    def save(self) -> None:
        """Replace the checkpoint."""
        self.share()
        if self.fabric.is_global_zero:
            arrays = {**self.objective.state(), "train_scores": self.train_scores_NC}
            scaler = self.fabric.strategy.precision.state_dict()
            save_run_state(self.folder, self._modules(), self._torch_optimizer, arrays, self.progress, scaler)
        self.fabric.barrier()

    def resume(self) -> bool:
        """Go back to the checkpoint, if there is one."""
        if not has_run_state(self.folder):
            return False
        arrays, self.progress, scaler = load_run_state(self.folder, self._modules(), self._torch_optimizer)
        if not self.fabric.is_global_zero:
            self.progress.loss_sum, self.progress.images = 0.0, 0
        self.train_scores_NC = np.array(arrays.pop("train_scores"))
        self.objective.load_state(arrays)
        self.fabric.strategy.precision.load_state_dict(scaler)
        return True

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"learner": self.learner}
        return modules if self.averaged is None else modules | {"average": self.averaged}

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer


def _optimizer(learner: Learner, recipe: ClassifierRecipe) -> torch.optim.Adam:
    rate = recipe.learning_rate
    groups = [
        {"params": list(learner.classifier.trunk.parameters()), "lr": rate},
        {"params": list(learner.classifier.head.parameters()), "lr": rate * recipe.head_factor},
    ]
    if learner.table is not None:
        groups.append({"params": [learner.table], "lr": rate * recipe.head_factor, "weight_decay": 0.0})
    return torch.optim.Adam(groups, lr=rate, weight_decay=recipe.weight_decay)


def learn(
    learning: Learning,
    update: Callable[[Learning], dict[str, Any]],
    measure: Callable[[Learning, dict[str, Any]], None],
) -> None:
    """Train to the recipe's last epoch, from wherever the checkpoint is.

    Args:
        update: changes the objective's labels before an epoch of `update_epochs`; what it returns goes into the
            epoch's row of the history.
        measure: called after every epoch with its row, which it may add to.

    Raises:
        DataError: a loss that is not finite; the last checkpoint is from before it.
    """
    progress = learning.progress
    while progress.epoch < learning.recipe.epochs:
        began = time.perf_counter()
        row = progress.row
        row["epoch"] = progress.epoch
        if progress.epoch in learning.recipe.update_epochs and progress.updated < progress.epoch:
            row |= update(learning)
            progress.updated = progress.epoch
            learning.save()
        train_epoch(learning)
        row["loss"] = _mean_loss(learning)
        measure(learning, row)
        row["seconds"] = round(time.perf_counter() - began, 2)
        progress.next_epoch()
        learning.fabric.log_dict({k: v for k, v in row.items() if isinstance(v, float)}, step=progress.epoch)
        learning.save()


def _mean_loss(learning: Learning) -> float:
    sums = summed(learning.fabric, np.array([learning.progress.loss_sum, learning.progress.images]))
    return float(sums[0] / max(sums[1], 1))


def train_epoch(learning: Learning) -> None:
    """The remaining steps of the epoch that the progress stands at."""
    recipe, progress, fabric = learning.recipe, learning.progress, learning.fabric
    learning.learner.train()
    batches = learning.batches()
    shares = [share_of(batch, fabric.global_rank, fabric.world_size) for batch in batches]
    rest = range(progress.step, len(batches))
    feed = image_batches(
        learning.data.images,
        [shares[s] for s in rest],
        recipe.image_size,
        learning.options.workers,
        learning.options.cache,
    )
    title = f"epoch {progress.epoch + 1}/{recipe.epochs}"
    quiet = learning.options.quiet or not fabric.is_global_zero
    with ProgressBar(title, len(rest), "steps", quiet=quiet) as bar:
        for step, batch in zip(rest, feed, strict=True):
            loss = train_step(learning, batch, len(batches[step]), step)
            progress.loss_sum += loss * len(batch.indices_B)
            progress.images += len(batch.indices_B)
            progress.step = step + 1
            if step % LOG_STEPS == 0:
                fabric.log("loss", loss, step=progress.epoch * len(batches) + step)
            if progress.step % learning.options.checkpoint_steps == 0 and progress.step < len(batches):
                learning.save()
            bar.advance(1)
    learning.share()


def train_step(learning: Learning, batch: ImageBatch, wanted: int, step: int) -> float:
    """The loss of one step of the optimiser.

    Args:
        wanted: images in the batch over all processes, decodable or not.
    """
    recipe, fabric = learning.recipe, learning.fabric
    learning.note_skipped(batch)
    if not len(batch.indices_B):
        raise _nothing_left(learning, batch)
    generator = step_generator(recipe.seed, learning.progress.epoch, step)
    seed_layers(recipe.seed, learning.progress.epoch, step, fabric.global_rank)
    draws = _Draws(wanted, recipe.jitter, generator, fabric)
    parts = np.array_split(np.arange(len(batch.indices_B)), min(recipe.accumulate, len(batch.indices_B)))
    # The processes' gradients are averaged; one with more images of the batch than others counts for more.
    weight = fabric.world_size * (len(batch.indices_B) + len(batch.failed)) / wanted
    total = 0.0
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with fabric.no_backward_sync(learning.model, enabled=not last):
            loss = _part_loss(learning, batch, part, draws)
            fabric.backward(loss * (weight * len(part) / len(batch.indices_B)))
        total += float(loss.detach()) * len(part) / len(batch.indices_B)
        if not np.isfinite(total):
            paths = (learning.data.images[i].path for i in batch.indices_B)
            raise not_finite(learning.progress.epoch, step, paths, learning.folder)
    learning.optimizer.step()
    learning.optimizer.zero_grad(set_to_none=True)
    if learning.averaged is not None:
        learning.averaged.update_parameters(learning.learner)
    return total


class _Draws:
    """The random numbers of a step, for the images of this process.

    They are drawn for the batch of all processes, so that an image's do not depend on how many there are.
    """

    def __init__(self, wanted: int, strength: float, generator: torch.Generator, fabric: Fabric) -> None:
        own = torch.arange(wanted)[fabric.global_rank :: fabric.world_size]
        self.flip = flips(wanted, generator)[own]
        self.strong_flip = flips(wanted, generator)[own]
        factors, order = jitter_parameters(wanted, strength, generator)
        self.factors, self.order = factors[own], order[own]


def _part_loss(learning: Learning, batch: ImageBatch, part: np.ndarray, draws: _Draws) -> Tensor:
    fabric, epoch = learning.fabric, learning.progress.epoch
    places = torch.from_numpy(batch.places_B[part])
    pixels = unit_pixels(batch.pixels_BSS3[part], fabric.device)
    indices = batch.indices_B[part]
    rows = torch.from_numpy(indices).to(fabric.device)
    logits, table = learning.model(mirrored(pixels, draws.flip[places]), rows)
    strong = None
    if learning.objective.wants_strong(epoch):
        changed = jittered(pixels, draws.factors[places], draws.order[places])
        strong, _ = learning.model(mirrored(changed, draws.strong_flip[places]), rows)
    learning.train_scores_NC[indices] = logits.detach().sigmoid().float().cpu().numpy()
    return learning.objective.loss(Step(indices, logits, strong, table, epoch))


def _nothing_left(learning: Learning, batch: ImageBatch) -> DataError:
    index, reason = batch.failed[0]
    return DataError(
        f"no image of a batch of {len(batch.failed)} could be read; {learning.data.images[index].path}: {reason}",
        "the images that were there when training began",
        "bring them back, then run the same command again to continue",
    )


def not_finite(epoch: int, step: int, paths: Iterable[str], folder: Path) -> DataError:
    """The error of a step whose loss is not finite.

    Args:
        epoch, step: from 0.
        paths: the images of the batch.
        folder: of the checkpoint.
    """
    return DataError(
        f"the loss of epoch {epoch + 1}, step {step + 1} is not finite; its images: {', '.join(paths)}",
        f"a finite loss; the last good checkpoint is kept in {folder}",
        "look at these images, or start anew with a lower --learning-rate or --precision fp32",
    )


def read_back_precision(learning: Learning) -> str:
    """The precision that the classifier's head was seen to compute in; must be the one that was asked for."""
    seen: list[torch.dtype] = []
    # Of the network that learns: a running average of it takes part in no step.
    head = learning.learner.classifier.head
    handle = head.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    try:
        size = learning.recipe.image_size
        pixels = torch.zeros(2, 3, size, size, device=learning.fabric.device)
        learning.learner.eval()
        with torch.inference_mode():
            learning.model(pixels, torch.zeros(2, dtype=torch.int64, device=learning.fabric.device))
    finally:
        handle.remove()
    found = next(name for name, dtype in PRECISIONS.items() if dtype == seen[0])
    if found != learning.recipe.precision:
        raise DataError(f"training computes in {found}", f"{learning.recipe.precision}, as the recipe says")
    return found

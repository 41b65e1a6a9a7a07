"""The training loop of cluster discrimination: a trunk learns to tell the clusters of its images apart.

    learning = TrunkLearning(recipe, fabric, learner, centres, images, labels_NL, folder, options)
    learn(learning)

The trunk is the same in every process and its gradients are averaged (DDP); every process holds its own range of the
class centres, whose gradients are its own. Killed at any moment and started again, it ends with the weights of an
undisturbed run.

Legend: N images, B images of a batch, L clusters that are an image's labels, D features, S side of the input.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from cliplet.errors import DataError, UsageError
from cliplet.listing import ImageRef
from cliplet.progress import ProgressBar

from .class_centres import ClassCentres
from .crops import ROOM, crop_draws, cropped
from .feed import SMALLEST_BATCH, ImageBatch, epoch_batches, image_batches, share_of
from .jitter import seed_layers, step_generator
from .loop import LOG_STEPS, RunOptions, not_finite
from .mlcd_recipe import MlcdRecipe
from .predict import PRECISIONS, unit_pixels
from .run_state import Progress, has_run_state, load_run_state, save_run_state
from .shards import place, times_world, whole_on_first
from .world import averaged_buffers, gathered

WARMUP_SHARE = 10  # a run of few steps warms up for a tenth of them


class Learner(nn.Module):
    """What all processes share: the trunk, and the neck between its features and the class centres.

    Args:
        mean, std: of RGB values in 0..1, as the trunk is fed.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, trunk: nn.Module, neck: nn.Module, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.trunk, self.neck = trunk, neck
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Features float32 [B, D] for the class centres, of RGB images in 0..1."""
        features_BD: Tensor = self.neck(self.trunk((pixels_B3SS - self.mean) / self.std).float())
        return features_BD


class TrunkLearning:
    """A run while it learns.

    Args:
        images: all of them can be read, as far as is known.
        labels_NL: int32, each image's nearest clusters, nearest first.
        folder: where the checkpoint lies.
    """

    def __init__(
        self,
        recipe: MlcdRecipe,
        fabric: Fabric,
        learner: Learner,
        centres: ClassCentres,
        images: Sequence[ImageRef],
        labels_NL: np.ndarray,
        folder: Path,
        options: RunOptions,
    ) -> None:
        self.recipe, self.fabric, self.options, self.folder = recipe, fabric, options, folder
        self.images, self.labels_NL = images, labels_NL
        self.progress = Progress()
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.layout = layout
        self.learner = learner.to(memory_format=layout)
        self.model = fabric.setup_module(self.learner)
        self.centres = centres.to(fabric.device)
        self.optimizer = _trunk_optimizer(self.learner, recipe)
        self.centres_optimizer = torch.optim.AdamW(
            self.centres.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.steps = recipe.epochs * len(self.batches())

    def batches(self) -> list[np.ndarray]:
        """Positions of the images of each batch of the epoch that the progress stands at, over all processes."""
        recipe = self.recipe
        least = SMALLEST_BATCH * self.fabric.world_size
        return epoch_batches(
            np.arange(len(self.images)), recipe.batch, recipe.seed, self.progress.epoch, least
        )

    def save(self) -> None:
        """Replace the checkpoint: what all share, and the centres of all processes in one matrix."""
        self.share()
        # Sorted, for all processes have to send the same one at a time, and a checkpoint is read in any order.
        slots = dict(sorted(self.centres_optimizer.state.get(self.centres.centres, {}).items()))
        wholes = {"centres": whole_on_first(self.centres.centres)}
        wholes |= {name: whole_on_first(t) for name, t in slots.items() if t.ndim}
        if self.fabric.is_global_zero:
            arrays = {name: whole.numpy() for name, whole in wholes.items() if whole is not None}
            arrays |= {name: t.cpu().numpy() for name, t in slots.items() if not t.ndim}
            scaler = self.fabric.strategy.precision.state_dict()
            modules = {"learner": self.learner}
            save_run_state(self.folder, modules, self.optimizer, arrays, self.progress, scaler)
        self.fabric.barrier()

    def resume(self) -> bool:
        """Go back to the checkpoint, if there is one; it may be that of another number of processes."""
        if not has_run_state(self.folder):
            return False
        modules = {"learner": self.learner}
        arrays, self.progress, scaler = load_run_state(self.folder, modules, self.optimizer)
        own = {
            name: torch.from_numpy(np.array(a)) if a.ndim == 0 else self._own(a) for name, a in arrays.items()
        }
        with torch.no_grad():
            self.centres.centres.copy_(own.pop("centres"))
        groups = self.centres_optimizer.state_dict()["param_groups"]
        self.centres_optimizer.load_state_dict({"state": {0: own} if own else {}, "param_groups": groups})
        self.fabric.strategy.precision.load_state_dict(scaler)
        return True

    def _own(self, whole_KD: np.ndarray) -> Tensor:
        return self.centres.own_rows(torch.from_numpy(np.array(whole_KD)))

    def share(self) -> None:
        """Make the statistics of batch normalisation one, and the images that any process could not read known."""
        averaged_buffers(self.fabric, self.learner)
        self.progress.skipped = dict(gathered(self.fabric, list(self.progress.skipped.items())))


def learn(learning: TrunkLearning) -> None:
    """Train to the recipe's last epoch, from wherever the checkpoint is.

    Raises:
        DataError: a loss that is not finite, or a batch without images; the last checkpoint is from before it.
    """
    progress = learning.progress
    while progress.epoch < learning.recipe.epochs:
        began, before = time.perf_counter(), progress.images
        train_epoch(learning)
        seconds = time.perf_counter() - began
        row = progress.row
        row["epoch"] = progress.epoch
        row["loss"] = progress.loss_sum / progress.step
        row["seconds"] = round(seconds, 2)
        row["images_per_second"] = round((progress.images - before) / seconds, 1)
        progress.next_epoch()
        told = {name: value for name, value in row.items() if isinstance(value, float)}
        learning.fabric.log_dict(told, step=progress.epoch)
        learning.save()


def train_epoch(learning: TrunkLearning) -> None:
    """The remaining steps of the epoch that the progress stands at."""
    recipe, progress, fabric = learning.recipe, learning.progress, learning.fabric
    learning.learner.train()
    batches = learning.batches()
    rest = range(progress.step, len(batches))
    shares = [share_of(batches[s], fabric.global_rank, fabric.world_size) for s in rest]
    options, side = learning.options, round(ROOM * recipe.image_size)
    feed = image_batches(learning.images, shares, side, options.workers, options.cache)
    quiet = options.quiet or not fabric.is_global_zero
    title = f"epoch {progress.epoch + 1}/{recipe.epochs}"
    with ProgressBar(title, len(batches), "steps", done=progress.step, quiet=quiet) as bar:
        for step, batch in zip(rest, feed, strict=True):
            loss = train_step(learning, batch, len(batches[step]), step)
            progress.loss_sum += loss
            progress.images += len(batches[step])
            progress.step = step + 1
            if step % LOG_STEPS == 0:
                fabric.log("loss", loss, step=progress.epoch * len(batches) + step)
            if progress.step % options.checkpoint_steps == 0 and progress.step < len(batches):
                learning.save()
            bar.advance(1)


def train_step(learning: TrunkLearning, batch: ImageBatch, wanted: int, step: int) -> float:
    """The mean loss over the batch of all processes, after one step of the optimisers.

    Args:
        wanted: images in the batch over all processes, decodable or not.
        step: within the epoch.
    """
    recipe, fabric, epoch = learning.recipe, learning.fabric, learning.progress.epoch
    for index, reason in batch.failed:
        learning.progress.skipped[learning.images[index].path] = reason
    if len(batch.indices_B) < SMALLEST_BATCH:
        raise _nothing_left(learning, batch)
    # Drawn for the batch of all processes, so that an image's crop does not depend on how many there are.
    boxes, flip = crop_draws(wanted, recipe.least_crop, step_generator(recipe.seed, epoch, step))
    own = share_of(np.arange(wanted), *place())[batch.places_B]
    pixels = unit_pixels(batch.pixels_BSS3, fabric.device)
    crops = cropped(pixels, boxes[own], flip[own], recipe.image_size)
    labels = torch.from_numpy(learning.labels_NL[batch.indices_B].astype(np.int64)).to(fabric.device)
    number = epoch * (learning.steps // recipe.epochs) + step
    _set_rates(learning, number)
    seed_layers(recipe.seed, epoch, step, fabric.global_rank)
    features = times_world(learning.model(crops.contiguous(memory_format=learning.layout)))
    with fabric.autocast():
        loss = learning.centres(features, labels, number)
    found = float(loss.detach())
    if not math.isfinite(found):
        paths = gathered(fabric, [learning.images[i].path for i in batch.indices_B])
        raise not_finite(epoch, step, paths, learning.folder)
    fabric.backward(loss)
    _step_optimizers(learning)
    return found


def _set_rates(learning: TrunkLearning, number: int) -> None:
    recipe = learning.recipe
    rate = rate_at(recipe, number, learning.steps)
    for group in learning.optimizer.param_groups:
        group["lr"] = rate
    for group in learning.centres_optimizer.param_groups:
        group["lr"] = rate * recipe.centres_factor


def rate_at(recipe: MlcdRecipe, number: int, steps: int) -> float:
    """The trunk's learning rate at step `number` of `steps`."""
    warmup = min(recipe.warmup_steps, max(1, steps // WARMUP_SHARE))
    if number < warmup:
        return recipe.learning_rate * (number + 1) / warmup
    done = (number - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _step_optimizers(learning: TrunkLearning) -> None:
    optimizers = (learning.optimizer, learning.centres_optimizer)
    scaler = getattr(learning.fabric.strategy.precision, "scaler", None)
    if scaler is None:
        for optimizer in optimizers:
            optimizer.step()
    else:
        _agree_on_overflow(learning)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def _agree_on_overflow(learning: TrunkLearning) -> None:
    """Make an overflow in one process's centres known to all: else scale and skipped steps would differ."""
    gradient = learning.centres.centres.grad
    assert gradient is not None
    overflown = (~torch.isfinite(gradient).all()).float()
    if learning.fabric.world_size > 1:
        torch.distributed.all_reduce(overflown, op=torch.distributed.ReduceOp.MAX)
    gradient.add_(torch.where(overflown > 0, math.inf, 0.0))


def _trunk_optimizer(learner: Learner, recipe: MlcdRecipe) -> torch.optim.AdamW:
    parameters = list(learner.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate)


def _nothing_left(learning: TrunkLearning, batch: ImageBatch) -> DataError:
    index, reason = batch.failed[0]
    return DataError(
        f"{len(batch.failed)} images of a batch could not be read; {learning.images[index].path}: {reason}",
        "the images that were there when they were embedded",
        "bring them back, then run the same command again to continue",
    )


def new_neck(kind: str, width: int) -> nn.Module:
    """What centres and scales features while a trunk learns, or nothing."""
    return nn.BatchNorm1d(width, affine=False) if kind == "batchnorm" else nn.Identity()


def set_gradient_checkpointing(trunk: nn.Module, name: str) -> None:
    """Make a trunk recompute what lies between its blocks.

    Raises:
        UsageError: it cannot.
    """
    try:
        trunk.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"the trunk {name} has no gradient checkpointing",
            "one with set_grad_checkpointing: most of timm's and open_clip's",
            "--set gradient_checkpointing=false",
        ) from error


def read_back_precision(learning: TrunkLearning) -> str:
    """The precision that the trunk was seen to compute in; must be the one that was asked for."""
    seen: list[torch.dtype] = []
    layers = (m for m in learning.learner.trunk.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    handle = next(layers).register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    try:
        learning.learner.eval()
        with torch.inference_mode():
            size = learning.recipe.image_size
            learning.model(torch.zeros(2, 3, size, size, device=learning.fabric.device))
    finally:
        handle.remove()
    found = next(name for name, dtype in PRECISIONS.items() if dtype == seen[0])
    if found != learning.recipe.precision:
        raise DataError(f"training computes in {found}", f"{learning.recipe.precision}, as the recipe says")
    return found

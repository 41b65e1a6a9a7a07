"""Everything that a stopped run needs to go on as if it had not stopped: weights, optimiser, labels, counters.

Randomness needs no state: it is drawn anew from seed, epoch and step, that of the network's own layers included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cliplet.checkpoint import load_arrays, save_arrays

STEM = "checkpoint"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch, step: the next step to do.
        updated: the last epoch whose label update is done; -1 before the first.
        loss_sum: of the epoch's steps so far; images: that it has seen.
        row: measurements of the epoch under way; history: of the finished ones.
        chosen: the epoch whose classifier is kept so far; -1 before the first.
        skipped: images that could not be read while training: path to reason.
    """

    epoch: int = 0
    step: int = 0
    updated: int = -1
    loss_sum: float = 0.0
    images: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    chosen: int = -1
    skipped: dict[str, str] = field(default_factory=dict)

    def next_epoch(self) -> None:
        """Close the epoch under way."""
        self.history.append(self.row)
        self.epoch, self.step, self.loss_sum, self.images, self.row = self.epoch + 1, 0, 0.0, 0, {}


def save_run_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    arrays: Mapping[str, np.ndarray],
    progress: Progress,
    scaler: Mapping[str, Any],
) -> None:
    """Replace the checkpoint in `folder`."""
    state = optimizer.state_dict()
    saved = {f"array.{name}": array for name, array in arrays.items()}
    saved |= module_arrays(modules)
    saved |= slot_arrays(state["state"])
    details = {"progress": vars(progress), "groups": state["param_groups"], "scaler": dict(scaler)}
    save_arrays(folder, STEM, saved, details)


def load_run_state(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, np.ndarray], Progress, dict[str, Any]]:
    """Arrays, progress and scaler of the checkpoint in `folder`; modules and optimiser are set to it.

    Raises:
        ArtifactError: it is damaged.
    """
    saved, details = load_arrays(folder, STEM)
    set_modules(modules, saved)
    optimizer.load_state_dict({"state": slots_of(saved), "param_groups": details["groups"]})
    arrays = {n.removeprefix("array."): a for n, a in saved.items() if n.startswith("array.")}
    return arrays, Progress(**details["progress"]), details["scaler"]


def module_arrays(modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
    """The modules' states as `PREFIX.NAME`."""
    return {
        f"{prefix}.{name}": tensor.detach().cpu().numpy()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def set_modules(modules: Mapping[str, nn.Module], saved: Mapping[str, np.ndarray]) -> None:
    """Set the modules to what `module_arrays` gave."""
    for prefix, module in modules.items():
        begin = f"{prefix}."
        own = {n.removeprefix(begin): torch.from_numpy(a) for n, a in saved.items() if n.startswith(begin)}
        module.load_state_dict(own)


def slot_arrays(slots: Mapping[int, Mapping[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """What an optimiser remembers of its parameters, by their numbers, as `optimizer.NUMBER.NAME`."""
    return {
        f"optimizer.{number}.{name}": tensor.detach().cpu().numpy()
        for number, of_parameter in slots.items()
        for name, tensor in of_parameter.items()
    }


def slots_of(saved: Mapping[str, np.ndarray]) -> dict[int, dict[str, torch.Tensor]]:
    """What `slot_arrays` was given."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, array in saved.items():
        if name.startswith("optimizer."):
            _, number, slot = name.split(".")
            slots.setdefault(int(number), {})[slot] = torch.from_numpy(array)
    return slots


def has_run_state(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint."""
    return (folder / f"{STEM}.json").exists()

"""Processes that a test starts together under `torch.distributed` with gloo, and what each of them computes."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from cliplet.checkpoint import load_arrays, save_arrays
from cliplet.train.class_centres import ClassCentres
from cliplet.train.cluster_losses import LossKind, LossSettings
from cliplet.train.shards import (
    log_sum_exp_over_ranks,
    place,
    row_counts,
    rows_of_all,
    times_world,
    whole_on_first,
)

Found = dict[str, np.ndarray]

WIDTH = 6
STEP = 3
# Clusters, width, images a process, positives, rate: most are AdamW's step, then cosines.
MEMORY = [(20_000, 64, 8, 8, 0.1), (4_000, 16, 512, 1, 0.5)]


@dataclass(frozen=True)
class Case:
    """One batch and its loss. 11 clusters in three processes are 4, 4 and 3 of them, 7 images 3, 2 and 2."""

    kind: LossKind = "mlcd"
    rate: float = 0.4
    classes: int = 11
    images: int = 7
    positives: int = 4
    dtype: torch.dtype = torch.float64
    scale: float = 8.0
    angle: float = 0.0
    threshold: float = 0.0
    bf16: bool = False

    @property
    def settings(self) -> LossSettings:
        return LossSettings(
            kind=self.kind,
            scale=self.scale,
            angle=self.angle,
            margin=0.05,
            threshold=self.threshold,
            negative_rate=self.rate,
            positives=self.positives,
        )


CASES: dict[str, Case] = {
    "mlcd": Case(),
    "mlcd full": Case(rate=1.0),
    "mlcd threshold": Case(threshold=0.2),
    "mlcd few negatives": Case(rate=0.05),
    "mlcd float32": Case(dtype=torch.float32),
    "mlcd float32 scale 32": Case(dtype=torch.float32, scale=32.0, classes=300, images=24, positives=8),
    "mlcd scale 32": Case(scale=32.0, classes=300, images=24, positives=8),
    "mlcd bfloat16": Case(dtype=torch.float32, bf16=True),
    "mlc": Case(kind="mlc"),
    "mlc float32": Case(kind="mlc", dtype=torch.float32, classes=50),
    "unicom": Case(kind="unicom", angle=0.3),
    "fewer images than processes": Case(images=1),
    "a cluster a process": Case(classes=3, positives=2, rate=1.0),
}


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """Features, and labels among which some repeat and some are missing."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(case.images, WIDTH, generator=generator, dtype=torch.float64).to(case.dtype)
    labels = torch.randint(case.classes, (case.images, case.positives), generator=generator)
    labels[0, 1] = labels[0, 0]
    labels[-1, 1:] = -1
    if case.images > 2:
        labels[1] = -1
    return features, labels


def outcome(case: Case, folder: Path) -> Found:
    """Loss and gradients of this process's share of the batch, before and after a step of AdamW."""
    rank, world = place()
    own = np.array_split(np.arange(case.images), world)[rank]
    features, labels = (t[torch.from_numpy(own)] for t in batch(case))
    centres = ClassCentres(case.classes, WIDTH, case.settings, seed=5).to(case.dtype)
    features.requires_grad_()
    optimizer = torch.optim.AdamW(centres.parameters(), lr=0.1)
    found = {"drawn": centres.drawn(STEP).numpy() + centres.held.start}
    for number in range(2):
        optimizer.zero_grad()
        features.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.bf16):
            loss = centres(features, labels, STEP + number)
        loss.backward()
        assert features.grad is not None and centres.centres.grad is not None
        found |= {
            f"loss {number}": loss.detach().numpy()[None],
            f"features {number}": features.grad.numpy().copy(),
            f"centres {number}": centres.centres.grad.numpy().copy(),
        }
        optimizer.step()
    found["rows"] = centres.centres.detach().numpy().copy()
    whole = whole_on_first(centres.centres)
    assert (whole is None) == (rank > 0)
    if whole is not None:
        save_arrays(folder, "centres", {"centres": whole.numpy()}, {})
    return found


def trunk_outcome() -> Found:
    """Gradients of a trunk, averaged by DDP where there are several processes, under the loss of all images."""
    rank, world = place()
    case = Case()
    own = torch.from_numpy(np.array_split(np.arange(case.images), world)[rank])
    images, labels = batch(case)
    torch.manual_seed(0)
    trunk: nn.Module = nn.Linear(WIDTH, WIDTH).double()
    learner = trunk if world == 1 else DistributedDataParallel(trunk)
    centres = ClassCentres(case.classes, WIDTH, case.settings).double()
    centres(times_world(learner(images[own])), labels[own], STEP).backward()
    return {
        name: parameter.grad.numpy()
        for name, parameter in trunk.named_parameters()
        if parameter.grad is not None
    }


def collectives() -> Found:
    """Of the processes' rows 0; 10, 11; 20, 21, 22: all of them, and a log-sum-exp that overflows if it can."""
    rank, world = place()
    own = torch.arange(10.0 * rank, 10.0 * rank + rank + 1)[:, None].requires_grad_()
    everything = rows_of_all(own, row_counts(own))
    # Each process uses the rows in its own way, and gets the sum of what all of them want of its rows.
    (everything * (rank + 1)).sum().backward()
    partial = torch.tensor([1000.0 + rank, -1000.0 - rank, -1e30], requires_grad=True)
    summed = log_sum_exp_over_ranks(partial)
    summed.sum().backward()
    assert own.grad is not None and partial.grad is not None
    whole = whole_on_first(own)
    return {
        "whole": np.empty(0) if whole is None else whole.numpy(),
        "rows": everything.detach().numpy(),
        "rows gradient": own.grad.numpy(),
        "sum": summed.detach().numpy(),
        "sum gradient": partial.grad.numpy(),
    }


def errors() -> Found:
    """What every process says of a label that one of them got wrong, of being one too many, and what DDP says."""
    centres = ClassCentres(11, WIDTH, LossSettings(positives=1))
    labels = torch.tensor([[11 if place()[0] == 0 else 0]])
    said = []
    for tried in (
        lambda: centres(torch.ones(1, WIDTH), labels, 0),
        lambda: ClassCentres(1, WIDTH, LossSettings()),
        lambda: DistributedDataParallel(centres),
    ):
        try:
            tried()
            said.append("nothing")
        except Exception as error:  # noqa: BLE001
            said.append(f"{type(error).__name__}: {error}")
    return {"said": np.array(said)}


def resumed(folder: Path) -> Found:
    """A case begun anew with the centres that other processes ended with."""
    case = CASES["mlcd"]
    rank, world = place()
    own = torch.from_numpy(np.array_split(np.arange(case.images), world)[rank])
    features, labels = batch(case)
    centres = ClassCentres(case.classes, WIDTH, case.settings, seed=99).to(case.dtype)
    whole = torch.from_numpy(load_arrays(folder, "centres")[0]["centres"])
    with torch.no_grad():
        centres.centres.copy_(centres.own_rows(whole))
    loss = centres(features[own], labels[own], STEP)
    loss.backward()
    assert centres.centres.grad is not None
    rows, gradient = centres.centres.detach(), centres.centres.grad
    return {"rows": rows.numpy(), "centres": gradient.numpy(), "loss": loss.detach().numpy()[None]}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still live, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        made = function(*given, **(named or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def most_bytes(classes: int, width: int, images: int, positives: int, rate: float) -> int:
    """Bytes of the tensors of this process in the worst moment of its second step."""
    settings = LossSettings(negative_rate=rate, positives=positives)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images, positives), generator=generator)
    features = torch.randn(images, width, generator=generator, requires_grad=True)
    with LiveBytes() as counted:
        centres = ClassCentres(classes, width, settings)
        optimizer = torch.optim.AdamW(centres.parameters(), foreach=False)
        for step in range(2):
            counted.most = 0
            centres(features, labels, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            features.grad = None
    return counted.most


def memory() -> Found:
    """What the processes need for `MEMORY`."""
    return {"bytes": np.array([most_bytes(*given) for given in MEMORY])}


def run_ranks(folder: Path, part: str, worlds: list[int]) -> None:
    """A part in as many processes at once as each of `worlds` says, into `FOLDER/WORLD/NAME_RANK.npz`."""
    command = [sys.executable, __file__, str(folder), part, *map(str, worlds)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr


def _centres(out: Path, first: Path) -> dict[str, Found]:
    found = {name: outcome(case, out / name) for name, case in CASES.items()}
    distributed.barrier()
    found |= {"trunk": trunk_outcome(), "memory": memory(), "errors": errors()}
    return found | {"resumed": resumed(first / "mlcd")}


def _shards(out: Path, first: Path) -> dict[str, Found]:
    return {"collectives": collectives()}


PARTS: dict[str, Callable[[Path, Path], dict[str, Found]]] = {"centres": _centres, "shards": _shards}


def _run(folder: Path, part: str, rank: int, world: int, first: int) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/{world}.store", timedelta(seconds=250)
    distributed.init_process_group("gloo", store, patience, world_size=world, rank=rank)
    out = folder / str(world)
    for name, arrays in PARTS[part](out, folder / str(first)).items():
        np.savez(out / f"{name}_{rank}.npz", allow_pickle=False, **arrays)
    distributed.barrier()


def _main(folder: Path, part: str, worlds: list[int]) -> None:
    if part == "centres":
        # Each process's first optimiser would import it, in seconds.
        import_module("torch._dynamo")
    for world in worlds:
        (folder / str(world)).mkdir()
        children = []
        for rank in range(world):
            # Importing is what takes long; nothing was computed yet, hence there are no threads that a fork loses.
            child = os.fork()
            if child == 0:
                _run(folder, part, rank, world, worlds[0])
                sys.stderr.flush()
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0] * world, codes


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], [int(world) for world in sys.argv[3:]])

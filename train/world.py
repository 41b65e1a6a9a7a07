"""The processes that train together: Fabric set up from a recipe, and what they have to tell each other.

One process by itself, or as many as `torchrun` starts: `torchrun --nproc-per-node 2 -m cliplet.cli train …`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.strategies.ddp import DDPStrategy

from cliplet.errors import UsageError

from .predict import usable_device

T = TypeVar("T")
FABRIC_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def launched(precision: str, device: str, out: Path) -> Fabric:
    """Fabric for this process and its siblings, with a TensorBoard log in `out`.

    Raises:
        EnvironmentError_: torch has no such device.
        UsageError: float16 on a CPU, which has no loss scaling.
    """
    usable_device(device)
    # What it says of precision and processes stands in the report.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if precision == "fp16" and device == "cpu":
        raise UsageError("precision fp16 on the CPU", "fp32 or bf16 there", "--precision bf16")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Float32 means float32: on a GPU, convolutions would otherwise round to 10 bits of mantissa.
    torch.backends.cudnn.allow_tf32 = False
    # Two forward passes a step (plain and jittered view) would meet buffers that DDP changes in between; `loop`
    # averages them at the end of an epoch instead.
    strategy = DDPStrategy(forward_sync_buffers=False) if world > 1 else "auto"
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision=FABRIC_PRECISIONS[precision],  # type: ignore[arg-type]
        loggers=TensorBoardLogger(out, name="tensorboard", version=""),
    )
    fabric.launch()
    return fabric


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def summed(fabric: Fabric, array: np.ndarray) -> np.ndarray:
    """The sum over processes of arrays of one shape, each of which holds its own rows and zeros elsewhere."""
    if fabric.world_size == 1:
        return array
    total = fabric.all_reduce(torch.from_numpy(array).to(fabric.device), reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total.cpu().numpy()


def gathered(fabric: Fabric, items: list[T]) -> list[T]:
    """What all processes have in their lists, in the order of the processes."""
    if fabric.world_size == 1:
        return items
    lists: list[list[T]] = [[]] * fabric.world_size
    torch.distributed.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def averaged_buffers(fabric: Fabric, module: torch.nn.Module) -> None:
    """Make the statistics of batch normalisation the mean over processes."""
    if fabric.world_size == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(fabric.all_reduce(buffer, reduce_op="mean"))

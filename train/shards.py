"""Rows of a matrix split over the processes of `torch.distributed`, and sums over processes that gradients survive.

One process without `torch.distributed` is a world of one, for which nothing here communicates.

What is minimised must be the same number in every process, as it is where all of its parts went through
`rows_of_all` and `log_sum_exp_over_ranks`; every process must call both, and go backward, in the same order. Then
the gradient of a process's own tensors is that of the one number: nothing is counted once for each process.

Legend: B rows of this process, N rows of all, K rows of the split matrix, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional


def place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def shard_range(num_rows: int, rank: int, world: int) -> range:
    """The rows of `rank`: one range after the other, the first `num_rows % world` of them one longer."""
    each, more = divmod(num_rows, world)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def row_counts(rows_BD: Tensor) -> list[int]:
    """How many rows each process has."""
    rank, world = place()
    if world == 1:
        return [len(rows_BD)]
    counts = torch.zeros(world, dtype=torch.int64, device=rows_BD.device)
    counts[rank] = len(rows_BD)
    distributed.all_reduce(counts)
    found: list[int] = counts.tolist()
    return found


def rows_of_all(rows_BD: Tensor, counts: list[int]) -> Tensor:
    """The rows [N, D] of all processes in the order of their ranks, of which each has `row_counts`.

    The gradient of a process's rows is the sum of the processes' gradients of them.
    """
    if len(counts) == 1:
        return rows_BD
    gathered = _RowsOfAll.apply(rows_BD, counts)
    assert isinstance(gathered, Tensor)
    return gathered


def log_sum_exp_over_ranks(partial: Tensor) -> Tensor:
    """log sum_ranks e^x of equally shaped tensors x, the same in every process.

    Maximum first, so nothing overflows. Its derivative by a process's x is e^{x - result}, which needs no other
    process: the result is one number that all hold, not a sum of what they hold.
    """
    if place()[1] == 1:
        return partial
    summed = _LogSumExpOverRanks.apply(partial)
    assert isinstance(summed, Tensor)
    return summed


def times_world(features_BD: Tensor) -> Tensor:
    """The features, with their gradient times the number of processes.

    For a model in DistributedDataParallel under a loss over the features of all processes (`rows_of_all`): DDP takes
    the mean of the processes' gradients where their sum is the gradient of that loss.
    """
    world = place()[1]
    if world == 1:
        return features_BD
    scaled = _ScaledGradient.apply(features_BD, world)
    assert isinstance(scaled, Tensor)
    return scaled


def whole_on_first(own_KD: Tensor) -> Tensor | None:
    """The whole split matrix [K, D] in the first process's main memory; None in the others.

    One shard travels at a time, so the first process's device holds one more shard at most.
    """
    rank, world = place()
    own_KD = own_KD.detach()
    if world == 1:
        return own_KD.cpu()
    counts = row_counts(own_KD)
    if rank > 0:
        distributed.send(own_KD.contiguous(), dst=0)
        return None
    parts = [own_KD.cpu()]
    for other in range(1, world):
        part = own_KD.new_empty((counts[other], *own_KD.shape[1:]))
        distributed.recv(part, src=other)
        parts.append(part.cpu())
    return torch.cat(parts)


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, counts: list[int]) -> Tensor:
        rank, world = place()
        ctx.first, ctx.count = sum(counts[:rank]), counts[rank]
        # Processes send equally many: gloo cannot do otherwise.
        most = max(counts)
        padded = functional.pad(rows_BD, (0, 0, 0, most - len(rows_BD))).contiguous()
        received = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(received, padded)
        return torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None]:
        total = gradient_ND.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.count], None


class _LogSumExpOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        largest = partial.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        total = (partial - largest).exp()
        distributed.all_reduce(total)
        whole = largest + total.log()
        ctx.save_for_backward(partial, whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        partial, whole = ctx.saved_tensors
        return gradient * (partial - whole).exp()


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_BD: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return features_BD.view_as(features_BD)

    @staticmethod
    def backward(ctx: Any, gradient_BD: Tensor) -> tuple[Tensor, None]:
        return gradient_BD * ctx.factor, None

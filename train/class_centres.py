"""Class centres split over processes, and the loss of features against them (partial FC).

Each process holds one range of the centres. It sees the features of all processes and computes, with its own centres
alone, its part of the two sums of `cluster_losses`; the parts are added across processes, B numbers each instead of
B x K similarities. Loss and gradients are those of one process with all centres and all images.

Negatives are drawn once for a batch, and each image leaves out its own positives among them. PartialFC (An et al.
2022) puts all positives of the batch among the negatives of every image instead: with 8 positives an image, 128
images touch up to 1,024 centres, so that at K = 1,000 the rate would hardly change anything, and the clusters of the
batch would be negatives far more often than others. Here an image meets negative_rate * (K - its positives) of them
on average, the paper's r |Omega_n|, each with the same chance.

Legend: B images of this process, N of all, L positives, K centres (all), D width; in this process's range: U rows in
use this step, S of them drawn as negatives, P pairs of an image and a positive.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cliplet.errors import DataError, UsageError

from .cluster_losses import LOG_OF_NOTHING, LossSettings, combined
from .shards import log_sum_exp_over_ranks, place, row_counts, rows_of_all, shard_range

# Rows whose first values come from one seed, so that they do not depend on how rows are split.
BLOCK = 4096
_MASK = (1 << 64) - 1


class ClassCentres(nn.Module):
    """The centres of K clusters, of which this process holds `held`, and the loss against them.

    Keep it out of DistributedDataParallel (and `fabric.setup`), which refuses it: its parameter differs from process
    to process, and averaging the gradients of different centres would be wrong. Its optimiser is this process's own.
    The features' gradients are those of the whole loss; see `shards.times_world` for a model whose gradients DDP
    averages. `shards.whole_on_first` and `own_rows` take the centres from one number of processes to another.

    Attributes:
        held: which centres, of 0..K-1. centres: parameter [len(held), D]; only the rows' directions are used.

    Raises:
        UsageError: there are fewer clusters than processes.
    """

    def __init__(self, num_classes: int, width: int, settings: LossSettings, seed: int = 0) -> None:
        super().__init__()
        rank, world = place()
        if num_classes < world:
            raise UsageError(
                f"{num_classes} clusters for {world} processes",
                "a cluster or more for each",
                f"--clusters {world}, or fewer processes",
            )
        self.num_classes, self.width, self.settings, self.seed = num_classes, width, settings, seed
        self.held = shard_range(num_classes, rank, world)
        self.centres = nn.Parameter(initial_centres(self.held, width, seed))
        # With nothing left to average DDP raises, instead of giving all processes the first one's centres.
        self._ddp_params_and_buffers_to_ignore = ["centres"]

    def forward(self, features_BD: Tensor, labels_BL: Tensor, step: int) -> Tensor:
        """Mean loss over the images of all processes, a scalar that is the same in each.

        Under autocast the cosines with negatives are computed in its type; all else, positives and sums included, in
        the type of the centres.

        Args:
            features_BD: of any length each, not zero; the number of images may differ from process to process.
            labels_BL: int64, an image's clusters, nearest first; -1 where there are fewer. Repeated ones count once,
                those after `settings.used_positives` not at all. An image without any has no sum over positives.
            step: which draw of negatives; it depends on seed, step and cluster, not on the processes.

        Raises:
            UsageError: the labels have fewer columns than the loss has positives.
            DataError: a label that is no cluster; all processes raise it.
        """
        unit_BD = functional.normalize(features_BD.to(self.centres.dtype))
        counts = row_counts(unit_BD)
        unit_ND, labels_NL = rows_of_all(unit_BD, counts), rows_of_all(self._used(labels_BL), counts)
        self._check(labels_NL)
        # What each pair consists of: an image, and a row of this process's range.
        mine_NL = (labels_NL >= self.held.start) & (labels_NL < self.held.stop)
        image_P, column_P = mine_NL.nonzero(as_tuple=True)
        class_P = labels_NL[mine_NL] - self.held.start
        drawn_S = self.drawn(step)
        unit_UD, row_P = self._rows(drawn_S, class_P)

        cosine_P = (functional.embedding(image_P, unit_ND) * functional.embedding(row_P, unit_UD)).sum(1)
        absent_NL = cosine_P.new_full(labels_NL.shape, LOG_OF_NOTHING)
        positive_NL = absent_NL.index_put((image_P, column_P), -self.settings.positive(cosine_P))
        drawn_SD = unit_UD if len(unit_UD) == len(drawn_S) else unit_UD[: len(drawn_S)]
        cosine_NS = functional.linear(unit_ND, drawn_SD)
        also_drawn = row_P < len(drawn_S)
        negative_N = _negative_sum(cosine_NS, image_P[also_drawn], row_P[also_drawn], self.settings)
        sums_2N = log_sum_exp_over_ranks(
            torch.stack([positive_NL.logsumexp(1), negative_N.to(positive_NL.dtype)])
        )
        return combined(self.settings.kind, sums_2N[0], sums_2N[1]).mean()

    def drawn(self, step: int) -> Tensor:
        """Which rows of this process's range are negatives in a step, in order: each with chance `negative_rate`."""
        device = self.centres.device
        if self.settings.negative_rate == 1:
            return torch.arange(len(self.held), device=device)
        key = _mixed_int(_mixed_int(self.seed) + step)
        classes = torch.arange(self.held.start, self.held.stop, device=device)
        # 53 bits of a 64-bit hash, compared with the rate as an integer.
        bits = _mixed(classes + _signed(key)) >> 11 & (1 << 53) - 1
        return (bits < int(self.settings.negative_rate * 2**53)).nonzero().squeeze(1)

    def own_rows(self, whole_KD: Tensor) -> Tensor:
        """This process's rows of a matrix of all clusters, such as one of `shards.whole_on_first`."""
        return whole_KD[self.held.start : self.held.stop]

    def _used(self, labels_BL: Tensor) -> Tensor:
        used = self.settings.used_positives
        if labels_BL.shape[1] < used:
            raise UsageError(
                f"{labels_BL.shape[1]} clusters an image for {used} positives",
                "clusters written with as many positives, or more",
                f"--positives {labels_BL.shape[1]}, or cluster anew",
            )
        return _distinct(labels_BL[:, :used].long())

    def _check(self, labels_NL: Tensor) -> None:
        if labels_NL.numel() == 0:
            return
        least, most = (int(extreme) for extreme in labels_NL.aminmax())
        if least < -1 or most >= self.num_classes:
            raise DataError(
                f"clusters {least} to {most} among the labels",
                f"0 to {self.num_classes - 1}, or -1 for none",
                "use the clusters that the centres were made for",
            )

    def _rows(self, drawn_S: Tensor, class_P: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows [U, D], those drawn first, then positives that were not; and the row of each pair [P]."""
        if len(drawn_S) == len(self.held):
            return functional.normalize(self.centres), class_P
        row_K = torch.full((len(self.held),), -1, device=drawn_S.device)
        row_K[drawn_S] = torch.arange(len(drawn_S), device=drawn_S.device)
        others = class_P[row_K[class_P] < 0].unique()
        row_K[others] = torch.arange(len(drawn_S), len(drawn_S) + len(others), device=drawn_S.device)
        # Unlike indexing, the gradient of an embedding is one matrix of all rows, not two.
        rows_UD = functional.embedding(torch.cat([drawn_S, others]), self.centres)
        return functional.normalize(rows_UD), row_K[class_P]


def initial_centres(held: range, width: int, seed: int) -> Tensor:
    """Random unit rows [len(held), D] in float32; a row depends on the seed and its number alone.

    Of length 1, an element is about 1 / sqrt(D), so AdamW's first steps at 1e-3 turn a row by a few hundredths.
    """
    blocks = []
    for block in range(held.start // BLOCK, -(-held.stop // BLOCK)):
        generator = torch.Generator().manual_seed(_mixed_int(_mixed_int(seed) + block) >> 1)
        first = block * BLOCK
        rows = torch.randn(BLOCK, width, generator=generator)
        blocks.append(rows[max(held.start - first, 0) : held.stop - first])
    return functional.normalize(torch.cat(blocks))


def memory_per_rank(
    num_classes: int, width: int, batch: int, positives: int, world: int, negative_rate: float
) -> int:
    """Bytes that a process needs at most for its centres and a step, in float32 with AdamW; `batch` is its own.

    With k = K / world centres held, U of them in use (those drawn, S, and the batch's positives), N = batch * world
    images and P = batch * L pairs. Held all the time, in numbers of 4 bytes: k D centres and AdamW's two moments of
    each. Besides, what is most of:

        negatives   2 N S of cosines and logits, 2 U D of rows as they are and of length 1, N D features, 2 P D of pairs
        positives   2 P D of pairs and 2 P D of their gradients, 3 U D of rows and a gradient, N D features
        rows        6 U D of rows, their gradients and those of their lengths
        gradient    k D of a gradient for all centres, 2 U D of rows
        AdamW       k D of the gradient, 2 k D of a step

    At rate 1 rows are the centres themselves, so there is a copy less of each U D. Under autocast cosines have half
    their bytes. Draws take some 40 bytes a held centre for a moment.
    """
    held = math.ceil(num_classes / world)
    images, pairs = batch * world, batch * positives
    drawn = negative_rate * held
    # Of centres that were not drawn, those that random positives hit.
    used = drawn + (held - drawn) * (1 - math.exp(-pairs / held))
    copies = 1 if negative_rate == 1 else 2
    most = max(
        2 * images * drawn + (copies * used + images + 2 * pairs) * width,
        (4 * pairs + (copies + 1) * used + images) * width,
        (4 + copies) * used * width,
        (held + copies * used) * width,
        3 * held * width,
    )
    return math.ceil(4 * (3 * held * width + most))


class _NegativeSum(torch.autograd.Function):
    """log sum_j e^{scale * cos_j + shift} [N] of cosines [N, S] without the given entries.

    Keeps nothing but the cosines in the type that they came in; the logits are made again for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, cosine_NS: Tensor, image: Tensor, row: Tensor, scale: float, shift: float
    ) -> Tensor:
        logits_NS = _logits(cosine_NS, image, row, scale, shift)
        summed_N = logits_NS.logsumexp(1)
        ctx.save_for_backward(cosine_NS, image, row, summed_N)
        ctx.scale, ctx.shift = scale, shift
        return summed_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        cosine_NS, image, row, summed_N = ctx.saved_tensors
        logits_NS = _logits(cosine_NS, image, row, ctx.scale, ctx.shift)
        share_NS = logits_NS.sub_(summed_N[:, None]).exp_()
        share_NS.mul_(gradient_N[:, None] * ctx.scale)
        return share_NS.to(cosine_NS.dtype), None, None, None, None


def _negative_sum(cosine_NS: Tensor, image: Tensor, row: Tensor, settings: LossSettings) -> Tensor:
    """Log of the sum over negatives [N], `LOG_OF_NOTHING` for an image without any."""
    if cosine_NS.shape[1] == 0:
        # The zero keeps the features in the graph: all processes go backward through the same collectives.
        return cosine_NS.float().sum(1) + LOG_OF_NOTHING
    scale = settings.scale
    summed = _NegativeSum.apply(cosine_NS, image, row, scale, -scale * settings.threshold)
    assert isinstance(summed, Tensor)
    return summed


def _logits(cosine_NS: Tensor, image: Tensor, row: Tensor, scale: float, shift: float) -> Tensor:
    wide = torch.promote_types(cosine_NS.dtype, torch.float32)
    logits_NS = cosine_NS.to(wide, copy=True).mul_(scale).add_(shift)
    logits_NS[image, row] = LOG_OF_NOTHING
    return logits_NS


def _distinct(labels_BL: Tensor) -> Tensor:
    """The labels with -1 in the place of each that stands further left already."""
    same_BLL = labels_BL[:, :, None] == labels_BL[:, None, :]
    return labels_BL.masked_fill(same_BLL.tril(-1).any(2), -1)


def _mixed_int(number: int) -> int:
    """A 64-bit hash of an integer: the last steps of SplitMix64 (Steele et al. 2014)."""
    x = (number + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mixed(numbers: Tensor) -> Tensor:
    """`_mixed_int` of int64 numbers, whose products wrap around; shifts are made to bring in zeros."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return x >> bits & (1 << 64 - bits) - 1

    x = numbers + _signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned one."""
    return number - (1 << 64) if number >> 63 else number

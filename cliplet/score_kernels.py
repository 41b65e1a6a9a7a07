"""Two GPU kernels behind the encoder: features in, view probabilities and scores out.

They compute what `Snippets.unit` and `Snippets.score` compute, in one or two launches. They are written in the Triton
language; with TRITON_INTERPRET=1 set before triton is imported they run, slowly, on a CPU.

Legend: B images, V views, C classes, D embedding; N blocks of classes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliplet.views import Aggregation

# The least rows that a matrix product takes, the most classes of one program, and the chunk of the embedding.
VIEW_BLOCK, CLASS_BLOCK, EMBEDDING_BLOCK = 16, 128, 32
# With fewer, its sums do not fit into the registers of each.
WARPS = 8


def score_fused(
    features_BVD: Tensor, text_CD: Tensor, scale: float, bias: float | None, aggregation: Aggregation
) -> tuple[Tensor, Tensor]:
    """View probabilities float32 [B, V, C] and scores float32 [B, C] of features of any length.

    Equals `Snippets.score(Snippets.unit(features), text)`. Up to CLASS_BLOCK classes, or with sigmoids, one launch
    does all; more classes share a softmax's sum, which takes a second launch over the logits of the first.
    """
    images, views, width = features_BVD.shape
    classes = text_CD.shape[0]
    class_block = min(CLASS_BLOCK, max(16, triton.next_power_of_2(classes)))
    blocks = triton.cdiv(classes, class_block)
    is_shared = bias is None and blocks > 1
    view_probs_BVC = features_BVD.new_empty((images, views, classes), dtype=torch.float32)
    scores_BC = features_BVD.new_empty((images, classes), dtype=torch.float32)
    # For each block of classes the largest logit and the sum of exponentials below it.
    parts_BVN2 = features_BVD.new_empty(
        (images, views, blocks, 2) if is_shared else (1,), dtype=torch.float32
    )
    _score_kernel[(images * blocks,)](
        features_BVD.contiguous(),
        text_CD.contiguous(),
        view_probs_BVC,
        scores_BC,
        parts_BVN2,
        views,
        classes,
        width,
        scale,
        0.0 if bias is None else bias,
        aggregation.zeta,
        KIND=aggregation.kind,
        SIGMOID=bias is not None,
        SHARED=is_shared,
        VIEWS=VIEW_BLOCK,
        CLASSES=class_block,
        EMBEDDING=EMBEDDING_BLOCK,
        num_warps=WARPS,
    )
    if is_shared:
        _share_kernel[(images * blocks,)](
            view_probs_BVC,
            scores_BC,
            parts_BVN2,
            views,
            classes,
            aggregation.zeta,
            KIND=aggregation.kind,
            VIEWS=VIEW_BLOCK,
            CLASSES=class_block,
            BLOCKS=triton.next_power_of_2(blocks),
        )
    return view_probs_BVC, scores_BC


@triton.jit
def _score_kernel(  # noqa: PLR0913
    features: tl.tensor,
    text: tl.tensor,
    view_probs: tl.tensor,
    scores: tl.tensor,
    parts: tl.tensor,
    views: tl.tensor,
    classes: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    zeta: tl.tensor,
    KIND: tl.constexpr,
    SIGMOID: tl.constexpr,
    SHARED: tl.constexpr,
    VIEWS: tl.constexpr,
    CLASSES: tl.constexpr,
    EMBEDDING: tl.constexpr,
) -> None:
    """All views of one image against one block of classes; with SHARED, logits and the parts of their softmax."""
    blocks = tl.cdiv(classes, CLASSES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    classes_C = block * CLASSES + tl.arange(0, CLASSES)
    is_class_C = classes_C < classes
    state_C = _no_views(CLASSES)
    for view in range(0, views, VIEWS):
        views_V = view + tl.arange(0, VIEWS)
        is_view_V = views_V < views
        rows_V = image * views + views_V
        logits_VC = scale * _cosines(
            features, text, rows_V, is_view_V, classes_C, is_class_C, width, EMBEDDING
        )
        if SIGMOID:
            values_VC = tl.sigmoid(logits_VC + bias)
        else:
            logits_VC = tl.where(is_class_C[None, :], logits_VC, float("-inf"))
            largest_V = tl.max(logits_VC, axis=1)
            powers_VC = tl.exp(logits_VC - largest_V[:, None])
            sum_V = tl.sum(powers_VC, axis=1)
            if SHARED:
                values_VC = logits_VC
                part_V = parts + (rows_V * blocks + block) * 2
                tl.store(part_V, largest_V, is_view_V)
                tl.store(part_V + 1, sum_V, is_view_V)
            else:
                values_VC = powers_VC / sum_V[:, None]
        to_VC = view_probs + rows_V[:, None] * classes + classes_C[None, :]
        tl.store(to_VC, values_VC, is_view_V[:, None] & is_class_C[None, :])
        if not SHARED:
            state_C = _with_views(state_C, values_VC, views_V, views)
    if not SHARED:
        tl.store(scores + image * classes + classes_C, _score(state_C, views, zeta, KIND), is_class_C)


@triton.jit
def _share_kernel(  # noqa: PLR0913
    view_probs: tl.tensor,
    scores: tl.tensor,
    parts: tl.tensor,
    views: tl.tensor,
    classes: tl.tensor,
    zeta: tl.tensor,
    KIND: tl.constexpr,
    VIEWS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """One image's logits of one block of classes become probabilities in place, and scores."""
    blocks = tl.cdiv(classes, CLASSES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    classes_C = tl.program_id(0) % blocks * CLASSES + tl.arange(0, CLASSES)
    is_class_C = classes_C < classes
    blocks_N = tl.arange(0, BLOCKS)
    state_C = _no_views(CLASSES)
    for view in range(0, views, VIEWS):
        views_V = view + tl.arange(0, VIEWS)
        is_view_V = views_V < views
        rows_V = image * views + views_V
        part_VN = parts + (rows_V[:, None] * blocks + blocks_N[None, :]) * 2
        is_part_VN = is_view_V[:, None] & (blocks_N < blocks)[None, :]
        # Rows beyond the last view hold a 0, so that they give no NaN.
        largest_VN = tl.load(part_VN, is_part_VN, tl.where(is_view_V, float("-inf"), 0.0)[:, None])
        largest_V = tl.max(largest_VN, axis=1)
        powers_VN = tl.exp(largest_VN - largest_V[:, None])
        sum_V = tl.sum(tl.load(part_VN + 1, is_part_VN, 0.0) * powers_VN, axis=1)
        at_VC = view_probs + rows_V[:, None] * classes + classes_C[None, :]
        is_value_VC = is_view_V[:, None] & is_class_C[None, :]
        probs_VC = tl.exp(tl.load(at_VC, is_value_VC, 0.0) - largest_V[:, None]) / sum_V[:, None]
        tl.store(at_VC, probs_VC, is_value_VC)
        state_C = _with_views(state_C, probs_VC, views_V, views)
    tl.store(scores + image * classes + classes_C, _score(state_C, views, zeta, KIND), is_class_C)


@triton.jit
def _cosines(
    features: tl.tensor,
    text: tl.tensor,
    rows_V: tl.tensor,
    is_view_V: tl.tensor,
    classes_C: tl.tensor,
    is_class_C: tl.tensor,
    width: tl.tensor,
    EMBEDDING: tl.constexpr,
) -> Any:
    """Cosines [V, C] of features of any length with unit text rows."""
    sums_VC = tl.zeros([rows_V.shape[0], classes_C.shape[0]], tl.float32)
    squares_V = tl.zeros([rows_V.shape[0]], tl.float32)
    for begin in range(0, width, EMBEDDING):
        places_D = begin + tl.arange(0, EMBEDDING)
        is_place_D = places_D < width
        features_VD = tl.load(
            features + rows_V[:, None] * width + places_D[None, :],
            is_view_V[:, None] & is_place_D[None, :],
            0.0,
        ).to(tl.float32)
        text_CD = tl.load(
            text + classes_C[:, None].to(tl.int64) * width + places_D[None, :],
            is_class_C[:, None] & is_place_D[None, :],
            0.0,
        )
        # TF32 has 10 bits of mantissa, and the softmax multiplies cosines by 100.
        sums_VC = tl.dot(features_VD, tl.trans(text_CD), sums_VC, input_precision="ieee")
        squares_V += tl.sum(features_VD * features_VD, axis=1)
    return sums_VC / tl.maximum(tl.sqrt(squares_V), 1e-12)[:, None]


@triton.jit
def _no_views(CLASSES: tl.constexpr) -> Any:
    """The aggregate of no views yet: the whole image, and the local views' largest, smallest and sum."""
    zeros_C = tl.zeros([CLASSES], tl.float32)
    return zeros_C, zeros_C - 1, zeros_C + 2, zeros_C


@triton.jit
def _with_views(state_C: tl.tuple, probs_VC: tl.tensor, views_V: tl.tensor, views: tl.tensor) -> Any:
    """The aggregate with some more views; probabilities lie in 0..1, so -1 and 2 never win."""
    whole_C, largest_C, smallest_C, sum_C = state_C
    is_local_V1 = ((views_V >= 1) & (views_V < views))[:, None]
    whole_C += tl.sum(tl.where((views_V == 0)[:, None], probs_VC, 0.0), axis=0)
    largest_C = tl.maximum(largest_C, tl.max(tl.where(is_local_V1, probs_VC, -1.0), axis=0))
    smallest_C = tl.minimum(smallest_C, tl.min(tl.where(is_local_V1, probs_VC, 2.0), axis=0))
    sum_C += tl.sum(tl.where(is_local_V1, probs_VC, 0.0), axis=0)
    return whole_C, largest_C, smallest_C, sum_C


@triton.jit
def _score(state_C: tl.tuple, views: tl.tensor, zeta: tl.tensor, KIND: tl.constexpr) -> Any:
    """`cliplet.snippets.aggregate` of what the views gave."""
    whole_C, largest_C, smallest_C, sum_C = state_C
    if KIND == "mean":
        return (whole_C + sum_C) / views
    if KIND == "max":
        return tl.maximum(whole_C, largest_C)
    local_C = tl.where(largest_C >= zeta, largest_C, smallest_C)
    # A single view stands in for the missing local ones.
    return 0.5 * (whole_C + tl.where(views > 1, local_C, whole_C))

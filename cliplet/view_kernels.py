"""A GPU kernel that cuts, resizes and normalises all views of a batch: uint8 canvas in, the encoder's input out.

It computes what `cliplet.snippets.cut_views` computes, in one pass and without half-done views in memory. It is
written in the Triton language; with TRITON_INTERPRET=1 set before triton is imported it runs, slowly, on a CPU.

Legend: B images, V views, N = B * V, H x W canvas pixels, S side of a view. In the kernel: one program makes R x K
samples (rows, columns) of one view, from J canvas rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program is one warp and each of its threads makes a column of samples: 3 x ROWS sums and 3 x CANVAS_ROWS narrowed
# pixels stay in its registers, and nothing goes through shared memory. Encoders' sides are multiples of COLUMNS.
ROWS, COLUMNS, CANVAS_ROWS = 8, 32, 4
# How far each kernel reaches, in its own widths.
SUPPORT = {"bicubic": 2, "bilinear": 1}


def cut_views_fused(
    image_BHWC: Tensor,
    boxes_BV4: Tensor,
    size: int,
    interpolation: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised views `dtype` [N, 3, S, S], channels last in memory, of images uint8 [B, H, W, 3].

    Equals `cliplet.snippets.cut_views`, then `(views / 255 - mean) / std`; the arithmetic is float32 whatever `dtype`
    is. Samples that see no pixel of the canvas are NaN there and here.

    What it costs: with s canvas pixels a sample, at least 1, and a kernel that reaches over T = 4s pixels (2s if
    bilinear), R rows of samples see Rs + T canvas rows, and a program narrows all of these itself. Tiles above each
    other both narrow the T rows that both see: 1 + 4/R times the least work, 1.5 with R = 8. Products a sample and
    channel are Ts(1 + 4/R) for columns and (R + 4)s for rows: 49 + 34 from 640 to 224 pixels, where the two matrix
    products take 1829 + 640 and write float32 [3, 640, 224] a view between them.

    Args:
        boxes_BV4: float32, in canvas pixels; they may reach beyond the canvas.
        mean, std: of values in 0..1.
    """
    images, height, width, _ = image_BHWC.shape
    views = boxes_BV4.shape[1]
    pixels_N3SS = torch.empty(
        (images * views, 3, size, size),
        dtype=dtype,
        device=image_BHWC.device,
        memory_format=torch.channels_last,
    )
    tiles = triton.cdiv(size, ROWS) * triton.cdiv(size, COLUMNS)
    _cut_kernel[(images * views * tiles,)](
        image_BHWC.contiguous(),
        boxes_BV4.contiguous(),
        pixels_N3SS,
        height,
        width,
        views,
        *(255 * m for m in mean),
        *(255 * s for s in std),
        SIZE=size,
        SUPPORT=SUPPORT[interpolation],
        R=ROWS,
        K=COLUMNS,
        J=CANVAS_ROWS,
        num_warps=1,
    )
    return pixels_N3SS


@triton.jit
def _cut_kernel(  # noqa: PLR0913
    image: tl.tensor,
    boxes: tl.tensor,
    pixels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    views: tl.tensor,
    mean_r: tl.tensor,
    mean_g: tl.tensor,
    mean_b: tl.tensor,
    std_r: tl.tensor,
    std_g: tl.tensor,
    std_b: tl.tensor,
    SIZE: tl.constexpr,
    SUPPORT: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
) -> None:
    """One tile of R x K samples, all channels, of one view."""
    tiles_across: tl.constexpr = (SIZE + K - 1) // K
    tiles: tl.constexpr = tiles_across * ((SIZE + R - 1) // R)
    view = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tile // tiles_across * R
    rows_R = row + tl.arange(0, R)
    columns_K = tile % tiles_across * K + tl.arange(0, K)
    # Offsets of whole images and views may exceed 32 bits.
    image += (view // views).to(tl.int64) * height * width * 3
    pixels += view.to(tl.int64) * (3 * SIZE * SIZE)
    box = boxes + view * 4
    across = _axis(tl.load(box), tl.load(box + 2), width, SIZE, SUPPORT)
    down = _axis(tl.load(box + 1), tl.load(box + 3), height, SIZE, SUPPORT)
    # The canvas rows from the first that the tile's first row of samples sees to the last that its last one sees.
    _, _, _, top, bottom, taps = down
    above = tl.maximum(top, _first_tap(row, down, SUPPORT))
    below = tl.minimum(bottom, _first_tap(tl.minimum(row + R, SIZE) - 1, down, SUPPORT) + taps)

    sum_R = tl.zeros([R], tl.float32)
    r_RK = tl.zeros([R, K], tl.float32)
    g_RK = tl.zeros([R, K], tl.float32)
    b_RK = tl.zeros([R, K], tl.float32)
    for y in range(above, below, J):
        ys_J = y + tl.arange(0, J)
        weight_RJ = _weights(ys_J[None, :], rows_R[:, None], down, SUPPORT)
        sum_R += tl.sum(weight_RJ, axis=1)
        r_JK, g_JK, b_JK = _narrow(
            image + ys_J.to(tl.int64) * width * 3, ys_J < below, columns_K, across, SUPPORT
        )
        r_RK += _product(weight_RJ, r_JK)
        g_RK += _product(weight_RJ, g_JK)
        b_RK += _product(weight_RJ, b_JK)

    to_RK = pixels + (rows_R[:, None] * SIZE + columns_K[None, :]) * 3
    is_sample_RK = (rows_R < SIZE)[:, None] & (columns_K < SIZE)[None, :]
    per_sum_R1 = (1 / sum_R)[:, None]
    _store(to_RK, (_cut_off(r_RK * per_sum_R1) - mean_r) / std_r, is_sample_RK)
    _store(to_RK + 1, (_cut_off(g_RK * per_sum_R1) - mean_g) / std_g, is_sample_RK)
    _store(to_RK + 2, (_cut_off(b_RK * per_sum_R1) - mean_b) / std_b, is_sample_RK)


@triton.jit
def _axis(
    begin: tl.tensor, end: tl.tensor, pixels: tl.tensor, SIZE: tl.constexpr, SUPPORT: tl.constexpr
) -> Any:
    """One axis of a view: (begin, samples' distance in widths of the kernel, such widths a pixel, range of pixels
    that may weigh, the most pixels that one sample sees)."""
    step = tl.div_rn(end - begin, SIZE * 1.0)
    per_pixel = tl.div_rn(1.0, tl.maximum(step, 1.0))
    # Cut off before they become integers: boxes may lie anywhere.
    lower = tl.clamp(tl.floor(begin), 0.0, pixels * 1.0).to(tl.int32)
    upper = tl.clamp(tl.ceil(end), 0.0, pixels * 1.0).to(tl.int32)
    # An open interval of length n holds at most n integers.
    taps = tl.ceil(2 * SUPPORT * tl.maximum(step, 1.0)).to(tl.int32)
    return begin, step * per_pixel, per_pixel, lower, upper, taps


@triton.jit
def _first_tap(sample: tl.tensor, axis: tl.tuple, SUPPORT: tl.constexpr) -> Any:
    """The first pixel that the kernel around a sample reaches."""
    begin, distance, per_pixel, lower, _, _ = axis
    # Counted from `lower`, so that a small box far from the canvas's corner loses no digits.
    from_lower = begin - lower + ((sample + 0.5) * distance - SUPPORT) / per_pixel - 0.5
    return lower + 1 + tl.floor(from_lower).to(tl.int32)


@triton.jit
def _weights(pixels: tl.tensor, samples: tl.tensor, axis: tl.tuple, SUPPORT: tl.constexpr) -> Any:
    """What pixels weigh in samples, before division by their sum: `resize_weights` of `cliplet.snippets`."""
    begin, distance, per_pixel, lower, upper, _ = axis
    weight = _kernel((pixels + 0.5 - begin) * per_pixel - (samples + 0.5) * distance, SUPPORT)
    return tl.where((pixels >= lower) & (pixels < upper), weight, 0.0)


@triton.jit
def _narrow(
    line_J: tl.tensor, is_line_J: tl.tensor, columns_K: tl.tensor, axis: tl.tuple, SUPPORT: tl.constexpr
) -> Any:
    """Canvas rows resampled to the tile's columns: red, green and blue [J, K]."""
    _, _, _, lower, upper, taps = axis
    first_K = _first_tap(columns_K, axis, SUPPORT)
    sum_K = tl.zeros([columns_K.shape[0]], tl.float32)
    r_JK = tl.zeros([line_J.shape[0], columns_K.shape[0]], tl.float32)
    g_JK = tl.zeros([line_J.shape[0], columns_K.shape[0]], tl.float32)
    b_JK = tl.zeros([line_J.shape[0], columns_K.shape[0]], tl.float32)
    for tap in range(taps):
        xs_K = first_K + tap
        weight_K = _weights(xs_K, columns_K, axis, SUPPORT)
        sum_K += weight_K
        at_JK = line_J[:, None] + xs_K[None, :] * 3
        is_pixel_JK = is_line_J[:, None] & ((xs_K >= lower) & (xs_K < upper))[None, :]
        r_JK += weight_K[None, :] * tl.load(at_JK, is_pixel_JK, 0).to(tl.float32)
        g_JK += weight_K[None, :] * tl.load(at_JK + 1, is_pixel_JK, 0).to(tl.float32)
        b_JK += weight_K[None, :] * tl.load(at_JK + 2, is_pixel_JK, 0).to(tl.float32)
    per_sum_1K = (1 / sum_K)[None, :]
    # Like Pillow, columns first, and cut off what leaves 0..255 after each pass.
    return _cut_off(r_JK * per_sum_1K), _cut_off(g_JK * per_sum_1K), _cut_off(b_JK * per_sum_1K)


@triton.jit
def _product(weight_RJ: tl.tensor, narrow_JK: tl.tensor) -> Any:
    """The matrix product [R, K], within each thread; `tl.dot` would want larger sides and shared memory."""
    return tl.sum(weight_RJ[:, :, None] * narrow_JK[None, :, :], axis=1)


@triton.jit
def _store(to: tl.tensor, value: tl.tensor, mask: tl.tensor) -> None:
    tl.store(to, value.to(to.dtype.element_ty), mask)


@triton.jit
def _kernel(distance: tl.tensor, SUPPORT: tl.constexpr) -> Any:
    """`cubic_kernel` or `linear_kernel` of `cliplet.snippets`, told apart by their support."""
    x = tl.abs(distance)
    v = tl.maximum(1 - x, 0.0)
    if SUPPORT == 1:
        return v
    u = tl.maximum(2 - x, 0.0)
    return 0.5 * u * u * (u - 1) + v * v * (1 - 2 * v)


@triton.jit
def _cut_off(value: tl.tensor) -> Any:
    """0..255, and NaN where it was."""
    at_least_0 = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(at_least_0, 255.0, propagate_nan=tl.PropagateNan.ALL)

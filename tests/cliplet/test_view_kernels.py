"""The kernel that cuts views, against the matrix products of `cliplet.snippets`; on a CPU in triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from helpers import picture
from interpreted import call, interpreter
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cliplet import view_kernels
from cliplet.snippets import cut_views
from cliplet.views import Preprocessing, Views, place_on_canvas

MEAN, STD = (0.48, 0.41, 0.36), (0.27, 0.26, 0.2)
INTERPOLATIONS = ("bicubic", "bilinear")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as executor:
        yield executor


def noise(images: int, height: int, width: int) -> np.ndarray:
    """Steps from 0 to 255 and noise: where the cubic overshoots, and where a pixel left out shows most."""
    image = np.random.default_rng(0).integers(0, 256, (images, height, width, 3), np.uint8)
    image[:, height // 3 : height // 2, width // 4 :] = (255, 0, 255)
    return image


def reference(image: np.ndarray, boxes: np.ndarray, size: int, interpolation: str) -> torch.Tensor:
    """Normalised views [N, 3, S, S], in float64."""
    views = cut_views(torch.from_numpy(image), torch.from_numpy(boxes).double(), size, interpolation)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return ((views / 255 - mean) / std).flatten(0, 1)


def largest_error(found: np.ndarray, wanted: torch.Tensor) -> float:
    """The largest difference in units of 1/255 of the range of a pixel; NaN must meet NaN."""
    assert found.shape == tuple(wanted.shape)
    assert np.array_equal(np.isnan(found), wanted.isnan().numpy())
    scale = 255 * np.asarray(STD).reshape(3, 1, 1)
    return float(np.nanmax(np.abs(found - wanted.numpy()) * scale))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        # Shrunk; two images and an uneven number of views; tiles that are cut off.
        (9, [[(0, 0, 29, 23), (10.3, 5.7, 24.9, 20.2)], [(0, 3, 2, 23), (0, 9, 29, 20)]]),
        # Enlarged, over the edge of a tile in both directions, down to one pixel.
        (33, [[(20.5, 18.25, 29, 23), (7, 7, 8, 8)]]),
        # Beyond the canvas, a little and so far that some samples see nothing of it.
        (8, [[(-3, -2.5, 26, 20), (-15, 5, 14, 28), (26, 20, 40, 35)]]),
    ],
)
def test_views_are_those_of_the_matrix_products(
    pool: ProcessPoolExecutor, interpolation: str, size: int, boxes: list
) -> None:
    boxes_BV4 = np.asarray(boxes, np.float32)
    image = noise(len(boxes), 23, 29)
    given = ("cliplet.view_kernels", "cut_views_fused", image, boxes_BV4, size, interpolation, MEAN, STD)
    (found,) = pool.submit(call, *given).result()
    assert largest_error(found, reference(image, boxes_BV4, size, interpolation)) < 0.02


@pytest.mark.parametrize("resize_mode", ["shortest", "longest"])
def test_feeds_as_they_are_placed_on_a_canvas(pool: ProcessPoolExecutor, resize_mode: str) -> None:
    fed = Preprocessing(8, MEAN, STD, "bicubic", resize_mode, fill=127)
    feeds = place_on_canvas([picture(24, 15, 1), picture(10, 30, 2)], Views.parse("1"), fed)
    given = ("cliplet.view_kernels", "cut_views_fused", *feeds.values(), 8, "bicubic", MEAN, STD)
    (found,) = pool.submit(call, *given).result()
    assert largest_error(found, reference(*feeds.values(), 8, "bicubic")) < 0.02


def test_a_small_box_far_from_the_corner_of_a_large_canvas(pool: ProcessPoolExecutor) -> None:
    image = noise(1, 4, 8000)
    boxes = np.asarray([[(7990.3, 0, 7996.9, 4)]], np.float32)
    given = ("cliplet.view_kernels", "cut_views_fused", image, boxes, 8, "bilinear", MEAN, STD)
    (found,) = pool.submit(call, *given).result()
    assert largest_error(found, reference(image, boxes, 8, "bilinear")) < 0.02


# The interpreter cuts off what bfloat16 cannot hold, where a GPU rounds.
@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-7)])
def test_low_precision_comes_at_the_end(pool: ProcessPoolExecutor, dtype: torch.dtype, step: float) -> None:
    image, boxes = noise(1, 12, 16), np.asarray([[(0, 0, 16, 12)]], np.float32)
    given = ("cliplet.view_kernels", "cut_views_fused", image, boxes, 8, "bicubic", MEAN, STD)
    (exact,) = pool.submit(call, *given).result()
    (found,) = pool.submit(call, *given, dtype).result()
    assert (found != exact).any()
    np.testing.assert_allclose(found, exact, rtol=step, atol=1e-6)


@pytest.mark.parametrize("capability", [89, 90])
def test_it_compiles_for_gpus_that_are_not_here(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = view_kernels._cut_kernel
    fixed = {"SIZE": 224, "SUPPORT": 2, "R": 8, "K": 32, "J": 4}
    pointers = {"image": "*u8", "boxes": "*fp32", "pixels": "*fp16"}
    numbers = dict.fromkeys(("height", "width", "views"), "i32")
    signature = {
        name: "constexpr" if name in fixed else {**pointers, **numbers}.get(name, "fp32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
    assert compiled.asm["cubin"]
    # What it computes stays in registers; more would mean that the tile's layout went wrong.
    assert compiled.metadata.shared < 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [224, 336])
def test_on_a_gpu_at_real_sizes(interpolation: str, size: int) -> None:
    image = noise(4, 480, 640)
    whole, cells = np.asarray([(-80, 0, 720, 480)], np.float32), Views.parse("1+3x3").cells(640, 480)
    boxes = np.stack([np.concatenate([whole, cells])] * 4)
    found = view_kernels.cut_views_fused(
        torch.from_numpy(image).cuda(), torch.from_numpy(boxes).cuda(), size, interpolation, MEAN, STD
    )
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert largest_error(found.cpu().numpy(), reference(image, boxes, size, interpolation)) < 0.02

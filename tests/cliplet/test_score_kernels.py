"""The kernels that score features, against `Snippets.unit` and `Snippets.score`; on a CPU in triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from interpreted import call, interpreter
from torch.nn import functional
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cliplet import score_kernels
from cliplet.snippets import aggregate
from cliplet.views import Aggregation

AGGREGATIONS = (Aggregation(), Aggregation("cdul", 0.3), Aggregation("max"), Aggregation("mean"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as executor:
        yield executor


def towers(images: int, views: int, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, V, D] of very different lengths, and unit text rows [C, D]."""
    random = np.random.default_rng(classes)
    features = random.normal(size=(images, views, width)) * 10 ** random.uniform(-2, 2, (images, views, 1))
    text = random.normal(size=(classes, width))
    # Each view is close to some class, so that probabilities are not all alike.
    features += 2 * np.linalg.norm(features, axis=-1, keepdims=True) * text[views % classes] / width**0.5
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    return features.astype(np.float32), text.astype(np.float32)


def reference(
    features: np.ndarray, text: np.ndarray, scale: float, bias: float | None, aggregation: Aggregation
) -> tuple[torch.Tensor, torch.Tensor]:
    """View probabilities and scores, in float64."""
    unit = functional.normalize(torch.from_numpy(features).double(), dim=-1)
    logits = scale * (unit @ torch.from_numpy(text).double().T)
    view_probs = logits.softmax(dim=-1) if bias is None else (logits + bias).sigmoid()
    return view_probs, aggregate(view_probs, aggregation)


@pytest.mark.parametrize("bias", [None, -4.0], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
@pytest.mark.parametrize(
    ("images", "views", "classes", "width"),
    # One of all; more views than a block; all that a block of classes holds; several blocks, the last with one class.
    [(1, 1, 1, 1), (2, 19, 5, 40), (1, 3, 128, 33), (2, 17, 257, 7)],
)
def test_scores_are_those_of_the_module(
    pool: ProcessPoolExecutor,
    images: int,
    views: int,
    classes: int,
    width: int,
    aggregation: Aggregation,
    bias: float | None,
) -> None:
    features, text = towers(images, views, classes, width)
    given = (features, text, 20.0, bias, aggregation)
    found = pool.submit(call, "cliplet.score_kernels", "score_fused", *given).result()
    for ours, theirs in zip(found, reference(*given), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_twenty_thousand_classes_share_one_softmax(pool: ProcessPoolExecutor) -> None:
    features, text = towers(1, 2, 20_000, 16)
    given = (features, text, 100.0, None, Aggregation())
    found = pool.submit(call, "cliplet.score_kernels", "score_fused", *given).result()
    np.testing.assert_allclose(found[0].sum(axis=-1), 1, atol=1e-4)
    for ours, theirs in zip(found, reference(*given), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("kernel", ["_score_kernel", "_share_kernel"])
@pytest.mark.parametrize("kind", ["cdul", "mean"])
def test_they_compile_for_a_gpu_that_is_not_here(
    kernel: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(score_kernels, kernel)
    fixed = {
        "KIND": kind,
        "SIGMOID": False,
        "SHARED": kind == "mean",
        "VIEWS": 16,
        "CLASSES": 32,
        "EMBEDDING": 32,
        "BLOCKS": 4,
    }
    fixed = {name: value for name, value in fixed.items() if name in function.arg_names}
    types = {**dict.fromkeys(("views", "classes", "width"), "i32"), **dict.fromkeys(fixed, "constexpr")}
    types |= dict.fromkeys(("scale", "bias", "zeta"), "fp32")
    source = ASTSource(function, {name: types.get(name, "*fp32") for name in function.arg_names}, fixed)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("bias", [None, -10.0], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [80, 1000, 20_000])
def test_on_a_gpu_at_real_sizes(classes: int, bias: float | None) -> None:
    features, text = towers(8, 30, classes, 512)
    for aggregation in AGGREGATIONS:
        found = score_kernels.score_fused(
            torch.from_numpy(features).cuda(), torch.from_numpy(text).cuda(), 100.0, bias, aggregation
        )
        wanted = reference(features, text, 100.0, bias, aggregation)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours.cpu().numpy(), theirs.numpy(), atol=1e-5)

"""A process in which kernels run on the CPU: triton reads TRITON_INTERPRET when it is imported, and only then."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import numpy as np

from cliplet.views import Aggregation, Preprocessing


def interpreter() -> ProcessPoolExecutor:
    """A pool of one such process; `pool.submit(call, ...).result()` runs something in it."""
    return ProcessPoolExecutor(1, get_context("spawn"), _begin)


def call(module: str, function: str, *arguments: Any) -> list[np.ndarray]:
    """What a function of `module` returns for numpy arrays, as numpy arrays in float32."""
    import torch

    def to_torch(value: Any) -> Any:
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    with torch.inference_mode():
        results = getattr(import_module(module), function)(*map(to_torch, arguments))
    return [r.float().numpy() for r in (results if isinstance(results, tuple) else (results,))]


def run_snippets(feeds: dict[str, np.ndarray], fed: Preprocessing) -> list[list[np.ndarray]]:
    """View probabilities and scores of a small `Snippets`: as it stands, and between the two kernels."""
    import torch
    from torch import nn

    from cliplet.runners.torch_encoder import FusedSnippets
    from cliplet.snippets import Snippets

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * fed.size**2, 6))
    text = nn.functional.normalize(torch.randn(4, 6), dim=-1)
    module = Snippets(encoder, text, 10.0, None, fed, Aggregation())
    with torch.inference_mode():
        tensors = [torch.from_numpy(feeds[name]) for name in ("image", "boxes")]
        runs = [m(*tensors) for m in (module, FusedSnippets(module, torch.float32))]
    return [[r.numpy() for r in results] for results in runs]


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(all="ignore")  # the interpreter also computes what masks throw away

"""What a machine can do at most, measured: products of matrices and memory traffic; and what an encoder asks for.

The roofline (Williams, Waterman, Patterson 2009): no engine passes the smaller of the peak of its arithmetic and the
bandwidth times the arithmetic for each byte that has to be moved. Moved here are the weights, once a batch, and
nothing else, so that the limit is one that cannot be passed rather than one that is usual.
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from cliplet.errors import DataError
from cliplet.machine import usable_cores

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
# Side of the square matrices: large enough for the best rate of a processor, and of a GPU.
SIDES = {"cpu": 2048, "cuda": 8192}
# Bytes of the arrays that are copied to measure memory: far beyond all caches.
TRAFFIC = {"cpu": 2**28, "cuda": 2**31}
LEAST_TRIES = 4


def limits(
    precisions: Sequence[str], device: str, threads: int = 0, seconds: float = 0.5, scale: float = 1.0
) -> dict[str, Any]:
    """This machine's limits: `gop_per_s` of matrix products in each precision, `gb_per_s` of memory, `by` and `notes`.

    Where torch is missing, numpy's float32 product stands for all precisions, and the notes say so.

    Args:
        seconds: for each measurement; the best of it counts.
        scale: of the sides of matrices and arrays; less than 1 for a quick look.
    """
    cores = threads or usable_cores()
    side = max(64, int(SIDES[device] * scale))
    size = max(2**20, int(TRAFFIC[device] * scale))
    if find_spec("torch") is None:
        notes = ["no torch: the matrix product is numpy's in float32, whatever the precision"]
        rate = _product_by_numpy(side, seconds)
        return {
            "by": f"numpy {np.__version__}",
            "gop_per_s": dict.fromkeys(precisions, rate),
            "gb_per_s": _copies(size, cores, seconds),
            "notes": notes,
        }
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(cores)
    rates, notes = {}, []
    for precision in precisions:
        try:
            rates[precision] = _product_by_torch(torch, precision, device, side, seconds)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            notes.append(f"torch has no {precision} matrix product on {device}: {reason}")
    bandwidth = (
        _copies(size, cores, seconds) if device == "cpu" else _copies_on_gpu(torch, size, device, seconds)
    )
    return {"by": f"torch {torch.__version__}", "gop_per_s": rates, "gb_per_s": bandwidth, "notes": notes}


def roofline(
    work: Mapping[str, float], measured: Mapping[str, Any], precision: str, views_per_batch: int
) -> dict[str, Any] | None:
    """The most views a second that `limits` leave, and what limits them (`arithmetic` or `memory`); None if unknown.

    Args:
        work: what `encoder_work` counted.
        precision: what the encoder's products are done in; of several the lowest counts.
    """
    peak = measured["gop_per_s"].get(precision)
    if peak is None:
        return None
    by_arithmetic = peak / work["gflop_per_view"]
    bytes_per_view = work["parameters"] * BYTES[precision] / views_per_batch
    by_memory = measured["gb_per_s"] * 1e9 / bytes_per_view
    return {
        "views_per_s": min(by_arithmetic, by_memory),
        "by": "arithmetic" if by_arithmetic <= by_memory else "memory",
    }


def lowest_precision(read: str) -> str:
    """What products are done in, of what a runner read back: `int8` of `fp32+int8`, `fp32` of `fp16/fp32`."""
    products = read.rpartition("/")[2]
    return next((p for p in ("int8", "bf16", "fp16", "fp32") if p in products), "fp32")


def encoder_work(graph: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Arithmetic of the encoder for one view, in GFLOP (a multiplication and an addition are two), and its parameters.

    Counted from the shapes that onnxruntime meets when it runs `feeds` through the float32 graph as it stands:
    products of matrices and convolutions, from the first convolution on, with which every encoder begins; before it,
    views are cut.

    Raises:
        DataError: the graph holds neither.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"] for e in events if e["name"].endswith("_kernel_time") and "op_name" in e.get("args", {})]
    counted = [(node["op_name"], _flop(node)) for node in ran]
    begin = next((i for i, (name, _) in enumerate(counted) if name == "Conv"), 0)
    total = sum(flop for _, flop in counted[begin:])
    if not total:
        raise DataError(
            f"{graph} holds no matrix product and no convolution", "a graph that cliplet exported"
        )
    views = int(np.prod(feeds["boxes"].shape[:-1]))
    size = sum(file.stat().st_size for file in (graph, Path(f"{graph}.data")) if file.exists())
    return {"gflop_per_view": total / views / 1e9, "parameters": size / BYTES["fp32"]}


def _flop(node: Mapping[str, Any]) -> int:
    """Operations of a node as onnxruntime's profile describes it."""
    kind = node["op_name"]
    if kind not in ("Conv", "MatMul", "Gemm"):
        return 0
    inputs = [list(shape.values())[0] for shape in node["input_type_shape"]]
    made = math.prod(list(node["output_type_shape"][0].values())[0])
    if kind == "Conv":
        weights = inputs[1]
        return 2 * made * math.prod(weights) // weights[0]
    # A constant second factor may be missing from the profile, so the shared side is taken from the first.
    return 2 * made * int(inputs[0][-1])


def _product_by_numpy(side: int, seconds: float) -> float:
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((side, side), np.float32) for _ in range(2))
    return 2 * side**3 / min(_times(lambda: left @ right, seconds)) / 1e9


def _product_by_torch(torch: Any, precision: str, device: str, side: int, seconds: float) -> float:
    if precision == "int8":
        left, right = (torch.randint(-9, 9, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        product = torch._int_mm
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = torch.matmul

    def multiply() -> None:
        product(left, right)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / min(_times(multiply, seconds)) / 1e9


def _copies(size: int, threads: int, seconds: float) -> float:
    """GB/s read and written while every thread copies its part of a large array."""
    parts = np.array_split(np.ones(size // 8, np.float64), threads)
    targets = [np.zeros_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        best = min(_times(lambda: list(pool.map(np.copyto, targets, parts)), seconds))
    return 2 * size / best / 1e9


def _copies_on_gpu(torch: Any, size: int, device: str, seconds: float) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * size / min(_times(copy, seconds)) / 1e9


def _times(work: Callable[[], object], seconds: float) -> list[float]:
    return list(_timed(work, seconds))


def _timed(work: Callable[[], object], seconds: float) -> Iterator[float]:
    """Seconds of each try; a slow product is not tried as often as would be good."""
    began, tries, elapsed = perf_counter(), 0, 0.0
    while not tries or elapsed < seconds or (tries < LEAST_TRIES and elapsed < 4 * seconds):
        start = perf_counter()
        work()
        elapsed, tries = perf_counter() - began, tries + 1
        yield perf_counter() - start

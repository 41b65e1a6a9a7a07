"""The machine's limits and what an encoder asks for: against arithmetic by hand, and torch's own count."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cliplet.deploy import bench_limits
from cliplet.deploy.bench_limits import encoder_work, limits, lowest_precision, roofline
from cliplet.deploy.bench_load import GpuMeter, LoadMeter
from cliplet.errors import DataError

SIZE = 8


def graph(folder: Path, *, with_encoder: bool = True) -> Path:
    """A product that cuts views, a convolution of 4 x 3 x 3 x 3 weights, and a product of 4 by 5."""
    weights = {
        "cut": np.ones((SIZE, SIZE), np.float32),
        "kernel": np.ones((4, 3, 3, 3), np.float32),
        "head": np.ones((4, 5), np.float32),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("ReduceSum", ["boxes"], ["sum"], keepdims=0),
    ]
    if with_encoder:
        nodes += [
            helper.make_node("MatMul", ["planes", "cut"], ["pixels"]),
            helper.make_node("Conv", ["pixels", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
            helper.make_node("ReduceMean", ["maps", "axes"], ["pooled"], keepdims=0),
            helper.make_node("MatMul", ["pooled", "head"], ["found"]),
        ]
    else:
        nodes.append(helper.make_node("ReduceMean", ["planes", "axes"], ["found"], keepdims=0))
    made = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", SIZE, SIZE, 3]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["B", "V", 4]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("found", "sum")],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(folder / "model.onnx"))
    return folder / "model.onnx"


FEEDS = {"image": np.zeros((1, SIZE, SIZE, 3), np.uint8), "boxes": np.zeros((1, 1, 4), np.float32)}


def test_arithmetic_is_counted_from_the_first_convolution_on(tmp_path: Path) -> None:
    found = encoder_work(graph(tmp_path), FEEDS)
    convolution = 2 * (4 * SIZE * SIZE) * (3 * 3 * 3)
    product = 2 * 5 * 4
    assert found["gflop_per_view"] == pytest.approx((convolution + product) / 1e9)
    assert found["parameters"] == pytest.approx((tmp_path / "model.onnx").stat().st_size / 4)


def test_a_graph_without_arithmetic_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no matrix product"):
        encoder_work(graph(tmp_path, with_encoder=False), FEEDS)


def test_the_roofline_is_the_lower_of_two_limits() -> None:
    work = {"gflop_per_view": 2.0, "parameters": 1e8}
    measured = {"gop_per_s": {"fp32": 100.0, "int8": 400.0}, "gb_per_s": 20.0}
    # 100 / 2 by arithmetic; by memory 20e9 / (4e8 / views of a batch).
    assert roofline(work, measured, "fp32", 10) == {"views_per_s": pytest.approx(50), "by": "arithmetic"}
    assert roofline(work, measured, "fp32", 1) == {"views_per_s": pytest.approx(50), "by": "arithmetic"}
    slow = {**measured, "gb_per_s": 2.0}
    assert roofline(work, slow, "fp32", 1) == {"views_per_s": pytest.approx(5), "by": "memory"}
    assert roofline(work, slow, "int8", 1) == {"views_per_s": pytest.approx(20), "by": "memory"}
    assert roofline(work, measured, "fp16", 1) is None


@pytest.mark.parametrize(
    ("read", "lowest"),
    [("fp32", "fp32"), ("fp16", "fp16"), ("fp16/fp32", "fp32"), ("fp32+int8", "int8"), ("bf16+fp32", "bf16")],
)
def test_the_lowest_precision_of_the_products_counts(read: str, lowest: str) -> None:
    assert lowest_precision(read) == lowest


def test_limits_are_measured_in_every_precision() -> None:
    found = limits(("bf16", "fp32", "int8"), "cpu", threads=1, seconds=0.01, scale=0.05)
    assert all(rate > 0 for rate in found["gop_per_s"].values()) and found["gb_per_s"] > 0
    assert set(found["gop_per_s"]) | {note.split()[3] for note in found["notes"]} == {"bf16", "fp32", "int8"}


def test_without_torch_numpy_stands_in_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_limits, "find_spec", lambda _: None)
    found = limits(("fp32", "int8"), "cpu", threads=1, seconds=0.01, scale=0.05)
    assert found["by"].startswith("numpy")
    assert found["gop_per_s"]["fp32"] == found["gop_per_s"]["int8"] > 0
    assert "no torch" in found["notes"][0]


def test_own_work_is_told_from_that_of_others() -> None:
    meter = LoadMeter()
    for _ in range(3_000_000):
        math.sqrt(2)
    load = meter.read()
    # How much of a core it got meanwhile is the machine's affair.
    assert load.own > 0
    if load.others is not None:
        assert load.others >= 0 and load.taken is not None and load.taken <= load.others + 1e-9


@pytest.mark.parametrize(("busy", "disturbed"), [(0.0, False), (50.0, True)])
def test_a_machine_under_load_is_noticed(
    busy: float, disturbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliplet.deploy import bench_load

    seconds = iter((100.0, 100.0 + busy))
    monkeypatch.setattr(bench_load, "_busy_seconds", lambda _: next(seconds))
    meter = LoadMeter()
    load = meter.read()
    assert load.disturbed is disturbed


def nvml(**changes: Any) -> ModuleType:
    """A stand-in for pynvml: 3 GiB in use, then 5; 100 J, then 130."""
    used, energy = iter((3 * 2**30, 5 * 2**30)), iter((100_000, 130_000))
    module: Any = ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetMemoryInfo = lambda _: SimpleNamespace(used=next(used))
    module.nvmlDeviceGetTotalEnergyConsumption = lambda _: next(energy)
    for name, value in changes.items():
        setattr(module, name, value)
    return module  # type: ignore[no-any-return]


def test_a_gpu_tells_its_memory_and_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    meter = GpuMeter()
    assert meter.lacking == ""
    assert (meter.joules(), meter.joules()) == (100.0, 130.0)
    assert meter.grown() == 2 * 2**30


def test_without_nvml_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = GpuMeter()
    assert "pynvml is not installed" in meter.lacking
    assert meter.joules() is None and meter.grown() is None


def test_a_driver_that_does_not_answer_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml()
    error = module.NVMLError

    def fail() -> None:
        raise error("Driver Not Loaded")

    module.nvmlInit = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert "Driver Not Loaded" in GpuMeter().lacking

"""The adapter: which library is there, what differs between them, and what they say."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_engine import PRODUCT, ToyCuda, ToyRtx, ToyTensorRt, toy_graph

from cliplet.contract import FEATURES, PIXELS
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.tensorrt_layers import network_products
from cliplet.tensorrt_library import Library, find_library


@pytest.fixture(scope="module")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return find_library("tensorrt_rtx")


def test_the_library_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("tensorrt_rtx")
    vars(stand_in).update(__version__="1.7.1", ILogger=ToyTensorRt.ILogger)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: stand_in if name == "tensorrt_rtx" else None
    )
    assert str(find_library()) == "tensorrt_rtx 1.7.1"


def test_libraries_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="one of tensorrt, tensorrt_rtx"):
        find_library("tensorflow")
    for name, package in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx-cu13")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(EnvironmentError_, match=f"pip install {package},"):
            find_library(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentError_, match="pip install tensorrt,"):
        find_library()


def test_targets() -> None:
    plain, cuda = Library("tensorrt", ToyTensorRt(ToyCuda())), ToyCuda()
    with pytest.raises(UsageError, match="GPU of this machine only") as caught:
        plain.check_target("sm89")
    assert caught.value.fix == "--runtime tensorrt_rtx --target sm89"
    module: Any = ToyRtx(cuda)
    module.ComputeCapability = SimpleNamespace(
        __members__={"NONE": 0, "CURRENT": 1, "SM120": 4, "SM75": 2, "SM89": 3}
    )
    ahead = Library("tensorrt_rtx", module)
    assert ahead.targets == ("sm75", "sm89", "sm120")
    ahead.check_target("sm75")
    with pytest.raises(UsageError, match="one of sm75, sm89, sm120"):
        ahead.check_target("sm90")


def test_real_targets(rtx: Library) -> None:
    assert {"sm75", "sm80", "sm86", "sm89", "sm120"} <= set(rtx.targets)
    assert not rtx.times_kernels


@pytest.mark.parametrize("flags, wanted", [({"STRONGLY_TYPED": 1}, 2), ({}, 0)])
def test_networks_are_strongly_typed_with_the_flag_or_without(flags: dict[str, int], wanted: int) -> None:
    module: Any = ToyTensorRt(ToyCuda())
    module.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
    builder = SimpleNamespace(create_network=lambda given: given)
    assert Library("tensorrt", module).network(builder) == wanted


def test_float32_means_float32(rtx: Library) -> None:
    builder = rtx.builder()
    network = rtx.network(builder)
    assert network.get_flag(rtx.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert builder.create_builder_config().get_flag(rtx.module.BuilderFlag.TF32), "it is on by default"
    config = rtx.config(builder, "sm86")
    assert not config.get_flag(rtx.module.BuilderFlag.TF32)
    assert config.profiling_verbosity == rtx.module.ProfilingVerbosity.DETAILED
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == rtx.module.ComputeCapability.SM86


def test_settings_without_what_later_releases_lack() -> None:
    module: Any = ToyTensorRt(ToyCuda())
    module.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    module.BuilderFlag = SimpleNamespace()
    config = SimpleNamespace(profiling_verbosity=None)
    made = Library("tensorrt", module).config(SimpleNamespace(create_builder_config=lambda: config), None)
    assert made.profiling_verbosity == "detailed"


def test_timings_of_another_gpu_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, used = tmp_path / "timings", []
    file.write_bytes(b"another")

    def accept(cache: bytes, ignore_mismatch: bool) -> bool:
        used.append(cache)
        return cache != b"another" and not ignore_mismatch

    config = SimpleNamespace(create_timing_cache=lambda known: known, set_timing_cache=accept)
    # The level is set here: a library that another test imports may have raised the root's.
    with caplog.at_level(logging.WARNING, "cliplet.tensorrt_library"):
        Library("tensorrt", ToyTensorRt(ToyCuda())).load_timings(config, file)
    assert used == [b"another", b""] and "does not accept the timings" in caplog.text


def test_what_a_library_says(caplog: pytest.LogCaptureFixture) -> None:
    library = Library("tensorrt", ToyTensorRt(ToyCuda()))
    with caplog.at_level(logging.DEBUG, "cliplet.tensorrt_library"):
        library.logger.log(2, "a warning")
        library.logger.log(1, "an error")
        with library.listening() as said:
            library.logger.log(1, "ERROR: something is wrong")
            library.logger.log(1, "[a::b] Error Code 9: the reason")
            library.logger.log(4, "Layers:\nName: a")
        library.logger.log(1, "another error")
    assert said.reason == "[a::b] Error Code 9: the reason" and said.layers == "Layers:\nName: a"
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["a warning"] == "WARNING"
    assert (levels["an error"], levels["another error"]) == ("ERROR", "ERROR")
    assert levels["ERROR: something is wrong"] == "DEBUG", "it becomes an exception"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_precision_of_a_network(precision: str, rtx: Library, tmp_path: Path) -> None:
    builder = rtx.builder()
    network = rtx.network(builder)
    assert rtx.parser(network).parse_from_file(str(toy_graph(tmp_path / "toy.onnx", precision)))
    assert network_products(network) == {PRODUCT: precision}


def test_only_the_encoder_counts_and_int8_is_seen_through_its_scales(rtx: Library, tmp_path: Path) -> None:
    weights = {
        name: numpy_helper.from_array(np.eye(3, dtype=np.float32), name) for name in ("before", "w", "after")
    }
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    zero = numpy_helper.from_array(np.int8(0), "zero")
    nodes = [helper.make_node("MatMul", ["x", "before"], [PIXELS], "first")]
    for source, made in ((PIXELS, "a"), ("w", "b")):
        nodes += [
            helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{made}_int8"]),
            helper.make_node("DequantizeLinear", [f"{made}_int8", "scale", "zero"], [made]),
        ]
    nodes += [
        helper.make_node("MatMul", ["a", "b"], [FEATURES], PRODUCT),
        helper.make_node("MatMul", [FEATURES, "after"], ["y"], "last"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [*weights.values(), scale, zero])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "q.onnx",
    )
    network = rtx.network(rtx.builder())
    parser = rtx.parser(network)
    assert parser.parse_from_file(str(tmp_path / "q.onnx"))
    assert network_products(network) == {PRODUCT: "int8"}

"""Runs an ONNX graph or an OpenVINO IR with OpenVINO on the CPU, the encoder alone in low precision.

OpenVINO's precision hint holds for all of a compiled model, and in bfloat16 the weights of the resize and the product
with the text matrix lose what they need. So a graph is cut at the tensors `pixels` and `features` into three models
(before, encoder, after) that hand each other their tensors, and only the encoder gets the hint.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np

from cliplet.contract import FEATURES, PIXELS, TEXT, GraphContract
from cliplet.errors import ArtifactError, EnvironmentError_
from cliplet.machine import usable_cores
from cliplet.runners import engine_failure

_TELEMETRY = "openvino_telemetry"
# The element type of the encoder's products that each precision stands for, and what OpenVINO is asked for. What is
# not quantised in an int8 graph stays float32.
_PRODUCT_TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
_PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul"})


class OpenVinoRunner:
    """OpenVINO's compiled models behind the contract of a graph.

    Args:
        model: an IR (`.xml`, with its `.bin` beside it) or an ONNX graph.
        precision: of the encoder: `fp32`, `bf16`, or `int8` for a quantised graph.
        threads: of the engine; 0 means one for each core that this process may use.
        streams: threads that may call `infer` at the same time; each has its share of the engine's.
        observe: names of inner tensors that `infer` gives beside the contract's outputs.

    Attributes:
        precision: that in which the compiled encoder was found to compute its products.

    Raises:
        EnvironmentError_: OpenVINO is not installed, or does not compute in this precision on this CPU.
        ArtifactError: the file is no graph of this contract, or is not of this precision.
    """

    device = "cpu"

    def __init__(
        self,
        model: Path,
        contract: GraphContract,
        precision: str = "fp32",
        threads: int = 0,
        streams: int = 1,
        observe: tuple[str, ...] = (),
    ) -> None:
        openvino = load_openvino()
        if precision not in _HINTS:
            raise EnvironmentError_(
                f"asked for {precision} with OpenVINO", f"one of {', '.join(_HINTS)}", "pass --precision fp32"
            )
        self.contract = contract
        self.runtime = f"openvino {openvino.__version__.split('-')[0]}"
        self._observed = observe
        self._tensor = openvino.Tensor
        whole = read_graph(model)
        _check_names(model, whole, contract)
        parts = [whole] if contract is TEXT else list(cut_graph(whole))
        _observe(model, parts, observe)
        encoder = 0 if contract is TEXT else 1
        self.concurrency = min(streams, threads or usable_cores())
        options = _options(threads, self.concurrency)
        models = []
        for i, part in enumerate(parts):
            hint = _HINTS[precision] if i == encoder else "f32"
            try:
                compiled = openvino_core().compile_model(
                    part, "CPU", {**options, "INFERENCE_PRECISION_HINT": hint}
                )
            except RuntimeError as error:
                raise ArtifactError(
                    f"{self.runtime} cannot compile {model}: {_reason(error)}",
                    "a graph it has all operators of",
                ) from error
            if i == encoder:
                self.precision = _read_precision(compiled)
                _check_precision(model, precision, self.precision)
            models.append(compiled)
        # One request of each part for each stream; whoever infers takes a free set.
        self._free: SimpleQueue[list[Any]] = SimpleQueue()
        for _ in range(self.concurrency):
            self._free.put([compiled.create_infer_request() for compiled in models])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._free

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. `DataError` if feeds do not fit, `EnvironmentError_` if the engine fails on them."""
        self.contract.check_feeds(feeds)
        wanted = {t.name for t in self.contract.outputs} | set(self._observed)
        requests = self._free.get()
        try:
            # Memory is shared where OpenVINO can: it takes no array in another order, or that may not be written.
            known = {
                name: self._tensor(np.require(array, requirements=["C", "W"]), shared_memory=True)
                for name, array in feeds.items()
            }
            for request in requests:
                for port in request.model_inputs:
                    request.set_tensor(port, known[port.any_name])
                request.infer()
                for port in request.model_outputs:
                    known.update(dict.fromkeys(port.names, request.get_tensor(port)))
            # The engine writes the next batch into the same memory.
            outputs = {name: known[name].data.copy() for name in wanted}
        except RuntimeError as error:
            raise engine_failure(self.runtime, feeds, RuntimeError(_reason(error))) from error
        finally:
            self._free.put(requests)
        self.contract.check_outputs(feeds, outputs)
        return outputs


def load_openvino() -> Any:
    """The library `openvino`. `EnvironmentError_` if it is missing."""
    try:
        with no_telemetry():
            return importlib.import_module("openvino")
    except ImportError as error:
        raise EnvironmentError_(
            f"openvino cannot be imported: {error}",
            "the library openvino",
            "pip install openvino, or use the ONNX graph with onnxruntime",
        ) from error


@cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process, which is never closed; `EnvironmentError_` without the library.

    The first model that a core compiles for the CPU gives its thread a stack for signal handlers, and the last one that
    goes puts back the stack that was there before. With several cores that go in another order than they came, that one
    is gone already, and the next signal, such as Ctrl-C, ends the process by a segmentation fault.
    """
    return load_openvino().Core()


@contextmanager
def no_telemetry() -> Iterator[None]:
    """Context in which imports do not find the library that reports each of them to OpenVINO's makers."""
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        # Another thread, which imports at the same time, may have been here.
        sys.modules.pop(_TELEMETRY, None)
        if before is not None:
            sys.modules[_TELEMETRY] = before


def read_graph(path: Path) -> Any:
    """The `openvino.Model` of an IR or ONNX file. `ArtifactError` if it holds none, or has unknown operators."""
    try:
        return openvino_core().read_model(str(path))
    except RuntimeError as error:
        found = re.search(r"No conversion rule found for operations: (.*)", str(error))
        if found:
            raise ArtifactError(
                f"OpenVINO lacks operators of {path}: {found[1]}",
                "a graph of operators that it has",
                "use the ONNX graph with onnxruntime",
            ) from error
        raise ArtifactError(
            f"OpenVINO cannot read {path}: {_reason(error)}",
            "an OpenVINO IR with its .bin beside it, or an ONNX graph",
            "export again",
        ) from error


def find_tensor(model: Any, name: str) -> Any:
    """The output of a node of `model` that is named so; None if there is none."""
    outputs = (output for node in model.get_ops() for output in node.outputs())
    return next((output for output in outputs if name in output.names), None)


def cut_graph(model: Any) -> tuple[Any, Any, Any]:
    """Three models that share the weights of `model`: up to the tensor `pixels`, on to `features`, and what follows.

    Each has for inputs the tensors it needs: those at which it was cut, and inputs of the whole (a shape, say).
    """
    return (
        _part(model, (), PIXELS),
        _part(model, (PIXELS,), FEATURES),
        _part(model, (PIXELS, FEATURES), None),
    )


def _part(model: Any, begins: tuple[str, ...], end: str | None) -> Any:
    """From the tensors `begins` and the inputs to the tensor `end`, or to the outputs."""
    openvino = load_openvino()
    clone = model.clone()
    results = clone.get_results() if end is None else [openvino.opset13.result(find_tensor(clone, end))]
    for name in begins:
        output = find_tensor(clone, name)
        parameter = openvino.opset13.parameter(output.partial_shape, output.element_type, name=name)
        parameter.output(0).set_names({name})
        for target in output.get_target_inputs():
            target.replace_source_output(parameter.output(0))
    return openvino.Model(results, _parameters(results))


def _parameters(nodes: list[Any]) -> list[Any]:
    """All inputs that `nodes` depend on."""
    seen: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.get_name() not in seen:
            seen[node.get_name()] = node
            waiting += [port.get_source_output().get_node() for port in node.inputs()]
    return [node for node in seen.values() if node.get_type_name() == "Parameter"]


def _options(threads: int, streams: int) -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": threads or usable_cores(),
        "NUM_STREAMS": streams,
        # Several processes on one machine would be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }


def _observe(model: Path, parts: list[Any], names: tuple[str, ...]) -> None:
    for name in names:
        part = next((p for p in parts if find_tensor(p, name) is not None), None)
        if part is None:
            raise ArtifactError(f"{model} has no tensor {name!r}", "the name of a tensor in it")
        if not any(name in port.names for port in (*part.inputs, *part.outputs)):
            part.add_outputs(name)


def _read_precision(compiled: Any) -> str:
    """Precision of the products of a compiled model: `int8` if most are, otherwise all precisions that occur."""
    kinds: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in _PRODUCTS:
            found = info["runtimePrecision"].astype(str)
            kinds[_PRODUCT_TYPES.get(found, found)] += 1
    # Layers whose input is left in float32 are in every quantised graph.
    if 2 * kinds["int8"] > kinds.total():
        return "int8"
    return "+".join(sorted(+kinds)) or "fp32"


def _check_precision(model: Path, asked: str, found: str) -> None:
    if found == asked:
        return
    if asked == "bf16":
        raise EnvironmentError_(
            f"asked for bf16, but OpenVINO computes {found} on this CPU",
            "a CPU with AVX-512 BF16 or AMX",
            "pass --precision fp32",
        )
    raise ArtifactError(
        f"asked for {asked}, but {model} computes in {found}", f"an {asked} graph", "export again"
    )


def _check_names(model: Path, graph: Any, contract: GraphContract) -> None:
    found = [next(iter(port.names), "") for port in (*graph.inputs, *graph.outputs)]
    wanted = [t.name for t in (*contract.inputs, *contract.outputs)]
    inner = () if contract is TEXT else (PIXELS, FEATURES)
    missing = [name for name in inner if find_tensor(graph, name) is None]
    if found != wanted or missing:
        raise ArtifactError(
            f"{model} has tensors {found}" + (f" and no inner tensor {missing}" if missing else ""),
            f"those of graph {contract.name!r}: {[*wanted, *inner]}",
            "export again",
        )


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message that says something; those before name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

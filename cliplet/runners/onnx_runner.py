"""Runs an ONNX graph with onnxruntime, on the provider that was asked for or not at all."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _native

from cliplet.contract import GraphContract
from cliplet.errors import ArtifactError, EnvironmentError_
from cliplet.machine import usable_cores
from cliplet.runners import engine_failure
from cliplet.tensorrt_layers import computes_in

# With their options. Float32 means float32: TF32 would round products to 10 bits of mantissa.
PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
# The graph's metadata under which export writes what it found the encoder's matrix products to be done in.
PRECISION_KEY = "cliplet.precision"
# CPUs on which onnxruntime casts fp16 to float32 before each product; elsewhere it has some kernels for it.
_WITHOUT_FP16 = ("x86_64", "amd64")
# Where onnxruntime looks for weights beside a graph that it gets as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

# onnxruntime's exceptions have no common base of their own.
_ENGINE_ERRORS = tuple(
    e
    for e in vars(_native).values()
    if isinstance(e, type) and issubclass(e, Exception) and e is not Exception
)


class OnnxRunner:
    """An onnxruntime session behind the contract of its graph.

    Args:
        model: the graph's file.
        threads: of the engine; 0 means one for each core that this process may use.
        precision: what the graph has to say of itself, `int8` for a quantised one; None takes it as it is.
        streams: threads that may call `infer` at the same time, on a CPU; they share the engine's.
        observe: names of inner tensors that `infer` returns beside the contract's outputs. Needs onnx.

    Attributes:
        precision: what the file says that the encoder's matrix products are done in, `fp32` where it says nothing:
            export writes into the graph's metadata what it counted in the finished graph, and a session offers no
            types but those of inputs and outputs, which are float32 in all precisions. Where the provider is known to
            multiply in another type than the graph's, that type follows a stroke: `fp16/fp32` (weights/products) is
            fp16 on x86 CPUs, for which onnxruntime has no kernels.

    Raises:
        EnvironmentError_: the device's provider, or onnx to observe with, is not installed or did not load.
        ArtifactError: the file is no graph of this contract or precision, or has no tensor of a name in `observe`.
    """

    def __init__(
        self,
        model: Path,
        contract: GraphContract,
        device: str = "cpu",
        threads: int = 0,
        *,
        precision: str | None = None,
        streams: int = 1,
        observe: tuple[str, ...] = (),
    ) -> None:
        self.contract = contract
        self._observed = observe
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        provider, provider_options = PROVIDERS[device]
        if provider not in onnxruntime.get_available_providers():
            raise EnvironmentError_(
                f"asked for device {device!r}, but this onnxruntime has no {provider}",
                f"one of {onnxruntime.get_available_providers()}",
                "pip install 'cliplet[gpu]', or pass --device cpu",
            )
        # It would tell its makers of every session; what is labelled here is nobody's business.
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        self.concurrency = min(streams, threads or usable_cores()) if device == "cpu" else 1
        # Those that call work too; one of them is among the session's own threads already.
        options.intra_op_num_threads = (threads or usable_cores()) - self.concurrency + 1
        # Shapes vary with the images of a batch: a plan of memory per shape would be kept for each.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        try:
            if observe:
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(model.parent))
            graph = _with_outputs(model, observe) if observe else str(model)
            self._session = onnxruntime.InferenceSession(
                graph, options, providers=[(provider, provider_options)]
            )
        except _ENGINE_ERRORS as error:
            raise ArtifactError(
                f"onnxruntime cannot load {model}: {error}", "an ONNX graph", "export again"
            ) from error
        used = self._session.get_providers()[0]
        if used != provider:
            raise EnvironmentError_(
                f"asked for device {device!r}, but the session runs on {used}",
                f"{provider} to load with its libraries",
                "run `cliplet doctor`, or pass --device cpu",
            )
        self.device = device
        noted = self._session.get_modelmeta().custom_metadata_map.get(PRECISION_KEY, "fp32")
        self.precision = _read_precision(noted, device)
        _check_precision(model, precision, noted)
        self._check_names(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. `DataError` if feeds do not fit, `EnvironmentError_` if the engine fails on them."""
        self.contract.check_feeds(feeds)
        names = [*(t.name for t in self.contract.outputs), *self._observed]
        try:
            outputs = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except _ENGINE_ERRORS as error:
            raise engine_failure(self.runtime, feeds, error) from error
        self.contract.check_outputs(feeds, outputs)
        return outputs

    def _check_names(self, model: Path) -> None:
        found = [t.name for t in (*self._session.get_inputs(), *self._session.get_outputs())]
        wanted = [*(t.name for t in (*self.contract.inputs, *self.contract.outputs)), *self._observed]
        if found != wanted:
            raise ArtifactError(
                f"{model} has tensors {found}", f"those of graph {self.contract.name!r}: {wanted}"
            )


def _read_precision(noted: str, device: str) -> str:
    """What is computed of the precision that a graph notes."""
    if device != "cpu" or platform.machine().lower() not in _WITHOUT_FP16:
        return noted
    products = {"fp32" if kind == "fp16" else kind for kind in noted.split("+")}
    computed = "+".join(sorted(products))
    return noted if computed == noted else f"{noted}/{computed}"


def _check_precision(model: Path, asked: str | None, noted: str) -> None:
    if asked is not None and not computes_in(asked, noted):
        raise ArtifactError(
            f"asked for {asked}, but {model} is in {noted}", f"a graph in {asked}", "export again"
        )


def _with_outputs(model: Path, names: tuple[str, ...]) -> bytes:
    """The graph with inner tensors as further outputs, which is the only way to see them; its weights stay outside."""
    try:
        import onnx
    except ImportError as error:
        raise EnvironmentError_(
            f"cannot look at {list(names)} inside {model}: {error}",
            "the package onnx, which changes the graph for it",
            "pip install 'cliplet[export]'",
        ) from error
    try:
        changed = onnx.load(str(model), load_external_data=False)
    # What onnx raises depends on the library that reads the bytes.
    except Exception as error:  # noqa: BLE001
        raise ArtifactError(f"onnx cannot load {model}: {error}", "an ONNX graph", "export again") from error
    known = {name for node in changed.graph.node for name in node.output}
    missing = [name for name in names if name not in known]
    if missing:
        raise ArtifactError(
            f"{model} has no inner tensors {missing}", "a graph that cliplet exported", "export again"
        )
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return bytes(changed.SerializeToString())

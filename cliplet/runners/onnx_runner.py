"""Runs an ONNX graph with onnxruntime, on the provider that was asked for or not at all."""

from __future__ import annotations

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

# With their options. Float32 means float32: TF32 would round products to 10 bits of mantissa.
PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
_PRECISIONS = {"tensor(float)": "fp32", "tensor(float16)": "fp16", "tensor(bfloat16)": "bf16"}

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

    Raises:
        EnvironmentError_: the device's provider is not installed, or did not load.
        ArtifactError: the file is no graph of this contract.
    """

    def __init__(self, model: Path, contract: GraphContract, device: str = "cpu", threads: int = 0) -> None:
        self.contract = contract
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        provider, provider_options = PROVIDERS[device]
        if provider not in onnxruntime.get_available_providers():
            raise EnvironmentError_(
                f"asked for device {device!r}, but this onnxruntime has no {provider}",
                f"one of {onnxruntime.get_available_providers()}",
                "pip install 'cliplet[gpu]', or pass --device cpu",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        # Shapes vary with the images of a batch: a plan of memory per shape would be kept for each.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), options, providers=[(provider, provider_options)]
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
        self.precision = self._read_precision()
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
        names = [t.name for t in self.contract.outputs]
        try:
            outputs = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except _ENGINE_ERRORS as error:
            raise engine_failure(self.runtime, feeds, error) from error
        self.contract.check_outputs(feeds, outputs)
        return outputs

    def _read_precision(self) -> str:
        types = {_PRECISIONS.get(output.type, output.type) for output in self._session.get_outputs()}
        return "+".join(sorted(types))

    def _check_names(self, model: Path) -> None:
        found = [t.name for t in (*self._session.get_inputs(), *self._session.get_outputs())]
        wanted = [t.name for t in (*self.contract.inputs, *self.contract.outputs)]
        if found != wanted:
            raise ArtifactError(
                f"{model} has tensors {found}", f"those of graph {self.contract.name!r}: {wanted}"
            )

"""The few calls of the CUDA runtime that an engine needs, through `cuda-bindings`: memory, streams, graphs.

Addresses are numbers. Every failure is a `CudaFailure` with the runtime's own words.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliplet.errors import EnvironmentError_


class CudaFailure(RuntimeError):
    """A call of the CUDA runtime failed."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be used.

    Attributes:
        target: its compute capability, such as `sm89`.
        driver, cuda: the newest CUDA version that its driver knows, and that of the runtime.
    """

    name: str
    target: str
    driver: str
    cuda: str


class Cuda:
    """The CUDA runtime of this process, on the device that is its current one.

    Args:
        runtime: stands for `cuda.bindings.runtime`.

    Raises:
        EnvironmentError_: `cuda-bindings` is not installed.
    """

    def __init__(self, runtime: Any = None) -> None:
        try:
            self._runtime = runtime or importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise EnvironmentError_(
                f"cannot import cuda.bindings: {error}",
                "the Python bindings of the CUDA runtime, to run engines",
                "pip install cuda-bindings",
            ) from error

    def gpu(self) -> Gpu | None:
        """The current GPU; None if there is no driver or no GPU."""
        runtime = self._runtime
        failure, count = runtime.cudaGetDeviceCount()
        if failure != runtime.cudaError_t.cudaSuccess or not count:
            return None
        device = self._value(runtime.cudaGetDevice())
        properties = self._value(runtime.cudaGetDeviceProperties(device))
        name = properties.name
        return Gpu(
            name.decode() if isinstance(name, bytes) else str(name),
            f"sm{properties.major}{properties.minor}",
            _version(self._value(runtime.cudaDriverGetVersion())),
            _version(self._value(runtime.cudaRuntimeGetVersion())),
        )

    def device_memory(self, size: int) -> int:
        """Address of `size` bytes on the GPU."""
        return int(self._value(self._runtime.cudaMalloc(max(size, 1))))

    def free_device_memory(self, address: int) -> None:
        self._value(self._runtime.cudaFree(address))

    def pinned_memory(self, size: int) -> tuple[int, np.ndarray]:
        """Address of `size` bytes of page-locked memory of the host, and the same as an array uint8 [size]."""
        address = int(self._value(self._runtime.cudaMallocHost(max(size, 1))))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned_memory(self, address: int) -> None:
        self._value(self._runtime.cudaFreeHost(address))

    def copy_to_device(self, target: int, source: int, size: int, stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._value(self._runtime.cudaMemcpyAsync(target, source, size, kind, stream))

    def copy_to_host(self, target: int, source: int, size: int, stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._value(self._runtime.cudaMemcpyAsync(target, source, size, kind, stream))

    def stream(self) -> Any:
        """A new stream that does not wait for the default one; `int` of it is its handle."""
        return self._value(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking))

    def synchronize(self, stream: Any) -> None:
        self._value(self._runtime.cudaStreamSynchronize(stream))

    def destroy_stream(self, stream: Any) -> None:
        self._value(self._runtime.cudaStreamDestroy(stream))

    def capture(self, stream: Any, work: Callable[[], object]) -> Any | None:
        """The graph of what `work` puts on the stream, which is not executed; None if it cannot be captured.

        Args:
            work: raises RuntimeError if it meets what cannot be captured.
        """
        runtime = self._runtime
        # Other threads may allocate meanwhile, without spoiling the capture.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._value(runtime.cudaStreamBeginCapture(stream, mode))
        complete = False
        with suppress(RuntimeError):
            work()
            complete = True
        failure, graph = runtime.cudaStreamEndCapture(stream)
        if failure != runtime.cudaError_t.cudaSuccess or graph is None or not int(graph):
            # The next call, which has nothing to do with it, would else report the failure.
            runtime.cudaGetLastError()
            return None
        try:
            return self._value(runtime.cudaGraphInstantiate(graph, 0)) if complete else None
        finally:
            self._value(runtime.cudaGraphDestroy(graph))

    def launch(self, graph: Any, stream: Any) -> None:
        self._value(self._runtime.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Any) -> None:
        self._value(self._runtime.cudaGraphExecDestroy(graph))

    def _value(self, answer: tuple[Any, ...]) -> Any:
        """What a call gives, if it did not fail."""
        failure, *values = answer
        if failure != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(failure)
            raise CudaFailure(text.decode() if isinstance(text, bytes) else str(text))
        return values[0] if values else None


def _version(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"

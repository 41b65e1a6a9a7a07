"""A loaded TensorRT engine with all that it needs to run: buffers, a stream, contexts and CUDA graphs.

All work of a batch goes into one stream: page-locked memory to the GPU, the engine, and back. Buffers are as large as
the engine's profile allows, and are made once. What a shape costs the CPU at every batch is saved by CUDA graphs. With
`tensorrt`, a shape that comes for the second time is captured, in a context of its own since a graph is bound to what
its context was set to; all contexts share one piece of memory. `tensorrt_rtx` captures by itself, and again when it has
compiled a better kernel. Not every engine can be captured; it then runs without.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.contract import GraphContract
from cliplet.cuda import Cuda
from cliplet.engine_sidecar import SideCar, place_file
from cliplet.errors import ArtifactError, EnvironmentError_
from cliplet.tensorrt_library import KernelCache, Library

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


class SessionFailure(RuntimeError):
    """An engine refused what it was given."""


@dataclass(frozen=True)
class _Buffer:
    """One tensor's place on the host and on the GPU."""

    dtype: np.dtype[Any]
    host: int
    pinned: np.ndarray
    device: int

    def bytes_of(self, shape: Shape) -> int:
        return int(np.prod(shape)) * self.dtype.itemsize

    def view(self, shape: Shape) -> np.ndarray:
        """The start of the host's memory as an array of this shape."""
        return self.pinned[: self.bytes_of(shape)].view(self.dtype).reshape(shape)


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph of one shape, the context that it belongs to, and the shapes of what it gives."""

    graph: Any
    context: Any
    given: Mapping[str, Shape]


class Session:
    """An engine on the GPU.

    Args:
        names: tensors that `run` returns.
        graphs: shapes whose CUDA graphs are kept; 0 captures none.
        kernels: file for the kernels that `tensorrt_rtx` compiles.

    Raises:
        ArtifactError: the library refuses the plan, or it has other tensors than its side-car says.
        CudaFailure, SessionFailure: it cannot be set up.
    """

    def __init__(
        self,
        library: Library,
        cuda: Cuda,
        plan: Path,
        sidecar: SideCar,
        contract: GraphContract,
        *,
        names: tuple[str, ...],
        graphs: int,
        kernels: Path,
    ) -> None:
        self._library, self._cuda = library, cuda
        self._sidecar, self._contract, self._names = sidecar, contract, names
        self._graphs, self._kernels_file = graphs, kernels
        self._captured: OrderedDict[Shapes, _Captured] = OrderedDict()
        # Shapes that came before, and those that cannot be captured.
        self._seen: set[Shapes] = set()
        self._refused: set[Shapes] = set()
        self._release: list[Callable[[], object]] = []
        self._kernels: KernelCache | None = None
        try:
            self._load(plan)
        except BaseException:
            self.close()
            raise

    def layers(self) -> str:
        """JSON about the engine's layers."""
        return self._library.inspect(self._engine)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, the caller's own, for feeds that lie within the profile.

        Raises:
            CudaFailure, SessionFailure: the GPU or the engine fails.
        """
        for tensor in self._contract.inputs:
            fed = feeds[tensor.name]
            np.copyto(self._buffers[tensor.name].view(fed.shape), fed)
        given = self._work(tuple(feeds[tensor.name].shape for tensor in self._contract.inputs))
        self._cuda.synchronize(self._stream)
        return {name: self._buffers[name].view(given[name]).copy() for name in self._names}

    def keep_kernels(self) -> None:
        """Write what `tensorrt_rtx` compiled, for the next session of this engine."""
        if self._kernels is None:
            return
        compiled = self._kernels.to_bytes()
        try:
            place_file(self._kernels_file, lambda path: path.write_bytes(compiled))
        except EnvironmentError_ as error:
            # Only time is lost.
            log.warning("compiled kernels are not kept: %s", error)

    def close(self) -> None:
        """Give back what was taken, in the opposite order."""
        while self._captured:
            self._drop_oldest()
        while self._release:
            self._release.pop()()
        self._kernels = None

    def _load(self, plan: Path) -> None:
        library, cuda = self._library, self._cuda
        self._engine = library.load_engine(plan)
        self._release.append(lambda: delattr(self, "_engine"))
        known = self._kernels_file.read_bytes() if self._kernels_file.exists() else b""
        self._kernels = library.kernel_cache(self._engine, known)
        size = library.memory_bytes(self._engine)
        self._memory = self._held(cuda.device_memory(size), cuda.free_device_memory), size
        self._stream = self._held(cuda.stream(), cuda.destroy_stream)
        self._context = library.context(self._engine, self._kernels)
        self._release.append(lambda: delattr(self, "_context"))
        self._buffers = {name: self._buffer(name) for name in self._tensor_names(plan)}
        self._prepare(self._context)

    def _tensor_names(self, plan: Path) -> list[str]:
        found = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        wanted = [*(tensor.name for tensor in self._contract.inputs), *self._sidecar.outputs]
        if sorted(found) != sorted(wanted):
            raise ArtifactError(
                f"{plan} has tensors {found}", f"those of its side-car: {wanted}", "export again"
            )
        return found

    def _buffer(self, name: str) -> _Buffer:
        """Room for the largest shape of a tensor, on both sides."""
        dtype = np.dtype(self._library.module.nptype(self._engine.get_tensor_dtype(name)))
        inputs = {tensor.name: tensor for tensor in self._contract.inputs}
        if name in inputs:
            size = int(np.prod(self._sidecar.profile.shapes(inputs[name])[-1])) * dtype.itemsize
        else:
            size = int(self._context.get_max_output_size(name))
        if size < 0:
            raise SessionFailure(f"the size of {name} is not bounded")
        device = self._held(self._cuda.device_memory(size), self._cuda.free_device_memory)
        host, pinned = self._cuda.pinned_memory(size)
        self._held(host, self._cuda.free_pinned_memory)
        return _Buffer(dtype, host, pinned, device)

    def _held(self, resource: Any, free: Callable[[Any], None]) -> Any:
        self._release.append(lambda: free(resource))
        return resource

    def _prepare(self, context: Any) -> None:
        """Give a context its memory and the tensors' addresses."""
        self._library.set_memory(context, *self._memory)
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise SessionFailure(f"the engine refused the address of {name}")

    def _work(self, shapes: Shapes) -> Mapping[str, Shape]:
        """Put the work of one batch into the stream; the shapes of what it gives."""
        captured = self._captured.get(shapes)
        if captured is not None:
            self._captured.move_to_end(shapes)
            self._cuda.launch(captured.graph, self._stream)
            return captured.given
        capture = self._may_capture and shapes in self._seen and shapes not in self._refused
        self._seen.add(shapes)
        if capture:
            return self._capture(shapes)
        given = self._set_shapes(self._context, shapes)
        self._enqueue(self._context, shapes, given)
        return given

    @property
    def _may_capture(self) -> bool:
        return self._graphs > 0 and self._kernels is None

    def _set_shapes(self, context: Any, shapes: Shapes) -> dict[str, Shape]:
        for tensor, shape in zip(self._contract.inputs, shapes, strict=True):
            if not context.set_input_shape(tensor.name, shape):
                raise SessionFailure(f"the engine refused shape {list(shape)} of {tensor.name}")
        return {name: tuple(context.get_tensor_shape(name)) for name in self._sidecar.outputs}

    def _enqueue(self, context: Any, shapes: Shapes, given: Mapping[str, Shape]) -> None:
        """Inputs to the GPU, the engine, outputs back."""
        for tensor, shape in zip(self._contract.inputs, shapes, strict=True):
            buffer = self._buffers[tensor.name]
            self._cuda.copy_to_device(buffer.device, buffer.host, buffer.bytes_of(shape), self._stream)
        if not context.execute_async_v3(int(self._stream)):
            raise SessionFailure("the engine refused the batch; its log says why")
        for name in self._names:
            buffer = self._buffers[name]
            self._cuda.copy_to_host(buffer.host, buffer.device, buffer.bytes_of(given[name]), self._stream)

    def _capture(self, shapes: Shapes) -> Mapping[str, Shape]:
        """Run one batch in a context of its own, then keep a CUDA graph of it if that can be captured."""
        context = self._library.context(self._engine)
        self._prepare(context)
        given = self._set_shapes(context, shapes)
        # The first run after a change of shapes prepares what must not be captured.
        self._enqueue(context, shapes, given)
        self._cuda.synchronize(self._stream)
        graph = None
        if self._library.capturable(context, int(self._stream)):
            with self._library.listening():
                graph = self._cuda.capture(self._stream, lambda: self._enqueue(context, shapes, given))
        if graph is None:
            self._refused.add(shapes)
            log.info("%s cannot be captured as a CUDA graph at %s; it runs without", self._library, shapes)
            return given
        self._captured[shapes] = _Captured(graph, context, given)
        if len(self._captured) > self._graphs:
            self._drop_oldest()
        return given

    def _drop_oldest(self) -> None:
        _, oldest = self._captured.popitem(last=False)
        self._cuda.destroy_graph(oldest.graph)

"""A toy graph for TensorRT, and a GPU with a TensorRT on it that exist in memory only.

The stand-ins hold to the rules that can be broken without a GPU: what is captured is not executed, a graph is bound to
the shapes of its context, an engine runs only with memory and all addresses set.

Legend: B images, H x W canvas pixels.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cliplet.contract import FEATURES, PIXELS, GraphContract, TensorSpec
from cliplet.engine_sidecar import Profile, SideCar, sidecar_path
from cliplet.model_spec import file_sha256

TOY = GraphContract(
    "toy",
    (TensorSpec("image", "uint8", ("B", "H", "W", 3)),),
    (TensorSpec("probs", "float32", ("B", 3)),),
)
LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
PRODUCT = "product"


def toy_graph(target: Path, precision: str = "fp32", operator: str = "Sigmoid") -> Path:
    """Mean colours of images, times a matrix in `precision`, and an operator of one's choice."""
    weights = numpy_helper.from_array(np.diag([1.0, 0.5, 0.25]).astype(np.float32), "weights")
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], [PIXELS], keepdims=0),
    ]
    if precision in LOW:
        low = LOW[precision]
        nodes += [
            helper.make_node("Cast", [PIXELS], ["pixels_low"], to=low),
            helper.make_node("Cast", ["weights"], ["weights_low"], to=low),
            helper.make_node("MatMul", ["pixels_low", "weights_low"], ["features_low"], PRODUCT),
            helper.make_node("Cast", ["features_low"], [FEATURES], to=TensorProto.FLOAT),
        ]
    else:
        nodes.append(helper.make_node("MatMul", [PIXELS, "weights"], [FEATURES], PRODUCT))
    nodes.append(helper.make_node(operator, [FEATURES], ["probs"], "last"))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["B", 3])],
        [weights, numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(target))
    return target


def toy_engine(folder: Path, **changes: Any) -> Path:
    """A plan that only the stand-ins can load, with its side-car; `changes` override what that says."""
    plan = folder / "sm89-10.9.0-fp16.plan"
    plan.write_bytes(b"a plan")
    facts = {
        "library": "tensorrt",
        "version": "10.9.0",
        "target": "sm89",
        "gpu": "Toy GPU",
        "driver": "13.0",
        "cuda": "13.0",
        "graph": "toy",
        "outputs": ("probs", FEATURES),
        "source_sha256": "",
        "plan_sha256": file_sha256(plan),
        "precision": "fp16",
        "precision_read": "fp16",
        "read_from": "builder",
        "products": {"fp16": 1},
        "nodes": (PRODUCT,),
        "layers": 3,
        "profile": Profile(batch=(1, 2, 4), canvas=(8, 8, 16)),
        "build_seconds": 0.1,
    }
    SideCar(**{**facts, **changes}).write(sidecar_path(plan))
    return plan


class ToyCuda:
    """Stands for `cuda.bindings.runtime`; memory of the GPU is memory of the host.

    Attributes:
        calls: names of the calls that matter, in order.
        room: bytes that may be allocated on the GPU.
        broken: calls that fail.
    """

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self, target: tuple[int, int] = (8, 9), gpus: int = 1, room: int = 2**20) -> None:
        self.target, self.gpus, self.room = target, gpus, room
        self.memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.recording: list[Callable[[], object]] | None = None
        self.spoiled = False
        self.calls: list[str] = []
        self.broken: set[str] = set()

    @property
    def left(self) -> int:
        """Everything that was taken and not given back."""
        return len(self.memory) + len(self.streams) + len(self.graphs)

    def put(self, name: str, work: Callable[[], object]) -> None:
        """Work on the stream: done, or only recorded while it is captured."""
        self.calls.append(name if self.recording is None else f"record {name}")
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return (0, self.gpus) if self.gpus else (100, 0)

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaGetDeviceProperties(self, _: int) -> tuple[int, Any]:
        return 0, SimpleNamespace(name=b"Toy GPU", major=self.target[0], minor=self.target[1])

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13020

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def cudaGetErrorString(self, failure: int) -> tuple[int, bytes]:
        return 0, b"out of memory" if failure == 2 else b"unspecified launch failure"

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        self.room -= size
        return (2, None) if self.room < 0 else self._allocated(size)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        return self._allocated(size)

    def _allocated(self, size: int) -> tuple[int, int]:
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, _: int) -> tuple[int]:
        for address in (target, source):
            assert size <= ctypes.sizeof(self.memory[address])
        self.put({1: "to device", 2: "to host"}[kind], lambda: ctypes.memmove(target, source, size))
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        self.streams.add(7)
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams.remove(stream)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream in self.streams and self.recording is None
        self.calls.append("synchronize")
        return (4 if "synchronize" in self.broken else 0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert stream in self.streams and self.recording is None and mode == 1
        self.recording = []
        self.spoiled = False
        return (0,)

    def cudaStreamEndCapture(self, _: int) -> tuple[int, int]:
        recorded, self.recording = self.recording, None
        assert recorded is not None
        if self.spoiled:
            return 900, 0
        self.graphs[len(self.calls) + 1] = recorded
        return 0, len(self.calls) + 1

    def cudaGraphInstantiate(self, graph: int, _: int) -> tuple[int, int]:
        self.graphs[-graph] = self.graphs[graph]
        return 0, -graph

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, _: int) -> tuple[int]:
        self.calls.append("launch")
        for work in self.graphs[graph]:
            work()
        return (0,)


class ToyContext:
    """Stands for an execution context: mean colours of images uint8 [B, H, W, 3], halved."""

    def __init__(self, gpu: ToyTensorRt) -> None:
        self.gpu = gpu
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= 64 and address in self.gpu.cuda.memory
        self.memory = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return name == "image"

    def get_tensor_shape(self, _: str) -> tuple[int, int]:
        return self.shape[0], 3

    def get_max_output_size(self, _: str) -> int:
        return 4 * 3 * 4

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory and set(self.addresses) == {"image", "probs", FEATURES} and stream in (7,)
        if self.gpu.fails == "always" or (
            self.gpu.fails == "capture" and self.gpu.cuda.recording is not None
        ):
            self.gpu.cuda.spoiled = True
            return False
        shape, addresses = self.shape, self.addresses

        def compute() -> None:
            assert self.shape == shape, "a graph was launched after its context had been changed"
            raw = ctypes.string_at(addresses["image"], int(np.prod(shape)))
            means_B3 = np.frombuffer(raw, np.uint8).reshape(shape).mean(axis=(1, 2)).astype(np.float32)
            for name, values in ((FEATURES, means_B3), ("probs", means_B3 / 2)):
                ctypes.memmove(addresses[name], values.tobytes(), values.nbytes)

        self.gpu.cuda.put("execute", compute)
        return True


class ToyTensorRt:
    """Stands for the module `tensorrt`, on the GPU of a `ToyCuda`.

    Attributes:
        fails: when the engine refuses to run: "", "always", or while it is captured ("capture").
        inspected: what the inspector says.
        contexts: those that were made.
        loaded: how often a plan was deserialised.
    """

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    LayerInformationFormat = SimpleNamespace(JSON="json")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, cuda: ToyCuda, version: str = "10.9.0") -> None:
        self.cuda, self.__version__ = cuda, version
        self.fails = ""
        self.inspected = json.dumps({"Layers": [engine_layer("Half")]})
        self.contexts: list[ToyContext] = []
        self.loaded = 0

    @staticmethod
    def nptype(dtype: Any) -> Any:
        return dtype

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Any:
            self.loaded += 1
            return self if plan == b"a plan" else logger.log(1, "[x::y] Error Code 1: it is no plan")

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    # What an engine has.
    num_io_tensors = 3
    device_memory_size_v2 = 64

    def get_tensor_name(self, i: int) -> str:
        return ("image", "probs", FEATURES)[i]

    def get_tensor_dtype(self, name: str) -> Any:
        return np.uint8 if name == "image" else np.float32

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda _: self.inspected)

    def create_execution_context(self, strategy: Any) -> ToyContext:
        assert strategy == "user managed" or strategy.strategy == "user managed"
        self.contexts.append(ToyContext(self))
        return self.contexts[-1]


class ToyRtx(ToyTensorRt):
    """Stands for the module `tensorrt_rtx`; `kernels` is what its engine compiled or was given."""

    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    def __init__(self, cuda: ToyCuda, version: str = "1.7.1") -> None:
        super().__init__(cuda, version)
        self.kernels = b"compiled"
        self.settings: Any = None

    def create_runtime_config(self) -> Any:
        settings = SimpleNamespace(cuda_graph_strategy=None, strategy=None)

        def deserialize(known: bytes) -> bool:
            self.kernels = known
            return True

        cache = SimpleNamespace(deserialize=deserialize, serialize=lambda: self.kernels, reset=lambda: None)
        settings.create_runtime_cache = lambda: cache
        settings.set_runtime_cache = lambda _: None
        settings.set_execution_context_allocation_strategy = lambda chosen: setattr(
            settings, "strategy", chosen
        )
        self.settings = settings
        return settings


def engine_layer(datatype: str, *nodes: str) -> dict[str, Any]:
    """A layer as an inspector lists it, made of `nodes` of the graph: the toy's product unless others are given."""
    tensors = [{"Name": "t", "Datatype": datatype}]
    named = "".join(f"[ONNX Layer: {node}]" for node in nodes or (PRODUCT,))
    return {"Name": "layer", "Inputs": tensors, "Outputs": tensors, "Metadata": named}

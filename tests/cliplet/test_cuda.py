"""Calls of the CUDA runtime: failures have its words, and what is captured is a graph or nothing."""

from __future__ import annotations

import sys

import pytest
from toy_engine import ToyCuda

from cliplet.cuda import Cuda, CudaFailure
from cliplet.errors import EnvironmentError_


def test_the_gpu_that_is_there() -> None:
    gpu = Cuda(ToyCuda(target=(12, 0))).gpu()
    assert gpu is not None
    assert (gpu.name, gpu.target, gpu.driver, gpu.cuda) == ("Toy GPU", "sm120", "13.2", "13.0")
    assert Cuda(ToyCuda(gpus=0)).gpu() is None


def test_a_failure_has_the_words_of_the_runtime() -> None:
    with pytest.raises(CudaFailure, match="out of memory"):
        Cuda(ToyCuda(room=10)).device_memory(100)


def test_pinned_memory_is_seen_as_an_array() -> None:
    runtime = ToyCuda()
    cuda = Cuda(runtime)
    address, array = cuda.pinned_memory(4)
    array[:] = 7
    assert runtime.memory[address].raw == bytes([7] * 4)
    cuda.free_pinned_memory(address)
    assert runtime.left == 0


def test_a_capture_is_a_graph_or_nothing() -> None:
    runtime = ToyCuda()
    cuda = Cuda(runtime)
    stream, done = cuda.stream(), []
    graph = cuda.capture(stream, lambda: runtime.put("work", lambda: done.append(1)))
    assert graph is not None and done == []
    cuda.launch(graph, stream)
    assert done == [1]
    cuda.destroy_graph(graph)

    def half() -> None:
        runtime.put("work", lambda: done.append(2))
        raise CudaFailure("operation not permitted when stream is capturing")

    assert cuda.capture(stream, half) is None
    assert done == [1] and runtime.recording is None and not runtime.graphs


def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EnvironmentError_, match="pip install cuda-bindings"):
        Cuda()


def test_the_real_bindings_have_all_that_is_called() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    called = [name for name in vars(ToyCuda) if name.startswith("cuda")]
    assert len(called) > 20
    assert [name for name in called if not hasattr(runtime, name)] == []
    for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        wanted = vars(getattr(ToyCuda, kind))
        assert [name for name in wanted if not hasattr(getattr(runtime, kind), name)] == []

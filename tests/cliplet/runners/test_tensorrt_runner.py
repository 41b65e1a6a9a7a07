"""The runner on a GPU that exists in memory only: what it refuses, the order of its work, what it keeps and returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_engine import TOY, ToyCuda, ToyRtx, ToyTensorRt, engine_layer, toy_engine, toy_graph

from cliplet.contract import FEATURES, SNIPPETS, GraphContract
from cliplet.cuda import Cuda
from cliplet.engine_sidecar import Profile, sidecar_path
from cliplet.errors import ArtifactError, ClipletError, EnvironmentError_, ForeignEngine, UsageError
from cliplet.runners.tensorrt_runner import TensorRtRunner
from cliplet.tensorrt_library import Library

PLAIN = ["to device", "execute", "to host", "synchronize"]


def images(count: int, side: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)}


def means(feeds: dict[str, np.ndarray]) -> np.ndarray:
    return feeds["image"].mean(axis=(1, 2))


def opened(plan: Path, module: ToyTensorRt, contract: GraphContract = TOY, **options: Any) -> TensorRtRunner:
    name = "tensorrt_rtx" if isinstance(module, ToyRtx) else "tensorrt"
    return TensorRtRunner(plan, contract, library=Library(name, module), cuda=Cuda(module.cuda), **options)


@pytest.fixture
def module() -> ToyTensorRt:
    return ToyTensorRt(ToyCuda())


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"target": "sm90"}, ForeignEngine, "built for sm90; here is Toy GPU, which is sm89"),
        ({"version": "10.8.0"}, ForeignEngine, "built by tensorrt 10.8.0; here is tensorrt 10.9.0"),
        ({"library": "tensorrt_rtx"}, ForeignEngine, "--runtime tensorrt_rtx --out BUNDLE"),
        ({"plan_sha256": "0" * 64}, ArtifactError, "has changed since it was built"),
        ({"graph": "snippets"}, ArtifactError, "is graph 'snippets'"),
        ({"outputs": (FEATURES,)}, UsageError, r"does not give \['probs'\]"),
    ],
)
def test_a_strange_engine_is_refused_before_it_is_touched(
    changes: dict[str, Any], error: type[ClipletError], words: str, module: ToyTensorRt, tmp_path: Path
) -> None:
    plan = toy_engine(tmp_path, **changes)
    with pytest.raises(error, match=words) as caught:
        opened(plan, module)
    assert "cliplet export MODEL --runtime" in caught.value.fix
    assert type(caught.value) is error
    assert module.loaded == 0 and not module.cuda.memory


def test_damage_comes_before_where_an_engine_is_from(module: ToyTensorRt, tmp_path: Path) -> None:
    plan = toy_engine(tmp_path, target="sm90", plan_sha256="0" * 64)
    with pytest.raises(ArtifactError, match="has changed since it was built") as caught:
        opened(plan, module)
    assert not isinstance(caught.value, ForeignEngine)


def test_kernels_that_cannot_be_had_leave_nothing_behind(tmp_path: Path) -> None:
    module = ToyRtx(ToyCuda())
    plan = toy_engine(tmp_path, library="tensorrt_rtx", version="1.7.1")
    with pytest.raises(TypeError), opened(plan, module):
        module.kernels = None  # type: ignore[assignment]
    assert module.cuda.left == 0


def test_what_else_is_refused(module: ToyTensorRt, tmp_path: Path) -> None:
    plan = toy_engine(tmp_path)
    with pytest.raises(UsageError, match="--device cuda"):
        opened(plan, module, device="cpu")
    with pytest.raises(ArtifactError, match="asked for fp32, but .* was built for fp16") as caught:
        opened(plan, module, precision="fp32")
    assert caught.value.fix.endswith("--runtime tensorrt --out BUNDLE --precision fp32")
    with pytest.raises(UsageError, match=r"does not give \['pixels'\]"):
        opened(plan, module, observe=("pixels",))
    with pytest.raises(ArtifactError, match="is graph 'toy'"):
        opened(plan, module, SNIPPETS)
    module.cuda.gpus = 0
    with pytest.raises(EnvironmentError_, match="needs a GPU, and none can be used here"):
        opened(plan, module)
    plan.unlink()
    module.cuda.gpus = 1
    with pytest.raises(ArtifactError, match="is missing"):
        opened(plan, module)
    sidecar_path(plan).unlink()
    with pytest.raises(ArtifactError, match="the side-car that tells what"):
        opened(plan, module)
    assert module.loaded == 0


def test_a_plan_that_the_library_refuses(module: ToyTensorRt, tmp_path: Path) -> None:
    plan = toy_engine(tmp_path)
    module.Runtime = lambda logger: type(  # type: ignore[method-assign]
        "R", (), {"deserialize_cuda_engine": lambda *_: logger.log(1, "Error Code 1: other rules")}
    )()
    with pytest.raises(ArtifactError, match="Error Code 1: other rules"):
        opened(plan, module)
    assert module.cuda.left == 0


def test_outputs_are_right_and_the_callers_own(module: ToyTensorRt, tmp_path: Path) -> None:
    with opened(toy_engine(tmp_path), module, observe=(FEATURES,)) as runner:
        assert (runner.runtime, runner.device, runner.precision) == ("tensorrt 10.9.0", "cuda", "fp16")
        first, second = images(2, seed=1), images(4, 16, seed=2)
        kept = runner.infer(first)
        found = runner.infer(second)
    for feeds, outputs in ((first, kept), (second, found)):
        np.testing.assert_allclose(outputs["probs"], means(feeds) / 2, rtol=1e-6)
        np.testing.assert_allclose(outputs[FEATURES], means(feeds), rtol=1e-6)


@pytest.mark.parametrize(
    "count, side, words",
    [(5, 8, "--batch 1,2,5"), (1, 17, "--canvas 8,8,17"), (1, 4, "--canvas 4,8,16")],
)
def test_feeds_beyond_the_profile(
    count: int, side: int, words: str, module: ToyTensorRt, tmp_path: Path
) -> None:
    with opened(toy_engine(tmp_path), module) as runner:
        with pytest.raises(UsageError, match="for which the engine was built") as caught:
            runner.infer(images(count, side))
        assert words in caught.value.fix
        assert "execute" not in module.cuda.calls


def test_a_shape_is_captured_when_it_comes_again(module: ToyTensorRt, tmp_path: Path) -> None:
    calls = module.cuda.calls
    with opened(toy_engine(tmp_path), module) as runner:
        runner.infer(images(2))
        assert calls == PLAIN and len(module.contexts) == 1
        calls.clear()
        runner.infer(images(2))
        recorded = ["record to device", "record execute", "record to host"]
        assert calls == [*PLAIN, *recorded, "synchronize"] and len(module.contexts) == 2
        for seed in (3, 4):
            # A run at another shape in between must not disturb the graph.
            runner.infer(images(1, 16, seed))
            calls.clear()
            feeds = images(2, seed=seed)
            np.testing.assert_allclose(runner.infer(feeds)["probs"], means(feeds) / 2, rtol=1e-6)
            assert calls == ["launch", "synchronize"]
    assert module.cuda.left == 0


def test_few_graphs_are_kept(module: ToyTensorRt, tmp_path: Path) -> None:
    with opened(toy_engine(tmp_path), module, graphs=2) as runner:
        for count in (1, 1, 2, 2, 1, 3, 3):
            runner.infer(images(count))
        # 2 was used longest ago.
        assert len(module.cuda.graphs) == 2
        for count, wanted in ((1, ["launch"]), (3, ["launch"]), (2, PLAIN[:3])):
            module.cuda.calls.clear()
            runner.infer(images(count))
            assert module.cuda.calls[: len(wanted)] == wanted


@pytest.mark.parametrize("reason", ["fails", "told"])
def test_an_engine_that_cannot_be_captured_runs_without(
    reason: str, module: ToyTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "fails":
        module.fails = "capture"
    else:
        monkeypatch.setattr(Library, "capturable", lambda *_: False)
    with opened(toy_engine(tmp_path), module) as runner:
        for seed in range(4):
            feeds = images(2, seed=seed)
            np.testing.assert_allclose(runner.infer(feeds)["probs"], means(feeds) / 2, rtol=1e-6)
        assert module.cuda.calls.count("execute") == 4 and "launch" not in module.cuda.calls
        assert len(module.contexts) == 2, "it is tried once"
    assert module.cuda.left == 0


def test_no_graphs(module: ToyTensorRt, tmp_path: Path) -> None:
    with opened(toy_engine(tmp_path), module, graphs=0) as runner:
        for _ in range(3):
            runner.infer(images(2))
    assert module.cuda.calls == PLAIN * 3


def test_buffers_are_made_once_and_given_back(module: ToyTensorRt, tmp_path: Path) -> None:
    with opened(toy_engine(tmp_path), module) as runner:
        before = set(module.cuda.memory)
        for count in (1, 4, 2, 4):
            runner.infer(images(count, 16))
        assert set(module.cuda.memory) == before
    assert module.cuda.left == 0


@pytest.mark.parametrize("room", [10, 100, 4 * 16 * 16 * 3 + 100])
def test_too_little_memory_for_the_profile(room: int, tmp_path: Path) -> None:
    module = ToyTensorRt(ToyCuda(room=room))
    with pytest.raises(EnvironmentError_, match="out of memory") as caught:
        opened(toy_engine(tmp_path), module)
    assert "--batch" in caught.value.fix
    assert module.cuda.left == 0


def test_failures_at_work(module: ToyTensorRt, tmp_path: Path) -> None:
    with opened(toy_engine(tmp_path), module) as runner:
        module.fails = "always"
        with pytest.raises(EnvironmentError_, match="refused the batch"):
            runner.infer(images(2))
        module.fails = ""
        module.cuda.broken.add("synchronize")
        with pytest.raises(EnvironmentError_, match="unspecified launch failure"):
            runner.infer(images(2))


def test_precision_is_what_the_engine_shows(module: ToyTensorRt, tmp_path: Path) -> None:
    plan = toy_engine(tmp_path)
    module.inspected = json.dumps({"Layers": []})
    with opened(plan, module) as runner:
        assert runner.precision == "fp16"
    module.inspected = json.dumps({"Layers": [engine_layer("Float")]})
    with pytest.raises(EnvironmentError_, match="computes in fp32, as its inspector shows"):
        opened(plan, module)
    assert module.cuda.left == 0


def test_rtx_captures_by_itself_and_keeps_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "cache"))
    plan = toy_engine(tmp_path, library="tensorrt_rtx", version="1.7.1")
    first = ToyRtx(ToyCuda())
    with opened(plan, first) as runner:
        assert (first.settings.cuda_graph_strategy, first.settings.strategy) == ("whole", "user managed")
        for _ in range(3):
            runner.infer(images(2))
        first.kernels = b"compiled for 2 images"
    assert first.cuda.calls == PLAIN * 3
    second = ToyRtx(ToyCuda())
    with opened(plan, second):
        assert second.kernels == b"compiled for 2 images"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_engine_agrees_with_onnxruntime(precision: str, tmp_path: Path) -> None:
    from cliplet.export.tensorrt_engine import build_engine
    from cliplet.runners.onnx_runner import OnnxRunner
    from cliplet.tensorrt_library import find_library

    gpu = Cuda().gpu()
    if gpu is None:
        pytest.skip("no GPU here")
    try:
        library = find_library()
    except EnvironmentError_ as error:
        pytest.skip(str(error))
    if library.targets and gpu.target not in library.targets:
        pytest.skip(f"{library} does not build for {gpu.target}")
    source = toy_graph(tmp_path / "toy.onnx", precision)
    built = build_engine(
        source,
        tmp_path,
        contract=TOY,
        precision=precision,
        library=library.name,
        profile=Profile(batch=(1, 2, 4), canvas=(8, 8, 16)),
    )
    assert built.runs_here and built.sidecar.read_from in ("engine", "network")
    with (
        OnnxRunner(source, TOY) as reference,
        TensorRtRunner(tmp_path / built.file, TOY, observe=(FEATURES,)) as runner,
    ):
        assert runner.precision == precision
        # Each shape comes often enough to be captured, and again after others.
        for count, side, seed in [(1, 8, 0), (4, 16, 1)] * 4:
            feeds = images(count, side, seed)
            wanted, found = reference.infer(feeds), runner.infer(feeds)
            np.testing.assert_allclose(
                found["probs"], wanted["probs"], atol=1e-3 if precision == "fp16" else 1e-5
            )

"""OpenVINO gives onnxruntime's scores, in the precision that was asked for or not at all, and reports to nobody."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import picture
from onnx import TensorProto, helper
from traced import write_graph

from cliplet.contract import CLASSIFIER, FEATURES, PIXELS, SNIPPETS, TEXT
from cliplet.errors import ArtifactError, DataError, EnvironmentError_
from cliplet.machine import cpu_flags
from cliplet.model_spec import parse_model_spec
from cliplet.runners import openvino_runner
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.runners.openvino_runner import OpenVinoRunner
from cliplet.snippets import Snippets
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation, Views, place_on_canvas
from cliplet.vocabulary import read_vocabulary

HAS_BF16 = bool({"avx512_bf16", "amx_bf16"} & (cpu_flags() or set()))


@pytest.fixture(scope="module")
def module(toy_clip: Path) -> Snippets:
    teacher = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_clip}"))
    return teacher.snippets(read_vocabulary("cat,dog,bird"), Aggregation())


@pytest.fixture(scope="module")
def graph(module: Snippets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graph") / "model.onnx"
    write_graph(module, file)
    return file


def feeds(module: Snippets, images: int, views: str) -> dict[str, np.ndarray]:
    pictures = [picture(90 + 20 * i, 60, i) for i in range(images)]
    return place_on_canvas(pictures, Views.parse(views), module.preprocessing)


@pytest.fixture(scope="module")
def fp32(graph: Path) -> OpenVinoRunner:
    return OpenVinoRunner(graph, SNIPPETS, threads=1, observe=(FEATURES, PIXELS))


@pytest.mark.parametrize(("images", "views"), [(1, "1"), (3, "1+2x2"), (2, "1+3x3")])
def test_the_scores_of_onnxruntime(
    module: Snippets, graph: Path, fp32: OpenVinoRunner, images: int, views: str
) -> None:
    given = feeds(module, images, views)
    assert (fp32.device, fp32.precision) == ("cpu", "fp32")
    assert fp32.runtime.startswith("openvino 20")
    with OnnxRunner(graph, SNIPPETS, threads=1) as runner:
        wanted = runner.infer(given)
    found = fp32.infer(given)
    assert set(found) == {*wanted, FEATURES, PIXELS}
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)


def test_inner_tensors_are_those_of_the_module(module: Snippets, fp32: OpenVinoRunner) -> None:
    given = feeds(module, 2, "1+2x2")
    found = fp32.infer(given)
    with torch.inference_mode():
        pixels = module.pixels(torch.from_numpy(given["image"]), torch.from_numpy(given["boxes"]))
        features_ND = module.encoder(pixels)
    np.testing.assert_allclose(found[PIXELS], pixels.numpy(), atol=1e-3)
    np.testing.assert_allclose(found[FEATURES], features_ND.numpy(), atol=1e-3)


def test_outputs_are_the_callers(module: Snippets, fp32: OpenVinoRunner) -> None:
    given = feeds(module, 2, "1+2x2")
    first = fp32.infer(given)
    kept = {name: values.copy() for name, values in first.items()}
    fp32.infer({**given, "image": 255 - given["image"]})
    for name, values in kept.items():
        np.testing.assert_array_equal(first[name], values)
        assert first[name].flags.owndata


def test_feeds_may_be_views_that_nobody_may_write(module: Snippets, fp32: OpenVinoRunner) -> None:
    given = feeds(module, 2, "1+2x2")
    mirrored = {**given, "image": given["image"][:, :, ::-1]}
    for array in mirrored.values():
        array.setflags(write=False)
    wanted = fp32.infer({**given, "image": mirrored["image"].copy()})
    np.testing.assert_array_equal(fp32.infer(mirrored)["scores"], wanted["scores"])


def test_feeds_that_do_not_fit(module: Snippets, fp32: OpenVinoRunner) -> None:
    with pytest.raises(DataError, match="exactly"):
        fp32.infer({"image": feeds(module, 1, "1")["image"]})


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16")
def test_bf16_is_in_the_encoder_alone(module: Snippets, graph: Path, fp32: OpenVinoRunner) -> None:
    given = feeds(module, 2, "1+2x2")
    exact = fp32.infer(given)
    with OpenVinoRunner(graph, SNIPPETS, "bf16", threads=1, observe=(FEATURES, PIXELS)) as runner:
        assert runner.precision == "bf16"
        found = runner.infer(given)
    np.testing.assert_array_equal(found[PIXELS], exact[PIXELS])
    features_ND = torch.from_numpy(found[FEATURES])
    off = np.abs(found[FEATURES] - exact[FEATURES]).max() / np.abs(exact[FEATURES]).max()
    assert 1e-4 < off < 3e-2
    with torch.inference_mode():
        boxes = torch.from_numpy(given["boxes"])
        view_probs_BVC, _ = module.score(module.unit(features_ND, boxes), module.text)
    np.testing.assert_allclose(found["view_probs"], view_probs_BVC.numpy(), atol=1e-5)


def test_bf16_that_the_cpu_does_not_compute_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a CPU without it, where OpenVINO computes in float32 and says nothing.
    monkeypatch.setitem(openvino_runner._HINTS, "bf16", "f32")
    with pytest.raises(EnvironmentError_, match="AVX-512 BF16") as caught:
        OpenVinoRunner(graph, SNIPPETS, "bf16", threads=1)
    assert "computes fp32" in caught.value.happened


def test_a_precision_that_is_not_offered(graph: Path) -> None:
    with pytest.raises(EnvironmentError_, match="one of fp32, bf16, int8"):
        OpenVinoRunner(graph, SNIPPETS, "fp16")


def test_int8_of_a_graph_that_is_not_quantised_is_refused(graph: Path) -> None:
    with pytest.raises(ArtifactError, match="computes in fp32"):
        OpenVinoRunner(graph, SNIPPETS, "int8", threads=1)


def text_graph(file: Path, operator: str, inner: str) -> Path:
    """A graph of the text tower's contract: `text` is `operator` of `tokens` as floats, which are called `inner`."""
    values = [helper.make_tensor_value_info(n, t, [None, 4]) for n, t in (("tokens", 7), ("text", 1))]
    nodes = [
        helper.make_node("Cast", ["tokens"], [inner], to=TensorProto.FLOAT),
        helper.make_node(operator, [inner], ["text"]),
    ]
    made = helper.make_graph(nodes, "toy", values[:1], values[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]), file)
    return file


def test_a_text_tower_is_run_whole(tmp_path: Path) -> None:
    with OpenVinoRunner(text_graph(tmp_path / "text.onnx", "Sqrt", "x"), TEXT, observe=("x",)) as runner:
        found = runner.infer({"tokens": np.array([[1, 4, 9, 16]])})
    np.testing.assert_allclose(found["text"], [[1, 2, 3, 4]], atol=1e-6)
    np.testing.assert_array_equal(found["x"], [[1, 4, 9, 16]])


@pytest.mark.parametrize("name", ["missing.onnx", "garbage.onnx", "missing.xml", "garbage.xml"])
def test_a_file_that_is_no_graph(tmp_path: Path, name: str) -> None:
    if name.startswith("garbage"):
        (tmp_path / name).write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match=f"cannot read .*{name}"):
        OpenVinoRunner(tmp_path / name, SNIPPETS)


def test_an_operator_that_openvino_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lacks operators .*: Det-18"):
        OpenVinoRunner(text_graph(tmp_path / "model.onnx", "Det", "x"), TEXT)


def test_graphs_of_another_contract(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="those of graph 'classifier'"):
        OpenVinoRunner(graph, CLASSIFIER)
    toy = text_graph(tmp_path / "model.onnx", "Abs", "x")
    with pytest.raises(ArtifactError, match="has no tensor 'nowhere'"):
        OpenVinoRunner(toy, TEXT, observe=("nowhere",))
    model = onnx.load(graph)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == PIXELS else name for name in names]
    onnx.save(model, tmp_path / "unnamed.onnx")
    with pytest.raises(ArtifactError, match=r"no inner tensor \['pixels'\]"):
        OpenVinoRunner(tmp_path / "unnamed.onnx", SNIPPETS)


def test_streams_score_batches_at_the_same_time(module: Snippets, graph: Path, fp32: OpenVinoRunner) -> None:
    batches = [feeds(module, images, "1+2x2") for images in (1, 2, 3, 4)] * 3
    with OpenVinoRunner(graph, SNIPPETS, threads=2, streams=2) as runner, ThreadPoolExecutor(4) as pool:
        assert runner.concurrency == 2
        found = list(pool.map(runner.infer, batches))
    for given, outputs in zip(batches, found, strict=True):
        alone = fp32.infer(given)
        np.testing.assert_allclose(outputs["scores"], alone["scores"], atol=1e-6)


def test_no_more_streams_than_threads(graph: Path) -> None:
    with OpenVinoRunner(graph, SNIPPETS, threads=1, streams=4) as runner:
        assert runner.concurrency == 1


def test_a_failure_of_the_engine_is_explained(module: Snippets, graph: Path) -> None:
    class Exhausted:
        model_inputs = ()

        def infer(self) -> None:
            raise RuntimeError("Exception from src/infer_request.cpp:1:\nno memory left\n\n")

    with OpenVinoRunner(graph, SNIPPETS, threads=1) as runner:
        runner._free.get()
        runner._free.put([Exhausted()])
        for _ in range(2):  # the stream is free again after a failure
            with pytest.raises(EnvironmentError_, match=r"openvino .* failed on .*: no memory left"):
                runner.infer(feeds(module, 1, "1"))


def test_a_signal_finds_its_stack_after_engines_went_in_the_order_they_came(graph: Path) -> None:
    code = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from cliplet.contract import SNIPPETS\n"
        "from cliplet.runners.openvino_runner import OpenVinoRunner\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted'))\n"
        "first, second = (OpenVinoRunner(Path(sys.argv[1]), SNIPPETS, threads=1) for _ in range(2))\n"
        "with first:\n"
        "    pass\n"
        "with second:\n"
        "    pass\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    command = [sys.executable, "-c", code, str(graph)]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "interrupted\n"


def test_threads_may_ask_for_the_library_at_the_same_time() -> None:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: openvino_runner.load_openvino(), range(20_000)))
    finally:
        sys.setswitchinterval(usual)
    assert len(set(map(id, found))) == 1


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentError_, match="pip install"):
        OpenVinoRunner(tmp_path / "model.onnx", SNIPPETS)


def test_importing_the_library_reports_to_nobody(tmp_path: Path) -> None:
    code = (
        "import sys, cliplet.runners.openvino_runner as runner\n"
        "assert 'openvino' not in sys.modules\n"
        "runner.load_openvino()\n"
        "assert not any(name.split('.')[0] == 'openvino_telemetry' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""The exported graph against the module it was traced from, at sizes that it was not traced with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import picture

from cliplet.artifact import MODEL_FILE, Bundle, SnippetsJob, cache_folder
from cliplet.contract import SNIPPETS, TEXT_INITIALIZER
from cliplet.errors import DataError, EnvironmentError_, ParityError
from cliplet.export import onnx_graph
from cliplet.export.onnx_graph import export_snippets
from cliplet.model_spec import parse_model_spec
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.runners.torch_runner import TorchRunner
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation, Views, place_on_canvas
from cliplet.vocabulary import read_vocabulary

CLASSES = "cat,dog,bird"


def job(folder: Path, classes: str = CLASSES, aggregation: Aggregation | None = None) -> SnippetsJob:
    spec = parse_model_spec(f"open_clip:local-dir:{folder}")
    return SnippetsJob(spec, read_vocabulary(classes), aggregation or Aggregation(), {})


@pytest.mark.parametrize(
    "aggregation", [Aggregation("cdul", 0.3), Aggregation("max"), Aggregation("mean")], ids=str
)
@pytest.mark.parametrize("model", ["toy_clip", "toy_siglip"])
def test_the_graph_agrees_with_the_module(
    model: str, aggregation: Aggregation, request: pytest.FixtureRequest
) -> None:
    chosen = job(request.getfixturevalue(model), aggregation=aggregation)
    bundle = export_snippets(chosen)
    module = load_teacher(chosen.spec).snippets(chosen.vocabulary, aggregation)
    with TorchRunner(module, SNIPPETS) as eager, OnnxRunner(bundle.folder / MODEL_FILE, SNIPPETS) as exported:
        for count, views in ((1, "1"), (3, "1+3x3"), (7, "1+2x2"), (32, "1")):
            pictures = [picture(40 + 9 * i, 200 - 5 * i, i) for i in range(count)]
            feeds = place_on_canvas(pictures, Views.parse(views), bundle.manifest.preprocessing)
            wanted, found = eager.infer(feeds), exported.infer(feeds)
            for name, values in wanted.items():
                assert values.std() > 1e-3, "a comparison of constants would prove nothing"
                np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_the_vocabulary_is_exchanged_without_tracing(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_snippets(job(toy_clip))
    monkeypatch.setattr(onnx_graph, "trace", lambda *_: pytest.fail("traced again"))
    bundle = export_snippets(job(toy_clip, "sheep,cow,horse,train,sofa"))
    model = onnx.load(bundle.folder / MODEL_FILE)
    (text,) = [t for t in model.graph.initializer if t.name == TEXT_INITIALIZER]
    assert list(text.dims) == [5, 32]
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["cliplet.classes"]) == ["sheep", "cow", "horse", "train", "sofa"]


def test_names_and_dynamic_axes_are_the_contract(toy_clip: Path) -> None:
    graph = onnx.load(export_snippets(job(toy_clip)).folder / MODEL_FILE).graph
    for tensor, value in zip(
        (*SNIPPETS.inputs, *SNIPPETS.outputs), (*graph.input, *graph.output), strict=True
    ):
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (tensor.name, [3 if axis == "C" else axis for axis in tensor.axes])


def test_a_bundle_comes_from_the_cache(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = export_snippets(job(toy_clip))
    monkeypatch.setattr(onnx_graph, "load_teacher", lambda *_: pytest.fail("loaded again"))
    assert export_snippets(job(toy_clip)) == first


def test_weights_that_do_not_fit_into_one_file(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_INLINE_BYTES", 1000)
    monkeypatch.setenv("CLIPLET_CACHE", str(cache_folder() / "large"))
    bundle = export_snippets(job(toy_clip))
    assert set(bundle.manifest.files) == {MODEL_FILE, f"{MODEL_FILE}.data"}
    assert (bundle.folder / MODEL_FILE).stat().st_size < (bundle.folder / f"{MODEL_FILE}.data").stat().st_size


def test_a_damaged_trace_is_made_again(
    toy_clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path))
    export_snippets(job(toy_clip))
    (trace,) = (tmp_path / "graphs").glob("*/model.onnx")
    trace.write_bytes(trace.read_bytes()[:1000])
    assert export_snippets(job(toy_clip, "sheep,cow")).manifest.vocabulary.names == ("sheep", "cow")
    assert trace.stat().st_size > 1000


def test_what_differs_is_not_kept(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "TOLERANCE_FP32", 0.0)
    wrong = job(toy_clip, "a class,that fails")
    with pytest.raises(ParityError, match="differs from the eager module") as caught:
        export_snippets(wrong)
    assert caught.value.exit_code == 3
    assert not wrong.cached_folder().exists()
    assert not list(wrong.cached_folder().parent.glob(".*"))


def test_a_cache_that_cannot_be_written(
    toy_clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentError_, match="CLIPLET_CACHE"):
        export_snippets(job(toy_clip))


def test_the_runner_refuses_what_does_not_fit(toy_clip: Path) -> None:
    bundle: Bundle = export_snippets(job(toy_clip))
    with OnnxRunner(bundle.folder / MODEL_FILE, SNIPPETS) as runner:
        with pytest.raises(DataError, match="is float32"):
            runner.infer(
                {"image": np.zeros((1, 32, 32, 3), np.float32), "boxes": np.zeros((1, 1, 4), np.float32)}
            )
    assert cache_folder() in bundle.folder.parents

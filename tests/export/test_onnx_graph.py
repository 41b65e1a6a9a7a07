"""Traced graphs: the contract's names and axes, the encoder's borders, and the vocabulary as one initializer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import picture
from traced import write_graph

from cliplet.artifact import BundleJob
from cliplet.contract import FEATURES, PIXELS, SNIPPETS, TEXT_INITIALIZER
from cliplet.errors import DataError
from cliplet.export import onnx_graph
from cliplet.export.onnx_graph import metadata, set_metadata, set_vocabulary, trace
from cliplet.export.originals import Original, load_original
from cliplet.machine import peak_memory_bytes
from cliplet.model_spec import parse_model_spec
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.runners.openvino_runner import OpenVinoRunner
from cliplet.runners.torch_runner import TorchRunner
from cliplet.snippets import Snippets, cut_views
from cliplet.views import Aggregation, Preprocessing, Views, place_on_canvas
from cliplet.vocabulary import read_vocabulary

CLASSES = "cat,dog,bird"


def original(folder: Path, aggregation: Aggregation | None = None, classes: str = CLASSES) -> Original:
    spec = parse_model_spec(f"open_clip:local-dir:{folder}")
    return load_original(BundleJob(spec, read_vocabulary(classes), aggregation or Aggregation(), {}))


@pytest.fixture(scope="module")
def traced(toy_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graph") / "traced.onnx"
    toy = original(toy_clip)
    trace(toy.traced, SNIPPETS, toy.example, file)
    return file


@pytest.mark.parametrize(
    "aggregation", [Aggregation("cdul", 0.3), Aggregation("max"), Aggregation("mean")], ids=str
)
@pytest.mark.parametrize("model", ["toy_clip", "toy_siglip"])
def test_the_graph_agrees_with_the_module(
    model: str, aggregation: Aggregation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    toy = original(request.getfixturevalue(model), aggregation)
    trace(toy.traced, SNIPPETS, toy.example, tmp_path / "traced.onnx")
    assert toy.text_CD is not None
    set_vocabulary(tmp_path / "traced.onnx", tmp_path / "model.onnx", toy.text_CD.numpy())
    with TorchRunner(toy.eager, SNIPPETS) as eager, OnnxRunner(tmp_path / "model.onnx", SNIPPETS) as exported:
        for count, views in ((1, "1"), (3, "1+3x3"), (7, "1+2x2"), (32, "1")):
            pictures = [picture(40 + 9 * i, 200 - 5 * i, i) for i in range(count)]
            feeds = place_on_canvas(pictures, Views.parse(views), toy.preprocessing)
            wanted, found = eager.infer(feeds), exported.infer(feeds)
            for name, values in wanted.items():
                assert values.std() > 1e-3, "a comparison of constants would prove nothing"
                np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_names_and_dynamic_axes_are_the_contract(traced: Path, tmp_path: Path) -> None:
    set_vocabulary(traced, tmp_path / "model.onnx", np.eye(3, 32, dtype=np.float32))
    graph = onnx.load(tmp_path / "model.onnx").graph
    for tensor, value in zip(
        (*SNIPPETS.inputs, *SNIPPETS.outputs), (*graph.input, *graph.output), strict=True
    ):
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (tensor.name, [3 if axis == "C" else axis for axis in tensor.axes])


def test_the_encoder_lies_between_two_named_tensors(traced: Path) -> None:
    nodes = onnx.load(traced).graph.node
    (producer,) = [n for n in nodes if FEATURES in n.output]
    below, reached = {PIXELS}, False
    for node in nodes:
        if below & set(node.input):
            below |= set(node.output)
            reached = reached or node is producer
    assert reached
    assert any(PIXELS in n.output for n in nodes)
    assert {n.op_type for n in nodes if not below & set(n.input)} >= {"Scan"}


def test_the_file_says_nothing_of_the_machine_that_traced_it(traced: Path) -> None:
    data = traced.read_bytes()
    assert b"/snippets.py" not in data
    assert b"stack_trace" not in data


def test_views_are_cut_one_image_after_another(traced: Path) -> None:
    """However many images a batch has, only one image's half-done views are in memory: the loop is in the graph."""
    (scan,) = [n for n in onnx.load(traced).graph.node if n.op_type == "Scan"]
    (body,) = [a.g for a in scan.attribute if a.name == "body"]
    assert [n.op_type for n in body.node].count("MatMul") == 2


def test_a_vocabulary_may_be_exchanged_again_and_again(traced: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "3.onnx", tmp_path / "5.onnx"
    set_vocabulary(traced, first, np.eye(3, 32, dtype=np.float32))
    rows = np.linspace(-1, 1, 5 * 32, dtype=np.float32).reshape(5, 32)
    set_vocabulary(first, second, rows)
    (text,) = [t for t in onnx.load(second).graph.initializer if t.name == TEXT_INITIALIZER]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(text), rows)
    with OnnxRunner(second, SNIPPETS) as runner:
        feeds = {
            "image": np.zeros((1, 32, 32, 3), np.uint8),
            "boxes": np.array([[[0, 0, 32, 32]]], np.float32),
        }
        assert runner.infer(feeds)["scores"].shape == (1, 5)


def test_weights_that_do_not_fit_into_one_file(
    traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_INLINE_BYTES", 1000)
    target = tmp_path / "model.onnx"
    for _ in range(2):
        set_vocabulary(traced, target, np.eye(3, 32, dtype=np.float32))
        set_metadata(target, {"cliplet.note": "weights lie beside"})
    assert target.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size < 2 * traced.stat().st_size
    with OnnxRunner(target, SNIPPETS) as runner:
        assert runner.precision == "fp32"


def test_metadata_is_added_to_what_is_there(traced: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    set_vocabulary(traced, target, np.eye(3, 32, dtype=np.float32))
    set_metadata(target, {"cliplet.a": "1"})
    set_metadata(target, {"cliplet.b": "ä"})
    assert metadata(target).items() >= {"cliplet.a": "1", "cliplet.b": "ä"}.items()


def test_what_onnx_has_no_operator_for_is_named(tmp_path: Path, toy_clip: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(
            self, image: torch.Tensor, boxes: torch.Tensor, text: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            odd = torch.special.bessel_j0(boxes.sum()) + image.sum() + text.sum()
            return odd, odd, odd, odd

    toy = original(toy_clip)
    with pytest.raises(DataError, match="cannot be traced to ONNX.*bessel_j0") as caught:
        trace(Odd(), SNIPPETS, toy.example, tmp_path / "odd.onnx")
    assert "--runtime torch" in caught.value.fix
    assert not (tmp_path / "odd.onnx").exists()


class Shrunk(torch.nn.Module):
    """An encoder whose features are the mean colours of the view's parts: all that this test needs."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 56).flatten(1)


@pytest.fixture(scope="module", params=[("bicubic", 224), ("bilinear", 280)], ids=str)
def resizing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Preprocessing]:
    interpolation, size = request.param
    fed = Preprocessing(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), interpolation, "squash")
    width = 3 * (size // 56) ** 2
    module = Snippets(Shrunk(), torch.eye(3, width), 10.0, None, fed, Aggregation()).eval()
    file = tmp_path_factory.mktemp("resizing") / "model.onnx"
    write_graph(module, file)
    return file, fed


# Prints how much memory one run of 32 images with 30 views each took at most, beside what was there before it.
MEMORY = """
import sys
from pathlib import Path
import numpy as np
from cliplet.contract import SNIPPETS
from cliplet.machine import peak_memory_bytes
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.views import Views

image = np.ones((32, 640, 640, 3), np.uint8)
whole = np.asarray([[0, 0, 640, 640]], np.float32)
cells = Views.parse("1+2x2+3x3+4x4").cells(640, 640)
boxes = np.tile(np.concatenate([whole, cells]), (32, 1, 1))
with OnnxRunner(Path(sys.argv[1]), SNIPPETS) as runner:
    before = peak_memory_bytes()
    runner.infer({"image": image, "boxes": boxes})
    print(peak_memory_bytes() - before)
"""


@pytest.mark.skipif(peak_memory_bytes() is None, reason="the kernel does not say how much memory was used")
def test_a_large_batch_needs_as_much_memory_as_is_said(tmp_path: Path) -> None:
    """What export/README.md states; onnxruntime may round up to twice as much. All images at once would need 5 GB."""
    size = 112
    fed = Preprocessing(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", "squash")
    module = Snippets(Shrunk(), torch.eye(3, 3 * (size // 56) ** 2), 10.0, None, fed, Aggregation()).eval()
    write_graph(module, tmp_path / "model.onnx")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model.onnx")]
    found = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    one_image, pixels = 300e6, 32 * 640 * 640 * 12
    views = 32 * 30 * 3 * size * size * 4
    assert found <= 2 * (one_image + pixels + 2 * views)


@pytest.mark.parametrize("runner", [OnnxRunner, OpenVinoRunner])
def test_engines_resize_as_torch_does_on_canvases_of_any_size(
    resizing: tuple[Path, Preprocessing], runner: type[OnnxRunner] | type[OpenVinoRunner]
) -> None:
    """Canvases smaller than the encoder's input too, where integers are divided that ONNX rounds otherwise."""
    file, fed = resizing
    steps = np.random.default_rng(0)
    with runner(file, SNIPPETS, threads=1, observe=(PIXELS,)) as engine:
        for height, width in [(32, 32), (32, 640), (96, 64), (160, 192), (224, 224), (288, 416), (640, 448)]:
            image = steps.integers(0, 256, (1, height, width, 3), np.uint8)
            boxes = np.asarray([[[0, 0, width, height], [1.5, 2.5, width / 3, height / 2]]], np.float32)
            pixels = engine.infer({"image": image, "boxes": boxes})[PIXELS]
            wanted = cut_views(torch.from_numpy(image), torch.from_numpy(boxes), fed.size, fed.interpolation)
            shown = pixels.reshape(wanted.shape[1:]) * np.reshape(fed.std, (3, 1, 1)) + np.reshape(
                fed.mean, (3, 1, 1)
            )
            np.testing.assert_allclose(
                255 * shown, wanted[0].numpy(), atol=0.05, err_msg=f"{height} x {width}"
            )

"""Trunks and vision towers as feature extractors: exported, compared by neighbours, and refused where labels are asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import picture
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn
from towers import save_toy_tower, save_toy_trunk, trunk_job

from cliplet.artifact import MODEL_FILE, Bundle
from cliplet.cli import main
from cliplet.contract import TRUNK
from cliplet.errors import DataError, ParityError, UsageError
from cliplet.export import bundle as building
from cliplet.export.bundle import BuildOptions, build_bundle, open_gate
from cliplet.export.inspection import inspect, lines
from cliplet.export.originals import load_original
from cliplet.export.parity import equal_neighbours
from cliplet.images import decode_image, read_image
from cliplet.listing import find_images
from cliplet.model_spec import file_sha256, parse_model_spec
from cliplet.plan import TaggerSettings, make_plan
from cliplet.runners import open_runner
from cliplet.tower_files import CLIP_MEAN, CLIP_STD
from cliplet.train.embedder import teacher_embedder
from cliplet.trunk_files import TrunkConfig, new_trunk, save_trunk
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Views, place_on_canvas
from cliplet.vocabulary import NO_CLASSES

KINDS = ("trunk", "clip_vision_model", "mlcd_vision_model")
FEW = BuildOptions(count=6, calibration_count=8)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_trunk(tmp_path_factory.mktemp("trained") / "trunk")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trunk: Path) -> str:
    """What `cliplet export` is told: a trunk of our own, or a tower of transformers'."""
    if request.param == "trunk":
        return str(trunk)
    return f"mlcd:{save_toy_tower(tmp_path_factory.mktemp(request.param), request.param)}"


@pytest.fixture(scope="module")
def bundle(model: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    assert main(["export", model, "--out", str(out), "--runtime", "onnx,openvino", "--count", "6"]) == 0
    return Bundle.load(out)


@pytest.fixture(scope="module")
def trunk_bundle(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    build_bundle(trunk_job(parse_model_spec(str(trunk))), out, FEW)
    return out


def embedded(bundle: Bundle, pictures: list[Any], runtime: str = "onnx") -> np.ndarray:
    """What a program of one's own does with a bundle."""
    fed = bundle.manifest.preprocessing
    sizes = [(p.width, p.height) for p in pictures]
    feeds = place_on_canvas([p.pixels for p in pictures], Views(), fed, full_sizes=sizes)
    feeds = bundle.manifest.contract.of_views(feeds)
    (engine,) = (e for e in bundle.manifest.engines if e.runtime == runtime)
    with open_runner(runtime, bundle.folder / engine.file, bundle.manifest.contract, threads=1) as runner:
        return runner.infer(feeds)["embeddings"]


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_an_engine_embeds_as_the_embedder_does(
    bundle: Bundle, model: str, photos: Path, runtime: str
) -> None:
    embedder = teacher_embedder(model, threads=1)
    pictures = [
        decode_image(read_image(ref), **embedder.room) for ref in find_images([str(photos)]).images[:7]
    ]
    wanted, found = embedder.embed(pictures), embedded(bundle, pictures, runtime)
    assert wanted.std(axis=0).max() > 0.01, "embeddings alike would prove nothing"
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_tower_embeds_as_transformers_does(kind: str, tmp_path: Path) -> None:
    """Through Pillow's resizing and transformers' own model: what the released towers' users have now."""
    import transformers

    folder = save_toy_tower(tmp_path / "tower", kind)
    made = build_bundle(trunk_job(parse_model_spec(f"mlcd:{folder}")), tmp_path / "bundle", FEW)
    named = {"clip_vision_model": "CLIPVisionModel", "mlcd_vision_model": "MLCDVisionModel"}[kind]
    theirs = getattr(transformers, named).from_pretrained(folder, local_files_only=True).eval()
    pixels = [picture(96, 64, seed) for seed in range(4)]
    # The shorter side to 32 pixels, then the middle square.
    squares = [
        Image.fromarray(p).resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32)) for p in pixels
    ]
    fed = (np.stack(squares) / 255 - CLIP_MEAN) / CLIP_STD
    with torch.inference_mode():
        wanted = theirs(torch.from_numpy(fed).permute(0, 3, 1, 2).float()).pooler_output.numpy()
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    pictures = [decode_image(_png(p, tmp_path), fit=640, short=64) for p in pixels]
    cosines = (embedded(made, pictures) * wanted).sum(axis=1)
    assert cosines.min() > 0.9999 and (wanted @ wanted.T).min() < 0.999


def _png(pixels: np.ndarray, folder: Path) -> bytes:
    Image.fromarray(pixels).save(folder / "picture.png")
    return (folder / "picture.png").read_bytes()


def test_the_bundle_knows_what_it_is(bundle: Bundle, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = bundle.manifest
    assert manifest.kind == "trunk" and manifest.vocabulary == NO_CLASSES
    assert json.loads((bundle.folder / "cliplet.json").read_text())["vocabulary"] == {"classes": []}
    assert manifest.identity == parse_model_spec(model).identity()
    assert dict(manifest.trained).get("epochs") == (None if model.startswith("mlcd:") else 2)
    for engine in manifest.engines:
        assert engine.parity["passed"] and engine.parity["about"] == "neighbours"
        assert engine.parity["compared"] > 100 and engine.parity["agreement"] == 1
    assert main(["verify", str(bundle.folder), "--count", "5"]) == 0
    assert "neighbours" in capsys.readouterr().out
    facts = inspect(bundle.folder)
    assert facts["intact"] and facts["graph"] == "trunk" and "classes" not in facts
    assert inspect(bundle.folder / MODEL_FILE)["graph"] == "trunk"


def test_low_precision_is_the_encoders_alone(trunk: Path, tmp_path: Path) -> None:
    engines = (("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("openvino", "int8"))
    options = BuildOptions(count=6, calibration_count=8, keep_all=True)
    made = build_bundle(trunk_job(parse_model_spec(str(trunk)), engines), tmp_path / "made", options)
    found = {engine.name: engine for engine in made.manifest.engines}
    assert [engine.precision_read for engine in found.values()] == ["fp32", "fp16/fp32", "fp32+int8", "int8"]
    assert found["onnx-fp16"].parity["passed"]
    assert found["onnx-int8"].parity["largest"] > found["onnx-fp16"].parity["largest"] > 0
    assert found["onnx-int8"].details["calibration_images"] == 8


class Unnormalised(nn.Module):
    """What has the right features and the right neighbours, and yet not the right embeddings."""

    def __init__(self, right: nn.Module) -> None:
        super().__init__()
        self.right = right

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        embeddings, pixels, features = self.right(image, boxes)
        return 2 * embeddings, pixels, features


def test_a_broken_graph_is_not_kept(trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = building.trace
    monkeypatch.setattr(building, "trace", lambda module, *rest: right(Unnormalised(module), *rest))
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ParityError, match="differs from the eager float32 model: largest difference"):
        build_bundle(trunk_job(parse_model_spec(str(trunk))), tmp_path / "bundle", FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_verify_finds_weights_that_changed(
    trunk_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trunk_bundle, tmp_path / "bundle")
    graph = onnx.load(folder / MODEL_FILE)
    weights = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = numpy_helper.to_array(weights)[::-1].copy()
    weights.CopyFrom(numpy_helper.from_array(changed, weights.name))
    onnx.save(graph, folder / MODEL_FILE)
    manifest = json.loads((folder / "cliplet.json").read_text())
    manifest["files"][MODEL_FILE] = file_sha256(folder / MODEL_FILE)
    (folder / "cliplet.json").write_text(json.dumps(manifest))
    assert main(["verify", str(folder), "--count", "5"]) == 3
    assert "share of equal neighbours" in capsys.readouterr().err


def test_verify_wants_the_weights_it_was_made_from(
    trunk: Path, trunk_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(trunk, tmp_path / "moved")
    assert main(["verify", str(trunk_bundle), "--count", "3", "--quiet", "--model", f"mlcd:{moved}"]) == 0
    other = save_toy_trunk(tmp_path / "other", seed=1)
    assert main(["verify", str(trunk_bundle), "--count", "3", "--model", str(other)]) == 1
    assert "another hash" in capsys.readouterr().err


def test_neighbours_are_counted() -> None:
    wanted = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]])
    # Along a quarter of a circle, unevenly: image 1 moves past image 2, and only what they are compared in changes.
    found = wanted[[0, 2, 1, 3]]
    # Each image has three others, so three comparisons. Of image 0: 1 is nearer than 2 (turns), than 3, 2 than 3; of
    # image 3 the same; of image 1: 2 is nearer than 0, 0 than 3 (turns), 2 than 3; of image 2 the same.
    assert equal_neighbours(wanted, wanted) == 1
    assert equal_neighbours(found, wanted) == 8 / 12
    assert equal_neighbours(np.full((4, 2), np.nan), wanted) == 0


def test_images_that_are_alike_have_no_order() -> None:
    twins = np.array([[1, 0], [0.8, 0.6], [0.8, 0.6], [0, 1]])
    assert equal_neighbours(twins + np.array([[0, 0], [1e-7, 0], [0, 1e-7], [0, 0]]), twins) == 1
    assert equal_neighbours(twins[[1, 2] * 2], twins[[1, 2] * 2]) == 0


def test_a_trunk_that_tells_nothing_apart_is_refused(tmp_path: Path) -> None:
    trunk = new_trunk("test_resnet", 64)
    for parameter in trunk.parameters():
        nn.init.zeros_(parameter)
    fed = Preprocessing(64, IMAGENET_MEAN, IMAGENET_STD)
    save_trunk(tmp_path, trunk, TrunkConfig(trunk="test_resnet", preprocessing=fed, width=96))
    job = trunk_job(parse_model_spec(str(tmp_path)))
    with pytest.raises(DataError, match="gives every image the same embedding"):
        open_gate(load_original(job), job, FEW)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--count", "2"], 1, "2 images to compare the neighbours of"),
        (["--classes", "cat,dog"], 2, "--classes for"),
        (["--zeta", "0.5", "--aggregate", "max"], 2, "--aggregate and --zeta for"),
        (["--text"], 2, "a trunk has no text tower"),
    ],
)
def test_export_refuses_what_a_trunk_has_not(
    trunk: Path, tmp_path: Path, options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trunk), "--out", str(tmp_path / "out"), "--runtime", "onnx", *options]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder .*nowhere"):
        parse_model_spec(f"mlcd:{tmp_path}/nowhere")


def test_labels_are_refused(trunk: Path, trunk_bundle: Path) -> None:
    for model in (str(trunk), f"mlcd:{trunk}", str(trunk_bundle)):
        with pytest.raises(UsageError, match="gives features of images, not labels") as e:
            make_plan(TaggerSettings(model=model))
        assert f"cliplet train folder_ccd --trunk mlcd:{trunk} " in e.value.fix


@pytest.mark.parametrize(
    "asked", [{"classes": "cat,dog"}, {"threshold": 0.5}, {"zeta": 0.5}, {"views": "1+3x3"}]
)
def test_what_only_labels_have_is_refused_where_features_will_do(
    asked: dict[str, Any], trunk_bundle: Path
) -> None:
    assert make_plan(TaggerSettings(model=str(trunk_bundle)), features=True).contract is TRUNK
    with pytest.raises(UsageError, match=f"--{next(iter(asked))}"):
        make_plan(TaggerSettings(model=str(trunk_bundle), **asked), features=True)


@pytest.mark.parametrize("verb", ["label", "eval"])
def test_verbs_refuse_it(
    verb: str,
    trunk: Path,
    trunk_bundle: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model in (trunk, trunk_bundle):
        words = {
            "label": ["label", str(photos), "--model", str(model), "--out", str(tmp_path / "out")],
            "eval": ["eval", str(model), "--data", "folder", "--root", str(photos)],
        }
        assert main(words[verb]) == 2
        assert "gives features of images, not labels" in capsys.readouterr().err


def test_its_classes_cannot_be_exchanged(
    trunk_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trunk_bundle), "--classes", "a,b", "--out", str(tmp_path / "new")]) == 2
    assert "a trunk has none" in capsys.readouterr().err


def test_the_folder_of_a_trunk_is_inspected(trunk: Path, tmp_path: Path) -> None:
    facts = inspect(trunk)
    assert (facts["kind"], facts["intact"], facts["trunk"], facts["width"]) == (
        "trunk",
        True,
        "test_resnet",
        96,
    )
    assert facts["epochs"] == 2 and facts["parameters"]["count"] > 100_000
    assert "preprocessing.size 64" in lines(facts)
    damaged = shutil.copytree(trunk, tmp_path / "damaged")
    (file,) = damaged.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not inspect(damaged / "trunk.json")["intact"]

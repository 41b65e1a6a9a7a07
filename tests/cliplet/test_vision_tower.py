"""Vision towers against transformers' own models, from folders as users have them, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from towers import save_toy_tower

from cliplet.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from cliplet.contract import CLASSIFIER, FEATURES, PIXELS
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.export.graphs import ClassifierGraph, Eager
from cliplet.export.onnx_graph import trace
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.runners.torch_runner import TorchRunner
from cliplet.tower_files import CLIP_MEAN, CLIP_STD, read_tower_config, read_tower_normalisation
from cliplet.views import Preprocessing
from cliplet.vision_tower import VisionTower, load_vision_tower
from cliplet.vocabulary import ClassName, Vocabulary

KINDS = ("clip_vision_model", "mlcd_vision_model")
VOCABULARY = Vocabulary((ClassName("cat"), ClassName("dog"), ClassName("bird")))


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_tower(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_tower(tmp_path_factory.mktemp("clip"), "clip_vision_model")


@pytest.fixture
def copied(clip_folder: Path, tmp_path: Path) -> Path:
    """A folder of its own that a test may change."""
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def theirs(folder: Path) -> torch.nn.Module:
    """The model as transformers loads it."""
    import transformers

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    model = {
        "clip_vision_model": transformers.CLIPVisionModel,
        "mlcd_vision_model": transformers.MLCDVisionModel,
    }
    return model[kind].from_pretrained(folder, attn_implementation="eager", local_files_only=True).eval()


def pixels(side: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_a_tower_gives_what_transformers_gives(folder: Path) -> None:
    tower, model = load_vision_tower(folder), theirs(folder)
    features, embedding = tower(pixels(32))
    wanted = model(pixels(32))
    torch.testing.assert_close(embedding, wanted.pooler_output, rtol=1e-4, atol=1e-5)
    assert features.shape == (2, 32, 4, 4) and embedding.std() > 0.1
    # The patch in row 1, column 3 is token 1 + 4 + 3.
    token = model.post_layernorm(wanted.last_hidden_state[:, 8])
    torch.testing.assert_close(features[:, :, 1, 3], token, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_positions_follow_the_side(folder: Path) -> None:
    """Built for another side or fed another: the same, and what transformers does with such images."""
    model = theirs(folder)
    learned = {"interpolate_pos_encoding": True} if hasattr(model.embeddings, "position_embedding") else {}
    wanted = model(pixels(48), **learned).pooler_output
    for tower in (load_vision_tower(folder), load_vision_tower(folder, 48)):
        features, embedding = tower(pixels(48))
        assert features.shape == (2, 32, 6, 6)
        torch.testing.assert_close(embedding, wanted, rtol=1e-4, atol=1e-5)


def test_a_side_that_patches_do_not_tile_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="patches of 8") as e:
        load_vision_tower(folder, 30)
    assert "multiple of 8, such as 32" in e.value.expected
    with pytest.raises(UsageError, match="4 pixels"):
        load_vision_tower(folder)(torch.zeros(1, 3, 4, 4))


def test_every_weight_learns(folder: Path) -> None:
    tower = VisionTower(read_tower_config(folder)).train()
    features, embedding = tower(pixels(32))
    (features.square().mean() + embedding.square().mean()).backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def as_before_transformers_5(folder: Path) -> None:
    weights = {f"vision_model.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)
    save_file(weights, folder / "model.safetensors")


def as_a_whole_clip(folder: Path) -> None:
    as_before_transformers_5(folder)
    weights = load_file(folder / "model.safetensors")
    weights["text_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(2, 2)
    save_file({**weights, "logit_scale": torch.tensor(4.6)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": config}
    (folder / "config.json").write_text(json.dumps(whole))


def as_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def without_model_type(folder: Path) -> None:
    changed(folder, model_type=None)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", [as_before_transformers_5, as_a_whole_clip, as_shards, without_model_type])
def test_other_layouts_hold_the_same_tower(copied: Path, layout: Callable[[Path], None]) -> None:
    with torch.inference_mode():
        wanted, _ = load_vision_tower(copied)(pixels(32))
        layout(copied)
        assert load_vision_tower(copied)(pixels(32))[0].equal(wanted)


def test_half_precision_weights_become_float32(copied: Path) -> None:
    weights = {k: v.half() for k, v in load_file(copied / "model.safetensors").items()}
    save_file(weights, copied / "model.safetensors")
    assert {p.dtype for p in load_vision_tower(copied).parameters()} == {torch.float32}


def changed(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("harmed",))


def a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def a_missing_shard(folder: Path) -> None:
    as_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda f: (f / "config.json").unlink(), DataError, "cannot read .*config.json"),
        (lambda f: (f / "config.json").write_text("{"), DataError, "cannot read .*config.json"),
        (lambda f: (f / "config.json").write_text("[]"), DataError, "holds a list"),
        (lambda f: (f / "model.safetensors").unlink(), DataError, "holds no weights"),
        (a_pickle, DataError, "as a pickle, pytorch_model.bin"),
        (cut_off, DataError, "cannot read .*model.safetensors"),
        (a_missing_shard, DataError, "cannot read .*model-00002"),
        (lambda f: changed(f, model_type="bert"), UsageError, "'bert'"),
        (lambda f: changed(f, vision_config=3), DataError, "vision_config 3"),
        (lambda f: changed(f, num_hidden_layers=1), DataError, "encoder.layers.1.* besides.* and 13 more"),
        (lambda f: changed(f, num_hidden_layers=3), DataError, "no encoder.layers.2"),
        (lambda f: changed(f, hidden_size=64), DataError, r"\[32\] instead of \[64\]"),
        (lambda f: changed(f, hidden_size=33), DataError, "hidden size .33."),
        (
            lambda f: changed(f, model_type="mlcd", num_attention_heads=16),
            DataError,
            "num_attention_heads 16",
        ),
        (lambda f: changed(f, hidden_size="wide"), DataError, "hidden_size"),
        (lambda f: changed(f, hidden_act="gelu9"), DataError, "gelu9"),
        (lambda f: changed(f, patch_size=[8, 4]), DataError, "patch_size"),
        (lambda f: changed(f, num_channels=1), DataError, "num_channels 1"),
        (lambda f: changed(f, model_type="mlcd_vision_model"), DataError, "class_pos_emb"),
    ],
)
def test_a_folder_that_holds_no_such_tower_is_refused(
    copied: Path,
    damage: Callable[[Path], object],
    error: type[ClipletError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(copied)
    damage(copied)
    with pytest.raises(error, match=said) as e:
        load_vision_tower(copied)
    assert e.value.expected and not (copied / "harmed").exists()


def test_a_folder_that_is_not_there_is_not_asked_of_a_hub() -> None:
    with pytest.raises(UsageError, match="no folder openai/clip-vit-base-patch32") as e:
        read_tower_config(Path("openai/clip-vit-base-patch32"))
    assert "nothing is downloaded" in e.value.expected


def test_normalisation_is_the_image_processors(copied: Path) -> None:
    (copied / "preprocessor_config.json").unlink(missing_ok=True)
    assert read_tower_normalisation(copied) == (CLIP_MEAN, CLIP_STD)
    file = copied / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.5, 0.25, 0], "image_std": [1, 0.5, 0.25], "size": 32}))
    assert read_tower_normalisation(copied) == ((0.5, 0.25, 0), (1, 0.5, 0.25))
    for broken in (
        {},
        {"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0]},
        {"image_mean": 1, "image_std": 1},
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(DataError, match="image_mean"):
            read_tower_normalisation(copied)


def classifier_of(folder: Path, size: int) -> Classifier:
    torch.manual_seed(0)
    fed = Preprocessing(size, CLIP_MEAN, CLIP_STD, "bilinear", "squash")
    classifier = Classifier(
        ClassifierConfig(trunk=f"mlcd:{folder}", boost=3.0, preprocessing=fed), VOCABULARY
    )
    # Random towers look at everything alike; a larger head tells the cells apart.
    torch.nn.init.normal_(classifier.head.weight, std=0.5)
    return classifier.eval()


def feeds(images: int) -> dict[str, np.ndarray]:
    image = np.random.default_rng(images).integers(0, 256, (images, 40, 56, 3), np.uint8)
    boxes = np.stack([np.array([0, 0, 56 - 2 * i, 40 - 3 * i], np.float32) for i in range(images)])
    return {"image": image, "boxes": boxes}


def test_a_classifier_with_this_trunk_exports(folder: Path, tmp_path: Path) -> None:
    import onnx

    save_classifier(tmp_path / "classifier", classifier_of(folder, 48))
    graph = ClassifierGraph(load_classifier(tmp_path / "classifier")).eval()
    trace(graph, CLASSIFIER, {k: torch.from_numpy(v) for k, v in feeds(2).items()}, tmp_path / "model.onnx")
    names = {n for node in onnx.load(tmp_path / "model.onnx").graph.node for n in (*node.input, *node.output)}
    assert {PIXELS, FEATURES} <= names
    with (
        TorchRunner(Eager(graph).eval(), CLASSIFIER) as eager,
        OnnxRunner(tmp_path / "model.onnx", CLASSIFIER) as exported,
    ):
        for images in (1, 3, 7):
            wanted, found = eager.infer(feeds(images)), exported.infer(feeds(images))
            assert wanted["cam"].shape == (images, 3, 6, 6) and wanted["cam"].std() > 0.1
            for name, values in wanted.items():
                np.testing.assert_allclose(found[name], values, atol=1e-4)

"""Embedders against the libraries that the models come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import picture
from PIL import Image
from towers import save_toy_tower

from cliplet.classifier import Classifier, ClassifierConfig, save_classifier
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.images import Picture, decode_image, find_images, read_image
from cliplet.train.embedder import TorchEmbedder, load_encoder, teacher_embedder
from cliplet.train.embeddings import EmbedOptions, embed_images
from cliplet.trunk_files import TrunkConfig, new_trunk, save_trunk
from cliplet.views import Preprocessing
from cliplet.vocabulary import ClassName, Vocabulary

FED = Preprocessing(64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bilinear", "squash")
SIZES = ((90, 70), (64, 64), (50, 130))
PIXELS = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
PICTURES = [Picture(p, p.shape[1], p.shape[0]) for p in PIXELS]


def unit(rows: torch.Tensor) -> np.ndarray:
    array = rows.detach().numpy().astype(np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def squashed(pixels: np.ndarray, fed: Preprocessing) -> torch.Tensor:
    """The squash of a picture by Pillow, normalised; float [1, 3, S, S]."""
    image = np.asarray(Image.fromarray(pixels).resize((fed.size, fed.size), Image.Resampling.BILINEAR))
    scaled = (image / 255 - np.array(fed.mean)) / np.array(fed.std)
    return torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("toy", ["toy_clip", "toy_siglip"])
def test_a_clip_embeds_as_open_clip_does(toy: str, request: pytest.FixtureRequest) -> None:
    name = f"local-dir:{request.getfixturevalue(toy)}"
    clip, _, transform = open_clip.create_model_and_transforms(name)
    embedder = teacher_embedder(f"open_clip:{name}", threads=1)
    found = embedder.embed(PICTURES)
    assert found.dtype == np.float32 and found.shape == (3, embedder.width) == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    with torch.inference_mode():
        images = torch.stack([transform(Image.fromarray(p)) for p in PIXELS])
        wanted = unit(clip.eval().encode_image(images))
    assert ((found * wanted).sum(axis=1) > 0.999).all()
    assert ((found * wanted[::-1]).sum(axis=1)[[0, 2]] < 0.999).all(), "images differ, or nothing was tested"


def test_tiny_embeds_a_folder(photos: Path, tmp_path: Path) -> None:
    embedder = teacher_embedder("tiny", threads=1)
    images = find_images([str(photos)]).images
    found = embed_images(images, tmp_path, embedder, EmbedOptions(batch=8, quiet=True))
    assert found.done_N.all() and found.features_ND.dtype == np.float16
    pictures = [decode_image(read_image(ref), **embedder.room) for ref in images]
    np.testing.assert_allclose(found.features_ND, embedder.embed(pictures), atol=2e-3)
    again = embed_images(images, tmp_path, teacher_embedder("tiny", threads=1), EmbedOptions(quiet=True))
    assert again.embedded == 0
    with pytest.raises(UsageError, match=r"tiny then, differs in precision"):
        embed_images(images, tmp_path, teacher_embedder("tiny", precision="bf16"), EmbedOptions(quiet=True))


def test_the_identity_goes_with_the_weights_and_not_with_the_name(toy_clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in toy_clip.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    one, other = (
        teacher_embedder(f"open_clip:local-dir:{place}", threads=1).identity for place in (toy_clip, copy)
    )
    assert one.pop("model") != other.pop("model")
    assert json.loads(json.dumps(one)) == json.loads(json.dumps(other))
    encoder = load_encoder("tiny")
    before = TorchEmbedder(encoder, threads=1).identity
    with torch.no_grad():
        next(encoder.module.parameters()).view(-1)[0] += 1e-6
    assert TorchEmbedder(encoder, threads=1).identity != before


@pytest.mark.parametrize("kind", ["clip_vision_model", "mlcd_vision_model"])
def test_a_vision_tower_embeds_by_its_class_token(tmp_path: Path, kind: str) -> None:
    import transformers

    save_toy_tower(tmp_path, kind)
    of_model = {"clip_vision_model": "CLIPVisionModel", "mlcd_vision_model": "MLCDVisionModel"}[kind]
    tower = getattr(transformers, of_model).from_pretrained(tmp_path).eval()
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    fed = processor([Image.fromarray(p) for p in PIXELS], return_tensors="pt")
    with torch.inference_mode():
        wanted = unit(tower(**fed).pooler_output)
    found = teacher_embedder(f"mlcd:{tmp_path}", threads=1).embed(PICTURES)
    assert ((found * wanted).sum(axis=1) > 0.999).all()


@pytest.mark.parametrize("prefix", ["", "mlcd:"])
def test_a_trunk_of_ones_own_embeds(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    trunk = new_trunk("test_resnet", 64).eval()
    width = trunk(torch.zeros(1, 3, 64, 64)).shape[1]
    save_trunk(tmp_path, trunk, TrunkConfig(trunk="test_resnet", preprocessing=FED, width=width))
    embedder = teacher_embedder(f"{prefix}{tmp_path}", threads=1)
    assert embedder.width == width and embedder.identity["preprocessing"] == FED.to_json()
    for pixels, row in zip(PIXELS, embedder.embed(PICTURES), strict=True):
        assert float((unit(trunk(squashed(pixels, FED)))[0] * row).sum()) > 0.999


@pytest.mark.parametrize("with_tower", [False, True])
def test_a_classifier_embeds_by_its_trunk(tmp_path: Path, with_tower: bool) -> None:
    trunk = f"mlcd:{save_toy_tower(tmp_path / 'tower')}" if with_tower else "test_resnet"
    torch.manual_seed(0)
    config = ClassifierConfig(trunk=trunk, boost=3.0, preprocessing=FED)
    classifier = Classifier(config, Vocabulary((ClassName("cat"), ClassName("dog")))).eval()
    save_classifier(tmp_path / "classifier", classifier)
    found = teacher_embedder(str(tmp_path / "classifier"), threads=1).embed(PICTURES)
    for pixels, row in zip(PIXELS, found, strict=True):
        features = classifier.trunk(squashed(pixels, FED))
        wanted = unit(features[1] if with_tower else features)
        assert float((wanted[0] * row).sum()) > 0.999


def test_bf16_is_close_to_float32() -> None:
    exact, lowered = (
        teacher_embedder("tiny", threads=1, precision=p).embed(PICTURES) for p in ("fp32", "bf16")
    )
    cosine = (exact * lowered).sum(axis=1)
    assert (cosine > 0.99).all() and (exact != lowered).any()


def test_what_cannot_embed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        teacher_embedder("nothing")
    with pytest.raises(UsageError, match="whose engine is not used here"):
        teacher_embedder("triton://127.0.0.1:1/tiny")
    with pytest.raises(UsageError, match="precision 'int8'"):
        teacher_embedder("tiny", precision="int8")
    with pytest.raises(UsageError, match="no folder"):
        teacher_embedder(f"mlcd:{tmp_path / 'away'}")
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentError_):
            teacher_embedder("tiny", device="cuda")


def test_a_batch_that_torch_refuses_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = teacher_embedder("tiny", threads=1)

    def fail(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 99 GB")

    monkeypatch.setattr("cliplet.train.embedder.cut_views", fail)
    with pytest.raises(EnvironmentError_, match="not enough memory"):
        embedder.embed(PICTURES)

"""Teachers: how they are named, loaded, refused, and what their text matrix is."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import open_clip
import pytest
import torch

from cliplet.errors import ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.model_spec import parse_model_spec
from cliplet.teacher import Teacher, load_teacher
from cliplet.views import Aggregation
from cliplet.vocabulary import prompt_set, read_vocabulary


def teacher(folder: Path) -> Teacher:
    return load_teacher(parse_model_spec(f"open_clip:local-dir:{folder}"))


def test_the_text_matrix_is_the_mean_of_unit_sentences(toy_clip: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("person: man\ncat\n")
    vocabulary = read_vocabulary(str(classes), prompt_set("a photo of a {}|the {}"))
    rows = teacher(toy_clip).text_matrix(vocabulary)
    clip = open_clip.create_model(f"local-dir:{toy_clip}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{toy_clip}")(
        ["a photo of a person", "the person", "a photo of a man", "the man"]
    )
    with torch.no_grad():
        expected = clip.encode_text(tokens, normalize=True).mean(0)
    assert torch.allclose(rows[0], expected / expected.norm(), atol=1e-6)
    assert rows.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_many_classes_are_encoded_together(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_clip}"))
    names = [f"thing {n}" for n in range(20)]
    together = teacher.text_matrix(read_vocabulary(",".join(names), prompts=prompt_set("ensemble7")))
    # 140 sentences in parts of nine, which end in the middle of a class.
    monkeypatch.setattr("cliplet.teacher.SENTENCES", 9)
    calls = []
    encode = teacher.clip.encode_text
    monkeypatch.setattr(
        teacher.clip, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens)
    )
    apart = teacher.text_matrix(read_vocabulary(",".join(names), prompts=prompt_set("ensemble7")))
    assert calls == [9] * 15 + [5]
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=0)


def test_the_scale_multiplies(toy_clip: Path) -> None:
    """CLIP's learned number is a logarithm: the scale is its exponential, near 14 when untrained, not 2.66."""
    assert teacher(toy_clip).scale == pytest.approx(1 / 0.07, rel=1e-4)
    assert teacher(toy_clip).bias is None


def test_siglip_scores_are_sigmoids(toy_siglip: Path) -> None:
    chosen = teacher(toy_siglip)
    assert chosen.bias == pytest.approx(-2.0)
    module = chosen.snippets(read_vocabulary("cat,dog,bird"), Aggregation())
    image = torch.full((1, 64, 64, 3), 120, dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0, 64, 64]]])
    with torch.inference_mode():
        view_probs, _ = module(image, boxes)
        cosines = module.features(image, boxes)[0, 0] @ module.text.T
    expected = [1 / (1 + math.exp(-(chosen.scale * c - 2.0))) for c in cosines.tolist()]
    assert view_probs[0, 0].tolist() == pytest.approx(expected, rel=1e-4)


def test_a_class_that_does_not_fit_the_text_context_is_named(toy_clip: Path) -> None:
    with pytest.raises(DataError, match="longer than the text context") as caught:
        teacher(toy_clip).text_matrix(read_vocabulary("cat," + "very " * 30 + "long dog"))
    assert "long dog" in str(caught.value)
    assert "at most 16 tokens" in str(caught.value)


def test_a_checkpoint_on_this_machine(tmp_path: Path) -> None:
    clip = open_clip.create_model("ViT-S-32-alt")
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    spec = parse_model_spec(f"open_clip:ViT-S-32-alt/{tmp_path}/weights.pt")
    assert spec.weights_file == tmp_path / "weights.pt"
    loaded = load_teacher(spec)
    assert torch.equal(loaded.clip.visual.conv1.weight, clip.visual.conv1.weight)
    assert loaded.preprocessing.size == 224
    with pytest.raises(DataError, match=r"cannot load .*weights.pt into RN50"):
        load_teacher(parse_model_spec(f"open_clip:RN50/{tmp_path}/weights.pt"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nothing", UsageError, "--model tiny"),
        ("open_clip:", UsageError, "names no weights"),
        ("open_clip:ViT-B-32", UsageError, "names no weights"),
        ("open_clip:ViT-B-23/openai", UsageError, "open_clip:ViT-B-32/"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79", UsageError, "laion2b_s34b_b79k"),
        ("open_clip:local-dir:/no/such/folder", DataError, "open_clip_config.json"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", EnvironmentError_, "cannot get the weights"),
        ("open_clip:ViT-B-32/openai", UsageError, "open_clip:ViT-B-32-quickgelu/openai"),
    ],
)
def test_a_model_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, text: str, error: type[ClipletError], message: str
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    if text.endswith("openai"):
        monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "weights")
    with pytest.raises(error) as caught:
        load_teacher(parse_model_spec(text))
    assert message in str(caught.value)


def test_a_folder_without_weights_or_manifest(toy_clip: Path, tmp_path: Path) -> None:
    shutil.copy(toy_clip / "open_clip_config.json", tmp_path)
    with pytest.raises(DataError, match="holds no weights"):
        parse_model_spec(f"open_clip:local-dir:{tmp_path}")
    with pytest.raises(DataError, match="is neither a bundle nor a classifier"):
        parse_model_spec(str(tmp_path))


def test_an_identity_changes_with_the_weights(toy_clip: Path, toy_siglip: Path, tmp_path: Path) -> None:
    identity = parse_model_spec(f"open_clip:local-dir:{toy_clip}").identity()
    copy = shutil.copytree(toy_clip, tmp_path / "elsewhere")
    assert parse_model_spec(f"open_clip:local-dir:{copy}").identity() == identity
    assert parse_model_spec(f"open_clip:local-dir:{toy_siglip}").identity() != identity

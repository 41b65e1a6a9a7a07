"""Trunks on disk: what is read is what was written, or why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cliplet.errors import ArtifactError, ClipletError, UsageError
from cliplet.trunk_files import (
    TrunkConfig,
    is_timm_model,
    is_trunk_folder,
    load_trunk,
    new_timm_trunk,
    new_trunk,
    save_trunk,
    trunk_config,
    trunk_details,
    trunk_width,
)
from cliplet.views import Preprocessing

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def saved(folder: Path, name: str, size: int) -> tuple[nn.Module, TrunkConfig]:
    """A trunk with random weights, written to the folder."""
    torch.manual_seed(1)
    trunk = new_trunk(name, size).eval()
    fed = Preprocessing(size, MEAN, STD, "bilinear", "squash")
    config = TrunkConfig(trunk=name, preprocessing=fed, width=trunk_width(trunk, size))
    save_trunk(folder, trunk, config, {"images": 7})
    return trunk, config


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [("test_resnet", 40, 96), ("test_vit", 48, 64), ("open_clip:ViT-S-32-alt", 64, 256)],
    ids=["convolutional", "transformer", "open_clip"],
)
def test_a_trunk_comes_back_as_it_was(name: str, size: int, width: int, tmp_path: Path) -> None:
    trunk, config = saved(tmp_path, name, size)
    torch.manual_seed(2)
    found, found_config = load_trunk(tmp_path)
    assert found_config == config == trunk_config(tmp_path) and config.width == width
    assert not found.training and trunk_details(tmp_path)["images"] == 7
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert found(pixels).shape == (2, width)
        assert found(pixels).equal(trunk(pixels))


def test_only_a_folder_with_a_trunk_is_one(tmp_path: Path) -> None:
    assert not is_trunk_folder(tmp_path)
    saved(tmp_path / "trunk", "test_resnet", 32)
    assert is_trunk_folder(tmp_path / "trunk") and not is_trunk_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("resnet_of_none", 32, "no trunk 'resnet_of_none'"),
        ("resnet18.of_nobody", 32, "no trunk 'resnet18.of_nobody'"),
        ("open_clip:ViT-of-none", 32, "no trunk 'open_clip:ViT-of-none'"),
        ("RN50", 32, "no trunk 'RN50'"),
    ],
)
def test_there_is_no_such_trunk(name: str, size: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as e:
        new_trunk(name, size)
    assert "list_models" in e.value.fix


def test_timm_models_are_known_by_name_and_tag() -> None:
    assert is_timm_model("resnet18") and is_timm_model("resnet18.tv_in1k")
    assert not is_timm_model("resnet18.mine") and not is_timm_model("resnet")
    # A transformer is built for its side, a convolution is not.
    assert new_timm_trunk("test_vit", 64).pos_embed.shape[1] == 17


class Unpooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 16)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels)


@pytest.mark.parametrize(("size", "said"), [(8, "takes no images of 8 pixels"), (32, "something else than")])
def test_what_gives_no_features_is_refused(size: int, said: str) -> None:
    trunk = Unpooled()
    with pytest.raises(UsageError, match=said):
        trunk_width(trunk, size)
    assert trunk.training


def other_model(folder: Path) -> None:
    file = folder / "trunk.json"
    details = json.loads(file.read_text())
    details["config"]["trunk"] = "resnet18"
    file.write_text(json.dumps(details))


def other_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (other_model, "do not fit a resnet18"),
        (other_weights, "was changed after it was written"),
        (lambda f: (f / "trunk.json").unlink(), "trunk.json"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "No such file"),
    ],
)
def test_a_damaged_trunk_is_refused(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    saved(tmp_path, "test_resnet", 32)
    damage(tmp_path)
    with pytest.raises(ClipletError, match=said) as e:
        load_trunk(tmp_path)
    assert isinstance(e.value, ArtifactError)


def test_classifiers_do_not_pay_for_open_clip() -> None:
    code = "import sys, cliplet.classifier; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

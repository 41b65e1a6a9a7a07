"""Vision towers and trunks that tests make themselves, in the layout in which they are saved."""

from __future__ import annotations

from pathlib import Path

from cliplet.artifact import BundleJob
from cliplet.model_spec import ModelSpec
from cliplet.views import Aggregation
from cliplet.vocabulary import NO_CLASSES


def save_toy_tower(folder: Path, kind: str = "clip_vision_model") -> Path:
    """A folder as transformers saves it, with a toy vision tower of 32 x 32 pixels and patches of 8 in it."""
    import torch
    import transformers

    names = {
        "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
        "mlcd_vision_model": ("MLCDVisionConfig", "MLCDVisionModel"),
    }
    of_config, of_model = (getattr(transformers, name) for name in names[kind])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = of_model(of_config(**sizes, patch_size=8, image_size=32))
    with torch.no_grad():
        for parameter in model.parameters():
            # As large as after training: patches and positions differ, and no layer norm is the identity.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def save_toy_trunk(folder: Path, seed: int = 0, size: int = 64) -> Path:
    """A folder as `cliplet train mlcd` writes it, with a network of random weights in it."""
    import torch

    from cliplet.trunk_files import TrunkConfig, new_trunk, save_trunk
    from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

    torch.manual_seed(seed)
    trunk = new_trunk("test_resnet", size)
    with torch.no_grad():
        for parameter in trunk.parameters():
            # A network begins with branches that give 0: what changes in them would change nothing.
            parameter.add_(0.1 * torch.randn_like(parameter))
    fed = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
    save_trunk(folder, trunk, TrunkConfig(trunk="test_resnet", preprocessing=fed, width=96), {"epochs": 2})
    return folder


def trunk_job(spec: ModelSpec, engines: tuple[tuple[str, str], ...] = (("onnx", "fp32"),)) -> BundleJob:
    """What a bundle of a trunk or tower is made of."""
    return BundleJob(spec, NO_CLASSES, Aggregation(), {}, engines)

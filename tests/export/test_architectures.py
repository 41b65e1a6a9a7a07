"""Every family of CLIP that users have: a small one with random weights, traced and compared with itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_toy_clip
from torch import nn
from torch.nn import functional

from cliplet.contract import SNIPPETS, TEXT_INITIALIZER
from cliplet.export.graphs import SnippetsGraph
from cliplet.export.onnx_graph import set_vocabulary, trace
from cliplet.model_spec import parse_model_spec
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.runners.torch_runner import TorchRunner
from cliplet.snippets import Snippets
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation
from cliplet.vocabulary import read_vocabulary


def timm_tower(name: str, size: int, pool: str, proj: str | None, **model: Any) -> dict[str, Any]:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {"vision_cfg": {**vision, "timm_model_pretrained": False}, **model}


VIT = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT": {"vision_cfg": VIT},
    "ViT with QuickGELU and attentional pooling": {
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
        "quick_gelu": True,
    },
    "ResNet with attention pool": {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    },
    "ConvNeXt": timm_tower("test_convnext", 64, "", "linear"),
    "SigLIP": timm_tower("test_vit", 64, "map", "none", embed_dim=64, init_logit_bias=-2.0, custom_text=True),
    "MobileCLIP-S": timm_tower("fastvit_t8", 64, "avg", None, embed_dim=32, custom_text=True),
}


def toy_snippets(folder: Path, model_cfg: dict[str, Any]) -> Snippets:
    save_toy_clip(folder, **model_cfg)
    teacher = load_teacher(parse_model_spec(f"open_clip:local-dir:{folder}"))
    module = teacher.snippets(read_vocabulary("cat,dog,bird"), Aggregation())
    # Random text towers hold all classes for alike.
    module.text = functional.normalize(torch.randn(3, module.text.shape[1]), dim=-1)
    # Untrained statistics let deep convolutions fade out; those of noise keep images apart.
    for part in module.encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    side = module.preprocessing.size
    with torch.no_grad():
        module.encoder.train()(torch.randn(8, 3, side, side))
    return module.eval()


def feeds(images: int, views: int) -> dict[str, np.ndarray]:
    """Coloured squares, and boxes of all sizes that begin and end between pixels."""
    numbers = np.random.default_rng([images, views])
    corners = numbers.uniform((0, 0, 50, 40), (30, 25, 96, 72), (images, views, 4))
    return {
        "image": np.kron(
            numbers.integers(0, 256, (images, 6, 8, 3), np.uint8), np.ones((1, 12, 12, 1), np.uint8)
        ),
        "boxes": corners.astype(np.float32),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_graph_of_every_architecture_agrees(architecture: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    module = toy_snippets(tmp_path / "clip", ARCHITECTURES[architecture])
    example = {name: torch.from_numpy(values) for name, values in feeds(2, 3).items()}
    example[TEXT_INITIALIZER] = torch.ones(5, module.text.shape[1])
    trace(SnippetsGraph(module), SNIPPETS, example, tmp_path / "traced.onnx")
    set_vocabulary(tmp_path / "traced.onnx", tmp_path / "model.onnx", module.text.numpy())
    with TorchRunner(module, SNIPPETS) as eager, OnnxRunner(tmp_path / "model.onnx", SNIPPETS) as exported:
        for images, views in ((1, 1), (3, 5)):
            fed = feeds(images, views)
            wanted, found = eager.infer(fed), exported.infer(fed)
            if views > 1:
                assert wanted["view_probs"].std(axis=1).max() > 0.01, "views alike would prove nothing"
            for name, values in wanted.items():
                np.testing.assert_allclose(found[name], values, atol=1e-4)

"""Models and images that tests make themselves, small enough to read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Cli = Callable[..., subprocess.CompletedProcess[str]]

# A CLIP of 0.2 M parameters with random weights: every code path of a large one, in milliseconds.
TOY_CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"resize_mode": "shortest", "interpolation": "bicubic"},
}


def save_toy_clip(folder: Path, **model_cfg: object) -> Path:
    """A folder in open_clip's hub layout with a toy CLIP in it; `model_cfg` overrides its configuration."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {**TOY_CONFIG, "model_cfg": {**TOY_CONFIG["model_cfg"], **model_cfg}}  # type: ignore[dict-item]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}")
    # Random towers look at everything alike; larger weights make the probabilities differ from view to view.
    state = {k: (v * 3 if "proj" in k else v).contiguous() for k, v in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A smooth random image uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

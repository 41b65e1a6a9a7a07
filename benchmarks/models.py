"""The models and class names that benchmarks share, and what they ask of a machine."""

from __future__ import annotations

from pathlib import Path

from cliplet.artifact import cache_folder
from cliplet.model_spec import ModelSpec

CLASSES = "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,bird,cat,dog,horse,sheep,cow,bottle,chair,sofa"


def random_weights(architecture: str) -> Path:
    """Random weights of an open_clip architecture, made once, in the cache folder; they change no time."""
    path = cache_folder() / "benchmarks" / f"{architecture}.safetensors"
    if not path.exists():
        import open_clip
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = open_clip.create_model(architecture).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def gflop_per_view(spec: ModelSpec) -> float:
    """Arithmetic of a CLIP's image tower for one view, in GFLOP (a multiplication and an addition are two)."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = open_clip.create_model(spec.open_clip_name, pretrained=spec.pretrained).eval()
    side = model.visual.image_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    # The fused inference path is one opaque operator to the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, height, width))
    return counter.get_total_flops() / 1e9

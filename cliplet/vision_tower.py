"""Vision towers of `transformers` from a folder on this machine: MLCD's released ones, and CLIP's.

    tower = load_vision_tower(Path("mlcd-vit-base-patch32-224"))
    features, embedding = tower(pixels)

MLCD (An et al., ECCV 2024) was released without text tower or projection: B/32 and L/14 as `CLIPVisionModel` with
learned positions, bigG/14 as `MLCDVisionModel` with 2-D rotary positions. A tower is built from its configuration
alone, so what holds a copy of that and of the weights needs the folder no more.

Legend: B images, D width of the tower, S side of its input, h x w patches, T tokens, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cliplet.errors import DataError, UsageError
from cliplet.tower_files import CLASSES, read_tower_config, tower_tensors, transformers_library

_POSITIONS = "embeddings.position_embedding.weight"


class VisionTower(nn.Module):
    """Feature maps and pooled embeddings of a tower with random weights.

    Args:
        config: what `read_tower_config` gives.
        size: side S of the input that it is built for, by default that of the configuration.

    Attributes:
        config: its configuration, `image_size` being S.
        channels: D.
        model: the module of transformers.

    Raises:
        DataError: the configuration is not that of a tower.
        UsageError: patches do not tile the side.
        EnvironmentError_: transformers is missing.
    """

    def __init__(self, config: Mapping[str, Any], size: int | None = None) -> None:
        super().__init__()
        self.config = {**config, "image_size": size or config["image_size"]}
        self.channels = int(config["hidden_size"])
        self._check_side(self.config["image_size"])
        kind, fields = self.config["model_type"], {k: v for k, v in self.config.items() if k != "model_type"}
        of_config, of_model = (getattr(transformers_library(), name) for name in CLASSES[kind])
        try:
            # The exporter takes this implementation of attention apart; others are kernels that it does not know.
            self.model = of_model._from_config(
                of_config(**fields), attn_implementation="sdpa", dtype=torch.float32
            )
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(
                f"no vision tower can be built from {self.config}: {error}", "what `save_pretrained` wrote"
            ) from error

    def forward(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Feature maps float [B, D, h, w] and pooled embeddings float [B, D] of normalised pixels float [B, 3, S, S].

        The map is the last layer's patch tokens, the embedding its class token, both after the final layer norm:
        transformers applies that to the class token only (its `pooler_output`), and one layer norm for both puts the
        patches into the space in which the tower was trained to tell images apart.

        Sides other than the tower's own are possible: learned positions are then interpolated.

        Raises:
            UsageError: patches do not tile the images.
        """
        rows, columns = (self._check_side(side) for side in pixels_B3SS.shape[-2:])
        # MLCDVisionModel has no learned positions, and no such argument.
        learned = self.config["model_type"] == "clip_vision_model"
        found = self.model(pixels_B3SS, **({"interpolate_pos_encoding": True} if learned else {}))
        tokens_BTD = self.model.post_layernorm(found.last_hidden_state[:, 1:])
        return tokens_BTD.transpose(1, 2).unflatten(2, (rows, columns)), found.pooler_output

    def _check_side(self, side: int) -> int:
        """Number of patches along a side."""
        patch = self.config["patch_size"]
        if side < patch or side % patch:
            raise UsageError(
                f"images of {side} pixels for a vision tower with patches of {patch}",
                f"a multiple of {patch}, such as {max(round(side / patch), 1) * patch}",
                "change image_size or region_size, whichever it is",
            )
        return int(side // patch)


class PooledTower(nn.Module):
    """The pooled embeddings alone, float [B, D], of normalised pixels float [B, 3, S, S]."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        _, embedding_BD = self.tower(pixels_B3SS)
        return embedding_BD


def load_vision_tower(folder: Path, size: int | None = None) -> VisionTower:
    """The tower in `folder`, float32, in evaluation mode on the CPU.

    Args:
        size: side of the input that it is built for, by default that which it was trained with.

    Raises:
        DataError, EnvironmentError_, UsageError: as `read_tower_config`, `read_tower_weights` and `VisionTower`.
    """
    tower = VisionTower(read_tower_config(folder), size)
    tower.load_state_dict(read_tower_weights(folder, tower))
    return tower.eval()


def read_tower_weights(folder: Path, tower: VisionTower) -> dict[str, Tensor]:
    """Weights float32 for `tower.load_state_dict`, from one safetensors file or from shards.

    Learned positions of another size are interpolated (bicubic, as transformers does on the fly).

    Raises:
        DataError: there are none, they are a pickle, or they do not fit the tower.
    """
    wanted = tower.model.state_dict()
    # What lies beside a tower in a whole CLIP is left alone; what belongs to a tower must belong to this one.
    parts = {name.split(".")[0] for name in wanted}
    found = {name: tensor.to(torch.float32) for name, tensor in tower_tensors(folder, parts)}
    if _POSITIONS in wanted and _POSITIONS in found:
        found[_POSITIONS] = _resized_positions(found[_POSITIONS], len(wanted[_POSITIONS]))
    wrong = [f"no {name}" for name in wanted if name not in found]
    wrong += [f"{name} besides" for name in found if name not in wanted]
    wrong += [
        f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(
            f"the weights in {folder} do not fit its config.json: {', '.join(wrong[:3])}{more}",
            "both as `save_pretrained` wrote them",
            "download the folder again",
        )
    return {f"model.{name}": tensor for name, tensor in found.items()}


def _resized_positions(positions_PD: Tensor, count: int) -> Tensor:
    """The class token's position, then those of a square grid interpolated to `count` positions in all."""
    before, after = math.isqrt(len(positions_PD) - 1), math.isqrt(count - 1)
    if before == after or before**2 != len(positions_PD) - 1:
        return positions_PD
    grid_1Dhw = positions_PD[1:].T.unflatten(1, (before, before)).unsqueeze(0)
    resized_1Dhw = functional.interpolate(grid_1Dhw, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([positions_PD[:1], resized_1Dhw[0].flatten(1).T])

"""A trunk that `cliplet train mlcd` made, on disk: a network that turns images into features, and how it is fed.

    trunk, config = load_trunk(Path("runs/trunk/trunk"))
    features = trunk(normalised_pixels)

    FOLDER/trunk.json                    configuration, how it was trained, and which file holds the weights
    FOLDER/trunk-<sha256>.safetensors    the weights

Legend: B images, D features, S side of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from cliplet.checkpoint import load_arrays, load_details, save_arrays
from cliplet.errors import ArtifactError, UsageError
from cliplet.model_spec import TRUNK_PREFIX, TRUNK_STEM
from cliplet.views import Preprocessing

OPEN_CLIP = "open_clip:"


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """All that determines a trunk besides its weights.

    Attributes:
        trunk: a timm model, whose pooled features are meant, or `open_clip:ARCHITECTURE`, whose image embeddings.
        preprocessing: side, mean and deviation of its input; images are squashed to the square.
        width: number D of features.
    """

    trunk: str
    preprocessing: Preprocessing
    width: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrunkConfig:
        return cls(**{**data, "preprocessing": Preprocessing.from_json(data["preprocessing"])})


def is_timm_model(name: str) -> bool:
    """Whether timm has this model, and these weights of it if the name has a tag."""
    try:
        return timm.is_model(name) and timm.get_pretrained_cfg(name) is not None
    except RuntimeError:  # of a tag that it does not know
        return False


def new_timm_trunk(name: str, size: int) -> nn.Module:
    """A timm model without its head, with random weights, for images of `size` pixels."""
    # Transformers have to be told the side of their input; convolutions have no such argument.
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    trunk: nn.Module = timm.create_model(name, num_classes=0, **({"img_size": size} if fixed else {}))
    return trunk


def new_trunk(name: str, size: int) -> nn.Module:
    """A trunk with random weights: features float [B, D] of normalised pixels float [B, 3, S, S].

    Args:
        name: a timm model or `open_clip:ARCHITECTURE`.
        size: side S of its input.

    Raises:
        UsageError: there is no such trunk, or it takes no images of this side.
    """
    known = _is_architecture(name) if name.startswith(OPEN_CLIP) else is_timm_model(name)
    if not known:
        library = "open_clip" if name.startswith(OPEN_CLIP) else "timm"
        raise UsageError(
            f"there is no trunk {name!r}",
            f"the name of a timm model, or {OPEN_CLIP}ARCHITECTURE",
            f"python -c 'import {library}; print({library}.list_models())'",
        )
    try:
        return _image_tower(name, size) if name.startswith(OPEN_CLIP) else new_timm_trunk(name, size)
    # Libraries complain of a side in whatever way comes first.
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"no {name} can be made for images of {size} pixels: {_first_line(error)}",
            "a side that its patches tile",
            "another --image-size",
        ) from error


def _is_architecture(name: str) -> bool:
    # Not above: it takes seconds to import, and classifiers, which share this file, need timm alone.
    import open_clip

    return name.removeprefix(OPEN_CLIP) in open_clip.list_models()


def _image_tower(name: str, size: int) -> nn.Module:
    import open_clip

    config = open_clip.get_model_config(name.removeprefix(OPEN_CLIP))
    vision = {**config["vision_cfg"], "image_size": size, "timm_model_pretrained": False}
    # Only the image tower is kept: the smallest text tower saves making, or downloading, the architecture's own.
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    quick = config.get("quick_gelu", False)
    visual: nn.Module = open_clip.CLIP(config["embed_dim"], vision, text, quick_gelu=quick).visual
    return visual


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@torch.inference_mode()
def trunk_width(trunk: nn.Module, size: int) -> int:
    """Number D of features that the trunk gives of an image of `size` pixels.

    Raises:
        UsageError: it takes no such image, or gives no vector of features.
    """
    training = trunk.training
    trunk.eval()
    try:
        features = trunk(torch.zeros(1, 3, size, size, device=next(trunk.parameters()).device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"the trunk takes no images of {size} pixels: {_first_line(error)}",
            "a side that it can shrink",
            "another --image-size",
        ) from error
    finally:
        trunk.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise UsageError(
            "the trunk gives something else than features of an image", "a vector", "another --trunk"
        )
    return features.shape[1]


def save_trunk(
    folder: Path, trunk: nn.Module, config: TrunkConfig, details: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write a trunk: weights (safetensors), configuration, and `details` such as how it was trained.

    Raises:
        EnvironmentError_: the folder cannot be written.
    """
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in trunk.state_dict().items()}
    save_arrays(folder, TRUNK_STEM, arrays, {"kind": "trunk", "config": config.to_json(), **details})


def is_trunk_folder(folder: Path) -> bool:
    """Whether `save_trunk` wrote to this folder."""
    return (folder / f"{TRUNK_STEM}.json").exists()


def holds_whole_trunk(folder: Path) -> bool:
    """Whether `folder` holds a trunk's details and the file of its weights; what that holds is not read."""
    try:
        return (folder / trunk_details(folder)["arrays"]).is_file()
    except ArtifactError:
        return False


def refuse_near_trunk(name: str) -> None:
    """Raise `UsageError` where a name that means nothing leads to a trunk, whose name is then told.

    It may lack the prefix, or be the folder of the whole run in which the trunk lies.
    """
    folder = Path(name.removeprefix(TRUNK_PREFIX))
    for place in (folder, folder / "trunk"):
        if is_trunk_folder(place) and name != f"{TRUNK_PREFIX}{place}":
            what = "trunk, which is named otherwise" if place == folder else "run, whose trunk lies in it"
            raise UsageError(
                f"{folder} is the folder of a {what}",
                f"{TRUNK_PREFIX}FOLDER, where FOLDER holds {TRUNK_STEM}.json",
                f"name {TRUNK_PREFIX}{place} instead of {name}",
            )


def trunk_details(folder: Path) -> dict[str, Any]:
    """What a trunk's folder says about it, `config` and `sha256` of its weights among it.

    Raises:
        ArtifactError: it holds none.
    """
    return load_details(folder, TRUNK_STEM)


def trunk_config(folder: Path) -> TrunkConfig:
    """The configuration of the trunk in `folder`.

    Raises:
        ArtifactError: it holds none.
    """
    return TrunkConfig.from_json(trunk_details(folder)["config"])


def load_trunk(folder: Path) -> tuple[nn.Module, TrunkConfig]:
    """The trunk that `save_trunk` wrote, in evaluation mode on the CPU, and its configuration.

    Raises:
        ArtifactError: the folder holds none, or its weights do not fit its configuration.
    """
    arrays, details = load_arrays(folder, TRUNK_STEM)
    config = TrunkConfig.from_json(details["config"])
    trunk = new_trunk(config.trunk, config.preprocessing.size)
    try:
        trunk.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    except RuntimeError as error:
        library = "open_clip" if config.trunk.startswith(OPEN_CLIP) else "timm"
        raise ArtifactError(
            f"the weights in {folder} do not fit a {config.trunk}",
            f"the version of {library} that it was trained with",
            str(error).splitlines()[-1].strip(),
        ) from error
    return trunk.eval(), config

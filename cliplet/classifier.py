"""The student: a trunk that gives feature maps, class activation maps (CAM) by a 1x1 convolution, BoostLU, their mean.

    classifier = load_classifier(Path("runs/scenes/classifier"))
    logits, cam = classifier(pixels)

Legend: B images, C classes, D channels of the trunk, H x W pixels, h x w cells of the CAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliplet.checkpoint import load_arrays, load_details, save_arrays
from cliplet.errors import ArtifactError, UsageError
from cliplet.model_spec import CLASSIFIER_STEM
from cliplet.tower_files import PREFIX, read_tower_config, tower_folder
from cliplet.trunk_files import is_timm_model, new_timm_trunk
from cliplet.views import Preprocessing
from cliplet.vision_tower import VisionTower
from cliplet.vocabulary import Vocabulary

CLASSIFIER_FILE = f"{CLASSIFIER_STEM}.json"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """All that determines a classifier besides its classes and weights.

    Attributes:
        trunk: a timm model, such as `resnet101.tv_in1k`, its own head is not used; or `mlcd:FOLDER`, a vision
            tower that transformers saved.
        boost: alpha, the factor on positive CAM values (BoostLU; CCD uses 3).
        preprocessing: side, mean and deviation of its input; images are squashed to the square.
        tower: of a vision tower, what it is built from; without it, the folder is read.

    Raises:
        UsageError: there is no such trunk.
        DataError: the folder's configuration is broken.
    """

    trunk: str
    boost: float
    preprocessing: Preprocessing
    tower: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        folder = tower_folder(self.trunk)
        if folder is None and self.tower is not None:
            raise UsageError(
                f"trunk {self.trunk!r} with the configuration of a vision tower", f"{PREFIX}FOLDER"
            )
        if folder is not None and self.tower is None:
            object.__setattr__(self, "tower", read_tower_config(folder))
        if folder is None and not is_timm_model(self.trunk):
            raise UsageError(
                f"timm has no model {self.trunk!r}",
                f"the name of a timm model, or {PREFIX}FOLDER",
                "python -c 'import timm; print(timm.list_models())'",
            )
        if self.boost <= 0:
            raise UsageError(f"boost {self.boost}", "a factor above 0; 1 changes nothing")

    def to_json(self) -> dict[str, Any]:
        """`tower` only where there is one: a timm trunk's configuration is what it was before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "tower" or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClassifierConfig:
        return cls(**{**data, "preprocessing": Preprocessing.from_json(data["preprocessing"])})


class Classifier(nn.Module):
    """Multi-label logits and class activation maps of images.

    CCD's classifier (Kim & Shim 2025): the CAM M is a 1x1 convolution of the trunk's last feature
    map, BoostLU multiplies its positive values by alpha, and a class's logit is the mean of its boosted map.

    Attributes:
        trunk: the timm model or the vision tower.
        head: the 1x1 convolution, D -> C, with bias.

    Raises:
        UsageError: the trunk offers no feature map, or not of images of this side.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClassifierConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.trunk, channels = _new_trunk(config)
        self.head = nn.Conv2d(channels, len(vocabulary.names), kernel_size=1)
        self.register_buffer("mean", torch.tensor(config.preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float [B, C] and boosted CAM float [B, C, h, w] of RGB images float [B, 3, H, W] in 0..1."""
        return self.boosted(self.activation_map(self.normalised(pixels_B3HW)))

    def normalised(self, pixels_B3HW: Tensor) -> Tensor:
        """What the trunk is fed, for pixels in 0..1."""
        return (pixels_B3HW - self.mean) / self.std

    def activation_map(self, normalised_B3HW: Tensor) -> Tensor:
        """CAM float [B, C, h, w] before BoostLU."""
        if isinstance(self.trunk, VisionTower):
            features_BDhw, _ = self.trunk(normalised_B3HW)
        else:
            (features_BDhw,) = self.trunk.forward_intermediates(
                normalised_B3HW, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
        return self.head(features_BDhw)

    def boosted(self, cam_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float [B, C] and boosted CAM float [B, C, h, w]."""
        boosted_BChw = torch.where(cam_BChw > 0, self.config.boost * cam_BChw, cam_BChw)
        return boosted_BChw.mean(dim=(2, 3)), boosted_BChw


def _new_trunk(config: ClassifierConfig) -> tuple[nn.Module, int]:
    """The trunk with random weights, and the number of channels of its last feature map."""
    size = config.preprocessing.size
    if config.tower is not None:
        tower = VisionTower(config.tower, size)
        return tower, tower.channels
    trunk = new_timm_trunk(config.trunk, size)
    if not hasattr(trunk, "forward_intermediates"):
        raise UsageError(
            f"the timm model {config.trunk!r} gives no feature maps",
            "a model with forward_intermediates: ResNets, ConvNeXts, EfficientNets, ViTs and most others",
            "choose another trunk",
        )
    # Not `num_features`: EfficientNets and their like have a convolution more before their own head.
    return trunk, trunk.feature_info[-1]["num_chs"]


def save_classifier(
    folder: Path, classifier: Classifier, details: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write a classifier: weights (safetensors), classes, configuration, and `details` such as how it was trained."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in classifier.state_dict().items()}
    described = {
        "kind": "classifier",
        "vocabulary": classifier.vocabulary.to_json(),
        "config": classifier.config.to_json(),
        **details,
    }
    save_arrays(folder, CLASSIFIER_STEM, arrays, described)


def classifier_details(folder: Path) -> dict[str, Any]:
    """What a classifier's folder says about it, `config`, `vocabulary` and `sha256` of its weights among it."""
    return load_details(folder, CLASSIFIER_STEM)


def load_classifier(folder: Path) -> Classifier:
    """The classifier that `save_classifier` wrote, in evaluation mode on the CPU.

    Raises:
        ArtifactError: the folder holds none, or its weights do not fit its configuration.
    """
    arrays, details = load_arrays(folder, CLASSIFIER_STEM)
    config = ClassifierConfig.from_json(details["config"])
    classifier = Classifier(config, Vocabulary.from_json(details["vocabulary"], str(folder)))
    try:
        classifier.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    except RuntimeError as error:
        raise ArtifactError(
            f"the weights in {folder} do not fit a {config.trunk} with {len(classifier.vocabulary.names)} classes",
            f"the version of {'timm' if config.tower is None else 'transformers'} that it was trained with",
            str(error).splitlines()[-1].strip(),
        ) from error
    return classifier.eval()

"""The student: a convolutional trunk, class activation maps (CAM) by a 1x1 convolution, BoostLU, their mean.

    classifier = load_classifier(Path("runs/scenes/classifier"))
    logits, cam = classifier(pixels)

Legend: B images, C classes, D channels of the trunk, H x W pixels, h x w cells of the CAM.
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
from torch import Tensor, nn

from cliplet.checkpoint import load_arrays, load_details, save_arrays
from cliplet.errors import ArtifactError, UsageError
from cliplet.views import Preprocessing
from cliplet.vocabulary import Vocabulary

STEM = "classifier"
CLASSIFIER_FILE = f"{STEM}.json"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """All that determines a classifier besides its classes and weights.

    Attributes:
        trunk: a timm model, such as `resnet101.tv_in1k`; its own head is not used.
        boost: alpha, the factor on positive CAM values (BoostLU; CCD uses 3).
        preprocessing: side, mean and deviation of its input; images are squashed to the square.
    """

    trunk: str
    boost: float
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        if not _is_known(self.trunk):
            raise UsageError(
                f"timm has no model {self.trunk!r}",
                "the name of a timm model",
                "python -c 'import timm; print(timm.list_models())'",
            )
        if self.boost <= 0:
            raise UsageError(f"boost {self.boost}", "a factor above 0; 1 changes nothing")


class Classifier(nn.Module):
    """Multi-label logits and class activation maps of images.

    CCD's classifier (Kim & Shim 2025): the CAM M is a 1x1 convolution of the trunk's last feature
    map, BoostLU multiplies its positive values by alpha, and a class's logit is the mean of its boosted map.

    Attributes:
        trunk: the timm model.
        head: the 1x1 convolution, D -> C, with bias.

    Raises:
        UsageError: the trunk offers no feature map.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClassifierConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        size = config.preprocessing.size
        # Transformers have to be told the side of their input; convolutions have no such argument.
        fixed = getattr(timm.get_pretrained_cfg(config.trunk), "fixed_input_size", False)
        self.trunk = timm.create_model(config.trunk, num_classes=0, **({"img_size": size} if fixed else {}))
        if not hasattr(self.trunk, "forward_intermediates"):
            raise UsageError(
                f"the timm model {config.trunk!r} gives no feature maps",
                "a model with forward_intermediates: ResNets, ConvNeXts, EfficientNets, ViTs and most others",
                "choose another trunk",
            )
        # Not `num_features`: EfficientNets and their like have a convolution more before their own head.
        channels = self.trunk.feature_info[-1]["num_chs"]
        self.head = nn.Conv2d(channels, len(vocabulary.names), kernel_size=1)
        self.register_buffer("mean", torch.tensor(config.preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float [B, C] and boosted CAM float [B, C, h, w] of RGB images float [B, 3, H, W] in 0..1."""
        normalised = (pixels_B3HW - self.mean) / self.std
        (features_BDhw,) = self.trunk.forward_intermediates(
            normalised, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        cam_BChw = self.head(features_BDhw)
        boosted_BChw = torch.where(cam_BChw > 0, self.config.boost * cam_BChw, cam_BChw)
        return boosted_BChw.mean(dim=(2, 3)), boosted_BChw


def _is_known(trunk: str) -> bool:
    """Whether timm has this model, and these weights of it if the name has a tag."""
    try:
        return timm.is_model(trunk) and timm.get_pretrained_cfg(trunk) is not None
    except RuntimeError:  # of a tag that it does not know
        return False


def save_classifier(
    folder: Path, classifier: Classifier, details: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write a classifier: weights (safetensors), classes, configuration, and `details` such as how it was trained."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in classifier.state_dict().items()}
    described = {
        "kind": "classifier",
        "vocabulary": classifier.vocabulary.to_json(),
        "config": asdict(classifier.config),
        **details,
    }
    save_arrays(folder, STEM, arrays, described)


def classifier_details(folder: Path) -> dict[str, Any]:
    """What a classifier's folder says about it, `config`, `vocabulary` and `sha256` of its weights among it."""
    return load_details(folder, STEM)


def load_classifier(folder: Path) -> Classifier:
    """The classifier that `save_classifier` wrote, in evaluation mode on the CPU.

    Raises:
        ArtifactError: the folder holds none, or its weights do not fit its configuration.
    """
    arrays, details = load_arrays(folder, STEM)
    config = ClassifierConfig(
        **{**details["config"], "preprocessing": Preprocessing.from_json(details["config"]["preprocessing"])}
    )
    classifier = Classifier(config, Vocabulary.from_json(details["vocabulary"], str(folder)))
    try:
        classifier.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    except RuntimeError as error:
        raise ArtifactError(
            f"the weights in {folder} do not fit a {config.trunk} with {len(classifier.vocabulary.names)} classes",
            "the version of timm that it was trained with",
            str(error).splitlines()[-1].strip(),
        ) from error
    return classifier.eval()

"""Where a student's trunk starts from: chance, timm's hub, or the image tower of its own teacher."""

from __future__ import annotations

import timm
import torch

from cliplet.classifier import Classifier
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.model_spec import parse_model_spec
from cliplet.teacher import load_teacher

from .classifier_recipe import ClassifierRecipe


def load_trunk_weights(classifier: Classifier, recipe: ClassifierRecipe) -> None:
    """Set the classifier's trunk to what the recipe says.

    Raises:
        UsageError: the teacher's image tower is not this trunk.
        EnvironmentError_: the pretrained weights have to be downloaded and cannot be.
    """
    if recipe.trunk_weights == "pretrained":
        classifier.trunk.load_state_dict(_pretrained(recipe.trunk))
    elif recipe.trunk_weights == "teacher":
        classifier.trunk.load_state_dict(_image_tower(recipe))


def _pretrained(trunk: str) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = timm.create_model(trunk, pretrained=True, num_classes=0).state_dict()
    # The hub's client raises its own kinds for each way a download can fail.
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EnvironmentError_(
            f"cannot get the weights of {trunk}: {reason}",
            "a connection to the model hub, or weights in its cache on this machine",
            "--set trunk_weights=random starts from nothing, which takes far more images and epochs",
        ) from error
    return state


def _image_tower(recipe: ClassifierRecipe) -> dict[str, torch.Tensor]:
    visual = load_teacher(parse_model_spec(recipe.teacher)).clip.visual
    trunk = getattr(visual, "trunk", None)
    wanted = timm.create_model(recipe.trunk, num_classes=0).state_dict()
    state: dict[str, torch.Tensor] = {} if trunk is None else trunk.state_dict()
    shared = {
        name: state[name] for name in wanted if name in state and state[name].shape == wanted[name].shape
    }
    if shared.keys() != wanted.keys():
        raise UsageError(
            f"the image tower of {recipe.teacher} is not the trunk {recipe.trunk}",
            "a CLIP whose image tower is that timm model",
            "--set trunk_weights=pretrained",
        )
    return shared

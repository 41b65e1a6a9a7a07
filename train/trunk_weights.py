"""Where a student's trunk starts from: chance, timm's hub, the image tower of its own teacher, or a folder.

A folder `mlcd:FOLDER` holds what `cliplet train mlcd` learned, or a vision tower that transformers saved.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import timm
import torch

from cliplet.classifier import Classifier
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.model_spec import parse_model_spec
from cliplet.teacher import load_teacher
from cliplet.tower_files import read_tower_normalisation, tower_folder
from cliplet.trunk_files import (
    OPEN_CLIP,
    is_timm_model,
    is_trunk_folder,
    load_trunk,
    refuse_near_trunk,
    trunk_config,
    trunk_details,
)
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cliplet.vision_tower import read_tower_weights

from .classifier_recipe import ClassifierRecipe


def student_trunk(recipe: ClassifierRecipe) -> str:
    """What the student's configuration calls its trunk: of a folder that `train mlcd` wrote, the timm model in it.

    Raises:
        UsageError: the folder holds no timm model, or a folder is named in another way than `mlcd:FOLDER`.
    """
    folder = own_trunk(recipe)
    if folder is None:
        if tower_folder(recipe.trunk) is None and not is_timm_model(recipe.trunk):
            refuse_near_trunk(recipe.trunk)
        return recipe.trunk
    name = trunk_config(folder).trunk
    if name.startswith(OPEN_CLIP):
        raise UsageError(
            f"{folder} holds the image tower {name}",
            "a timm model, whose feature maps a student needs; timm has most of open_clip's towers under its own names",
            "cliplet train mlcd --trunk vit_base_patch32_clip_224, for instance",
        )
    return name


def own_trunk(recipe: ClassifierRecipe) -> Path | None:
    """The folder that the recipe's trunk names, if `train mlcd` wrote it.

    Raises:
        UsageError: it is that of a run, in which the trunk's own folder lies.
    """
    folder = tower_folder(recipe.trunk)
    if folder is None or is_trunk_folder(folder):
        return folder
    refuse_near_trunk(recipe.trunk)
    return None


def trunk_sha256(recipe: ClassifierRecipe) -> str | None:
    """Hash of the weights in the folder that the recipe's trunk names, if `train mlcd` wrote it.

    Raises:
        UsageError: as `own_trunk`.
        ArtifactError: it is damaged.
    """
    folder = own_trunk(recipe)
    return None if folder is None else str(trunk_details(folder)["sha256"])


def student_input(recipe: ClassifierRecipe) -> Preprocessing:
    """What a student is fed: images squashed to the recipe's side, normalised as its starting weights know them.

    That is as its trunk's folder says (whatever its weights), as the teacher whose image tower it starts from, or as
    ImageNet's models. Side and interpolation are the recipe's also where a vision tower's image processor has others:
    the tower's positions are fitted to the side.
    """
    fed = Preprocessing(recipe.image_size, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
    folder = tower_folder(recipe.trunk)
    if folder is not None and is_trunk_folder(folder):
        own = trunk_config(folder).preprocessing
        return replace(fed, mean=own.mean, std=own.std)
    if folder is not None:
        mean, std = read_tower_normalisation(folder)
        return replace(fed, mean=mean, std=std)
    if recipe.trunk_weights == "teacher":
        seen = load_teacher(parse_model_spec(recipe.teacher)).preprocessing
        return replace(fed, mean=seen.mean, std=seen.std)
    return fed


def load_trunk_weights(classifier: Classifier, recipe: ClassifierRecipe) -> None:
    """Set the classifier's trunk to what the recipe says.

    Raises:
        UsageError: the teacher's image tower is not this trunk.
        DataError: a vision tower's folder holds no weights that fit it.
        ArtifactError: the folder of a trunk is damaged.
        EnvironmentError_: the pretrained weights have to be downloaded and cannot be.
    """
    folder = tower_folder(recipe.trunk)
    if folder is not None and recipe.trunk_weights != "random":
        _refuse_other_weights(recipe)
        own = is_trunk_folder(folder)
        state = _own_weights(folder, recipe) if own else read_tower_weights(folder, classifier.trunk)
        classifier.trunk.load_state_dict(state)
    elif recipe.trunk_weights == "pretrained":
        classifier.trunk.load_state_dict(pretrained_weights(recipe.trunk))
    elif recipe.trunk_weights == "teacher":
        classifier.trunk.load_state_dict(_image_tower(recipe))


def _refuse_other_weights(recipe: ClassifierRecipe) -> None:
    if recipe.trunk_weights != "pretrained":
        raise UsageError(
            f"trunk_weights {recipe.trunk_weights!r} with the trunk {recipe.trunk}",
            "pretrained, which takes the weights in that folder, or random",
            "--set trunk_weights=pretrained",
        )


def _own_weights(folder: Path, recipe: ClassifierRecipe) -> dict[str, torch.Tensor]:
    """The weights of a trunk that `train mlcd` wrote, its learned positions fitted to the student's side."""
    trunk, config = load_trunk(folder)
    learned_at = config.preprocessing.size
    # Of trunks that see one side only; convolutions see any.
    if recipe.image_size != learned_at and hasattr(trunk, "set_input_size"):
        trunk.set_input_size(img_size=recipe.image_size)
    state: dict[str, torch.Tensor] = trunk.state_dict()
    return state


def pretrained_weights(trunk: str) -> dict[str, torch.Tensor]:
    """The weights that timm has of a trunk.

    Raises:
        EnvironmentError_: they have to be downloaded and cannot be.
    """
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

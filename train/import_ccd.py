"""Classifiers that the public CCD code trained (github.com/k0u-id/CCD), as cliplet's own.

    import_ccd(Path("results/20250401_120000/bestccd.pt"), Path("classifier"))

That code saves a pair: the state of its model, and its settings as a `munch.Munch`. The model is torchvision's
ResNet-50 without its last two modules, a 1x1 convolution `onebyone_conv`, and a buffer `alpha` [1, C], BoostLU's
factor. Its images are squashed to `train_resize` with PIL's bilinear filter and normalised as ImageNet's.

Legend: C classes.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliplet.classifier import Classifier, ClassifierConfig, save_classifier
from cliplet.errors import DataError
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cliplet.vocabulary import Vocabulary, known_vocabulary

TRUNK = "resnet50"  # whatever the settings' `arch` says: the public code builds no other
ALPHA = "alpha"
# A ResNet's modules by their place in the public code's `feature_extractor`; 2 and 3 have no weights.
PLACES = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
# What the public code calls its data sets, and what their classes are called here.
CLASS_LISTS = {"voc07": "voc07", "voc12": "voc12", "coco": "coco14", "nuswide": "nus"}
EXPECTED = "a bestccd.pt or bestmodel.pt as the public CCD code saves it: (model state, settings)"


def import_ccd(checkpoint: Path, out: Path, vocabulary: Vocabulary | None = None) -> Path:
    """`out`, after the classifier of a public CCD checkpoint was written there for `load_classifier`.

    Args:
        checkpoint: `bestccd.pt` or `bestmodel.pt`. Nothing in it is executed.
        vocabulary: its C classes in its order; by default those of the data set that its settings name.

    Raises:
        DataError: it is no such checkpoint or holds code, its weights are not those of that model, or its
            classes are unknown or not as many as `vocabulary` names.
        EnvironmentError_: `out` cannot be written.
    """
    state, settings = _read(checkpoint)
    classes = vocabulary or _vocabulary(settings, checkpoint)
    config = ClassifierConfig(
        trunk=TRUNK,
        boost=_boost(state, checkpoint),
        preprocessing=Preprocessing(
            _side(settings, checkpoint), IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash"
        ),
    )
    _check_class_count(state, classes, checkpoint)
    classifier = Classifier(config, classes)
    classifier.load_state_dict(_own_state(state, classifier.state_dict(), checkpoint))
    origin = {"format": "k0u-id/CCD", "file": checkpoint.name, "dataset": str(settings.get("dataset"))}
    save_classifier(out, classifier, {"imported": origin})
    return out


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """State, without the prefix that DataParallel gives it, and settings of a checkpoint."""
    try:
        file = checkpoint.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {checkpoint}: {error.strerror}", EXPECTED) from error
    try:
        # The settings' own class would have to be imported and would fill itself; an OrderedDict takes its place.
        with file, torch.serialization.safe_globals([(OrderedDict, "munch.Munch")]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises a dozen kinds of errors for files that are cut off or something else entirely.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks to run code ({named[1]}); it was not loaded" if named else "is not a checkpoint"
        raise DataError(f"{checkpoint} {what}", EXPECTED) from error
    state, settings = loaded if isinstance(loaded, tuple) and len(loaded) == 2 else (None, None)
    if not (isinstance(state, Mapping) and isinstance(settings, Mapping)) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise DataError(f"{checkpoint} holds something else", EXPECTED)
    return {name.removeprefix("module."): value for name, value in state.items()}, settings


def _vocabulary(settings: Mapping[str, Any], checkpoint: Path) -> Vocabulary:
    dataset = str(settings.get("dataset"))
    if dataset not in CLASS_LISTS:
        raise DataError(
            f"{checkpoint} was trained on {dataset!r}, whose classes are not known",
            f"one of {', '.join(CLASS_LISTS)}, or a list of its classes",
            "name its classes, in its order, with --classes",
        )
    return known_vocabulary(CLASS_LISTS[dataset])


def _side(settings: Mapping[str, Any], checkpoint: Path) -> int:
    size = settings.get("train_resize")
    match size:
        case [int(height), int(width)] if height == width > 0:
            return height
    raise DataError(
        f"{checkpoint} was trained on images of size {size!r}", "two equal numbers as train_resize: a square"
    )


def _boost(state: Mapping[str, Tensor], checkpoint: Path) -> float:
    values = state[ALPHA].unique().tolist() if ALPHA in state else []
    if len(values) != 1 or not values[0] > 0:
        raise DataError(
            f"{checkpoint} has {values or 'no value'} as {ALPHA}",
            "one factor above 0, the same for all classes",
        )
    return float(values[0])


def _check_class_count(state: Mapping[str, Tensor], classes: Vocabulary, checkpoint: Path) -> None:
    bias = state.get("onebyone_conv.bias")
    count = len(classes.names) if bias is None else bias.numel()
    if count != len(classes.names):
        raise DataError(
            f"{checkpoint} tells {count} classes apart; {classes.source} names {len(classes.names)}",
            f"{count} classes, in the order of its outputs",
            "name its classes with --classes",
        )


def _own_state(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], checkpoint: Path
) -> dict[str, Tensor]:
    """The state under our names, as `wanted` has it; every tensor must be there once, and no other."""
    public = {_public_name(name): name for name in wanted}
    missing = sorted(public.keys() - state.keys())
    unexpected = sorted(state.keys() - public.keys() - {ALPHA})
    misshapen = sorted(n for n in public.keys() & state.keys() if state[n].shape != wanted[public[n]].shape)
    faults = {"lacks": missing, "has besides": unexpected, "has in another shape": misshapen}
    told = [f"{fault} {_some(names)}" for fault, names in faults.items() if names]
    if told:
        raise DataError(
            f"{checkpoint} is not CCD's ResNet-50: it {'; '.join(told)}",
            "the names and shapes of the public code's ImageClassifier",
            "train a classifier anew with cliplet train, or import another checkpoint",
        )
    return {own: state[name] for name, own in public.items()}


def _public_name(name: str) -> str:
    """What the public code calls `trunk.layer1.0.conv1.weight`: feature_extractor.4.0.conv1.weight."""
    part, _, rest = name.partition(".")
    if part == "head":
        return f"onebyone_conv.{rest}"
    module, _, inside = rest.partition(".")
    return f"feature_extractor.{PLACES[module]}.{inside}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

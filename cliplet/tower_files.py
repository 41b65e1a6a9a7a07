"""What a folder that `transformers` saved says of a vision tower: configuration, weights, normalisation.

Legend: D width of the tower.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.model_spec import TRUNK_PREFIX

PREFIX = TRUNK_PREFIX
WEIGHTS = "model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
# Configurations of a whole CLIP keep that of the vision tower in `vision_config`.
KINDS = {
    "clip_vision_model": "clip_vision_model",
    "clip": "clip_vision_model",
    "mlcd_vision_model": "mlcd_vision_model",
    "mlcd": "mlcd_vision_model",
    # By class, where a configuration has no model_type.
    "CLIPVisionModel": "clip_vision_model",
    "MLCDVisionModel": "mlcd_vision_model",
}
CLASSES = {
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
    "mlcd_vision_model": ("MLCDVisionConfig", "MLCDVisionModel"),
}
# All that decides the shape of a tower or what it computes.
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_groups",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "rope_parameters",
)
Rgb = tuple[float, float, float]
# Of CLIP's image processor, which MLCD kept.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Constants that some versions of transformers saved among the weights.
_CONSTANTS = ("position_ids", "inv_freq")
# Whole CLIPs hold the tower under this name, and so did towers before transformers 5.
_INNER = "vision_model."


def tower_folder(trunk: str) -> Path | None:
    """The folder that a trunk `mlcd:FOLDER` names; None for a timm model."""
    return Path(trunk.removeprefix(PREFIX)) if trunk.startswith(PREFIX) else None


def read_tower_config(folder: Path) -> dict[str, Any]:
    """All that a tower without weights is built from, ready for JSON: `model_type` and FIELDS, defaults filled in.

    Raises:
        UsageError: there is no such folder, or what it holds is neither a `CLIPVisionModel` nor an `MLCDVisionModel`.
        DataError: its config.json is missing or broken, or says what no tower is.
        EnvironmentError_: transformers is missing.
    """
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}",
            f"{PREFIX}FOLDER, where FOLDER holds config.json and {WEIGHTS}; nothing is downloaded",
            f"hf download DeepGlint-AI/mlcd-vit-base-patch32-224 --local-dir {folder}",
        )
    file = folder / "config.json"
    found = _read_json(file)
    named = found.get("model_type", (found.get("architectures") or [None])[0])
    if named not in KINDS:
        raise UsageError(
            f"{file} is of a model {named!r}",
            f"a vision tower: {', '.join(KINDS)}",
            "for other models name one of timm's as trunk",
        )
    kind, own = KINDS[named], found.get("vision_config", found)
    if not isinstance(own, dict):
        raise DataError(f"{file} has vision_config {own!r}", "what `save_pretrained` wrote")
    return _completed(kind, {name: own[name] for name in FIELDS if name in own}, file)


def _completed(kind: str, given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = getattr(transformers_library(), CLASSES[kind][0])(**given)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"{file}: {' '.join(str(error).split())}", "what `save_pretrained` wrote") from error
    fields = {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}
    for side in ("image_size", "patch_size"):
        sides = set(fields[side]) if isinstance(fields[side], list | tuple) else {fields[side]}
        if len(sides) != 1 or not all(isinstance(s, int) and s > 0 for s in sides):
            raise DataError(f"{file} has {side} {fields[side]}", "one number: squares")
        fields[side] = sides.pop()
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    # Rotary positions turn pairs, half of them by row and half by column.
    parts = 4 * heads if kind == "mlcd_vision_model" else heads
    if width < 1 or heads < 1 or width % parts:
        raise DataError(
            f"{file} has hidden_size {width} and num_attention_heads {heads}", "heads of equal, whole width"
        )
    if fields["num_channels"] != 3:
        raise DataError(f"{file} has num_channels {fields['num_channels']}", "3: RGB images")
    return {"model_type": kind, **fields}


def read_tower_normalisation(folder: Path) -> tuple[Rgb, Rgb]:
    """Mean and deviation of RGB values in 0..1 that the tower was trained with.

    From preprocessor_config.json; where a folder holds the tower alone, CLIP's, which all MLCD towers have.

    Raises:
        DataError: the file is broken.
    """
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return CLIP_MEAN, CLIP_STD
    found = _read_json(file)
    mean, std = (found.get(name, []) for name in ("image_mean", "image_std"))
    if not _are_three(mean) or not _are_three(std) or min(std) <= 0:
        raise DataError(
            f"{file} has image_mean {mean} and image_std {std}", "three numbers each, deviations above 0"
        )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _are_three(values: object) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, float | int) for v in values)


def tower_tensors(folder: Path, parts: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Names, as a tower has them, and values of what belongs to its `parts`."""
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for full in opened.keys():
                    name = full.removeprefix(_INNER)
                    if name.split(".")[0] in parts and not name.endswith(_CONSTANTS):
                        yield name, opened.get_tensor(full)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"cannot read {file}: {error}", "a whole safetensors file", "download it again"
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / SHARDS).exists():
        shards = _read_json(folder / SHARDS).get("weight_map", {})
        # Only the name: an index has no business outside of its folder.
        return sorted({folder / Path(name).name for name in shards.values()})
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise DataError(
            f"{folder} holds its weights as a pickle, {pickles[0]}, which runs whatever code it brings when it is read",
            f"{WEIGHTS}",
            "where you trust the file, load it with transformers and `save_pretrained` it again",
        )
    raise DataError(
        f"{folder} holds no weights", f"{WEIGHTS} beside config.json", "download the whole folder"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {file}: {error}",
            "the folder of a model that transformers saved",
            "download it again",
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds a {type(found).__name__}", "a JSON object", "download it again")
    return found


def transformers_library() -> Any:
    """The package `transformers`.

    Raises:
        EnvironmentError_: it is missing.
    """
    # Not above: it takes a second to import, and few trunks need it.
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentError_(
            f"a vision tower needs transformers: {error}",
            "cliplet with training",
            "pip install 'cliplet[train]'",
        ) from error
    return transformers

"""Facts about the folder of a trained classifier or trunk, read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cliplet.checkpoint import load_details
from cliplet.errors import ArtifactError
from cliplet.model_spec import CLASSIFIER_STEM, TRUNK_STEM, file_sha256
from cliplet.thresholds import THRESHOLDS_FILE
from cliplet.vocabulary import Vocabulary

from .facts import Facts, class_facts, constant_facts, read_json, threshold_facts, understood

# Names of safetensors, where they are not numpy's. The others are a letter and a number of bits.
_TYPES = {"BF16": "bfloat16", "BOOL": "bool"}
_KINDS = {"F": "float", "I": "int", "U": "uint"}
# Told in other words, or of no use to a reader.
_TOLD = ("schema", "kind", "arrays", "sha256", "config", "vocabulary")
_FIX = "train again, or copy the whole folder again"


def classifier_facts(folder: Path) -> Facts:
    """What a classifier is, what it was trained with, and whether its weights are those that were written.

    Numbers that belong to normalisation, such as running means, count as parameters.

    Raises:
        ArtifactError: its description or its weights cannot be read.
    """
    file = folder / f"{CLASSIFIER_STEM}.json"
    with understood(file, "a classifier that `cliplet train` wrote", _FIX):
        details = load_details(folder, CLASSIFIER_STEM)
        vocabulary = Vocabulary.from_json(details["vocabulary"], str(file))
        labels = {**class_facts(vocabulary), "thresholds": _thresholds(folder, vocabulary)}
        return _facts(folder, details, labels)


def trunk_facts(folder: Path) -> Facts:
    """The same of a trunk, which has no classes."""
    with understood(folder / f"{TRUNK_STEM}.json", "a trunk that `cliplet train mlcd` wrote", _FIX):
        return _facts(folder, load_details(folder, TRUNK_STEM), {})


def _facts(folder: Path, details: Facts, labels: Facts) -> Facts:
    weights = folder / details["arrays"]
    constants = list(_constants(weights))
    matches = file_sha256(weights) == details["sha256"]
    return {
        "intact": matches,
        "damage": [] if matches else [f"{weights.name} has changed since it was written"],
        **details["config"],
        **labels,
        "weights": {
            "file": weights.name,
            "bytes": weights.stat().st_size,
            "sha256": details["sha256"],
            "matches_sha256": matches,
        },
        **constant_facts(constants),
        **{name: value for name, value in details.items() if name not in _TOLD},
    }


def _constants(weights: Path) -> Iterator[tuple[str, str, list[int], int]]:
    """Name, type, shape and bytes of each array, from the header alone."""
    if not weights.is_file():
        raise ArtifactError(f"{weights} is missing", "the weights beside their description", _FIX)
    try:
        with safe_open(weights, "np") as arrays:
            for name in arrays.keys():
                part = arrays.get_slice(name)
                kind, shape = part.get_dtype(), part.get_shape()
                yield name, _type(kind), shape, _bytes(kind, shape)
    except SafetensorError as error:
        raise ArtifactError(
            f"{weights} is cut short or damaged: {error}", "a whole safetensors file", _FIX
        ) from error


def _type(kind: str) -> str:
    return _TYPES.get(kind) or f"{_KINDS[kind[0]]}{kind[1:]}".lower()


def _bytes(kind: str, shape: list[int]) -> int:
    bits = int("".join(c for c in kind.partition("_")[0] if c.isdigit()) or 8)
    count = bits
    for side in shape:
        count *= side
    return count // 8


def _thresholds(folder: Path, vocabulary: Vocabulary) -> Facts:
    file = folder / THRESHOLDS_FILE
    if not file.is_file():
        return {}
    entry = read_json(file, "a file of thresholds", "cliplet calibrate MODEL writes it anew")
    return threshold_facts(entry, vocabulary.names, str(file))

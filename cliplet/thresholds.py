"""The score of each class from which on it is a label, and how that was found: `thresholds.json` and its like.

    {"values": {"cat": 0.31, "dog": 0.44}, "how": "…"}     one for each class
    {"value": 0.3, "how": "…"}                             one for all

Such an entry stands by itself in a classifier's `thresholds.json`, and under the name of a way to look (`1`,
`1+3x3`, …) in the `thresholds.json` of a CLIP folder and in a bundle's manifest.

Legend: C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliplet.errors import ArtifactError

THRESHOLDS_FILE = "thresholds.json"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds [C] in the order of a vocabulary, and one line that says where they come from."""

    values: tuple[float, ...]
    source: str

    @classmethod
    def same(cls, value: float, names: Sequence[str], source: str) -> Thresholds:
        """One value for all classes."""
        return cls((value,) * len(names), f"{value}, {source}")


def thresholds_from_json(entry: Mapping[str, Any], names: Sequence[str], where: str) -> Thresholds:
    """The thresholds of the classes `names` that an entry holds.

    Args:
        where: what holds the entry, for error messages.

    Raises:
        ArtifactError: it is no such entry, a threshold is not within 0..1, or it is of other classes.
    """
    values = entry.get("values", entry.get("value")) if isinstance(entry, Mapping) else None
    if not isinstance(values, Mapping):
        _hold_threshold(values, where)
        return Thresholds.same(float(values), names, _how(entry))
    for value in values.values():
        _hold_threshold(value, where)
    by_name = {name.casefold(): float(value) for name, value in values.items()}
    differing = sorted(by_name.keys() ^ {name.casefold() for name in names})
    if differing:
        raise ArtifactError(
            f"{where} holds thresholds of other classes: {', '.join(map(repr, differing[:8]))} "
            f"{'stand' if len(differing) > 1 else 'stands'} on one side only",
            f"a threshold for each of the {len(names)} classes and no other",
            "cliplet calibrate MODEL finds them anew",
        )
    found = tuple(by_name[name.casefold()] for name in names)
    return Thresholds(found, f"{min(found):.3g} to {max(found):.3g} by class, {_how(entry)}")


def read_entries(file: Path) -> dict[str, Any]:
    """What a file of thresholds holds: one entry, or one under the name of each way to look.

    Raises:
        ArtifactError: the file cannot be read, or is no JSON object.
    """
    expected, fix = "a file of thresholds: a JSON object", "cliplet calibrate MODEL writes one"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {file}: {error}", expected, fix) from error
    if not isinstance(entries, dict):
        raise ArtifactError(f"{file} holds {json.dumps(entries)[:80]}", expected, fix)
    return entries


def read_thresholds(file: Path, names: Sequence[str]) -> Thresholds:
    """The thresholds of the classes `names` in a file with one entry.

    Raises:
        ArtifactError: see `read_entries` and `thresholds_from_json`.
    """
    return thresholds_from_json(read_entries(file), names, str(file))


def _how(entry: Mapping[str, Any]) -> str:
    return f"calibrated with the model: {entry.get('how', 'it does not say how')}"


def _hold_threshold(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ArtifactError(
            f"{where} holds {json.dumps(value, default=str)} for a threshold",
            'numbers between 0 and 1: {"value": 0.3} or {"values": {"cat": 0.3, …}}, with "how"',
            "cliplet calibrate MODEL writes it anew",
        )

"""What chapters say alike: the spread of rounds, whether an aim is met, and marks of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shown = Callable[[float], str]


def spread_of(values: Mapping[str, Any], shown: Shown) -> str:
    """The least to the most of the rounds; a dash of a single round, which has no spread."""
    return f"{shown(values['min'])} to {shown(values['max'])}" if len(values["all"]) > 1 else "–"


def in_brackets(values: Mapping[str, Any], shown: Shown) -> str:
    """The same behind a number in a sentence; nothing of a single round."""
    return f" ({spread_of(values, shown)})" if len(values["all"]) > 1 else ""


def verdict(values: Mapping[str, Any], aim: float, shown: Shown) -> str:
    """Whether rounds reach an aim: all of them, the only one, or the median alone."""
    if values["median"] < aim:
        return "missed"
    if len(values["all"]) == 1:
        return "met, in the only round"
    if values["min"] >= aim:
        return "met in every round"
    return f"met by the median, not by the lowest, {shown(values['min'])}"


def marks_of(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each row with what has to be known beside its numbers, and an empty one below; none without marks."""
    lines = [f"- {name}: {'; '.join(row['marks'])}" for name, row in rows.items() if row.get("marks")]
    return [*lines, ""] if lines else []

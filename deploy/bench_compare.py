"""What changed since an earlier record: paired differences with their uncertainty; and objectives held or missed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.errors import DataError, ObjectiveError
from cliplet.record import read_record

from .bench_rows import DOING, gives_of
from .bench_summary import NAME

RESAMPLES = 4000
CONFIDENCE = 0.95
# With fewer rounds than this on a side, resampling knows too little: its intervals are too narrow.
ENOUGH_ROUNDS = 5
QUANTITIES = ("images_per_s", "engine_images_per_s")


@dataclass(frozen=True)
class Difference:
    """How one quantity of one row differs from an earlier record.

    Attributes:
        ratio: new median / old median.
        low, high: the ratio's interval at CONFIDENCE, by a bootstrap over rounds.
        rounds: the smaller number of rounds of the two.
    """

    row: str
    quantity: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> str:
        """Whether it is a difference at all, in words."""
        if self.rounds < 2:
            return "one round: no telling"
        if self.low <= 1 <= self.high:
            return "within noise"
        return "faster" if self.ratio > 1 else "slower"


@dataclass(frozen=True)
class Comparison:
    """All differences, and what a reader has to know of them."""

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def earlier_record(file: Path) -> dict[str, Any]:
    """A record that a new one can be compared with.

    Raises:
        DataError: it cannot be read, or its rows are not what `cliplet bench` writes.
    """
    found = read_record(file, NAME)
    rows = found.get("rows")
    if not isinstance(rows, dict) or not all(_has_rounds(row) for row in rows.values()):
        raise DataError(
            f"{file} cannot be compared with: "
            + ("a row of it has no rounds" if isinstance(rows, dict) else "it has no rows"),
            "a whole record",
            "write one with: cliplet bench … --out FOLDER",
        )
    return found


def _has_rounds(row: object) -> bool:
    """Whether a row was not measured, or holds the rounds of what is compared."""
    if not isinstance(row, dict):
        return False
    measured = [row[quantity] for quantity in QUANTITIES if quantity in row]
    return all(
        isinstance(values, dict)
        and isinstance(values.get("all"), list)
        and values["all"]
        and all(isinstance(value, int | float) and value > 0 for value in values["all"])
        for values in measured
    )


def hold_comparable(names: Collection[str], old: Mapping[str, Any]) -> None:
    """Raise if an earlier record has measured none of these rows.

    Raises:
        DataError: it has not.
    """
    before = [name for name, row in old["rows"].items() if any(quantity in row for quantity in QUANTITIES)]
    if not set(names) & set(before):
        raise DataError(
            f"no row can be compared: the earlier record measured {', '.join(before) or 'none'}",
            f"one of {', '.join(names)}",
            "compare with a record of the same models, engines and batches",
        )


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> Comparison:
    """The rows that both records measured, paired by name; a note where there are none."""
    found = []
    for name, row in new["rows"].items():
        before = old["rows"].get(name, {})
        for quantity in QUANTITIES:
            if quantity in row and quantity in before:
                what = DOING[gives_of(row)] if quantity == "images_per_s" else "the engine alone"
                found.append(_difference(name, what, row[quantity]["all"], before[quantity]["all"]))
    return Comparison(tuple(found), tuple(_notes(new, old, found)))


def bootstrap_ratio(
    new: Sequence[float], old: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of median(new) / median(old): percentiles over resampled rounds (Efron 1979).

    Each side is resampled by itself: the rounds of two runs did not happen together.
    """
    generator = np.random.default_rng(0)
    ratios = _resampled_medians(new, generator) / _resampled_medians(old, generator)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


def hold_objectives(
    made: Mapping[str, Any],
    slo_p99_ms: float | None,
    min_throughput: float | None,
    max_error_rate: float | None,
) -> None:
    """Raise if a row misses an objective; a row that could not be measured misses each.

    Args:
        slo_p99_ms: the 99th percentile of the engine's latency of a batch.
        min_throughput: images a second of labelling or embedding, median of the rounds.
        max_error_rate: share of images that failed.

    Raises:
        ObjectiveError: with every row that misses one.
    """
    asked = {
        "p99 at most {:g} ms": slo_p99_ms,
        "at least {:g} images/s": min_throughput,
        "at most {:.1%} failed": max_error_rate,
    }
    wanted = ", ".join(text.format(value) for text, value in asked.items() if value is not None)
    if not wanted:
        return
    missed = []
    for name, row in made["rows"].items():
        if "images_per_s" not in row:
            missed.append(f"{name}: not measured: {row['why']}")
            continue
        p99, rate, errors = row["latency_ms"]["p99"], row["images_per_s"]["median"], row["error_rate"]
        if slo_p99_ms is not None and p99 > slo_p99_ms:
            missed.append(f"{name}: p99 {p99:.2f} ms")
        if min_throughput is not None and rate < min_throughput:
            missed.append(f"{name}: {rate:.2f} images/s")
        if max_error_rate is not None and errors > max_error_rate:
            missed.append(f"{name}: {errors:.1%} failed")
    if missed:
        raise ObjectiveError(
            "; ".join(missed), wanted, "the table says which phase takes the time, and what a row lacks"
        )


def _difference(name: str, what: str, new: Sequence[float], old: Sequence[float]) -> Difference:
    middle_new, middle_old = float(np.median(new)), float(np.median(old))
    low, high = bootstrap_ratio(new, old)
    rounds = min(len(new), len(old))
    return Difference(name, what, middle_old, middle_new, middle_new / middle_old, low, high, rounds)


def _resampled_medians(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    chosen = generator.integers(0, len(values), (RESAMPLES, len(values)))
    return np.median(np.asarray(values, np.float64)[chosen], axis=1)


def _notes(new: Mapping[str, Any], old: Mapping[str, Any], found: Sequence[Difference]) -> list[str]:
    notes = []
    for what in ("machine", "images", "seconds", "threads"):
        if new.get(what) != old.get(what):
            notes.append(f"the two differ in more than speed: {what} was {old.get(what)}, is {new.get(what)}")
    for name, row in new["rows"].items():
        before = old["rows"].get(name, {})
        if row.get("views") != before.get("views", row.get("views")):
            notes.append(f"{name}: views were {before['views']}, are {row['views']}")
    lost = [name for name in old["rows"] if name not in new["rows"]]
    if lost:
        notes.append(f"only in the earlier record: {', '.join(lost)}")
    if not found:
        notes.append("no row was measured in both records")
    elif min(d.rounds for d in found) < ENOUGH_ROUNDS:
        notes.append(
            f"fewer than {ENOUGH_ROUNDS} rounds: the intervals are too narrow; pass --rounds {ENOUGH_ROUNDS}"
        )
    return notes

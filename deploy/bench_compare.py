"""What changed since an earlier record: paired differences with their uncertainty; and objectives held or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cliplet.errors import DataError, ObjectiveError

from .bench_rows import DOING, gives_of

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


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> Comparison:
    """The rows that both records measured, paired by name.

    Raises:
        DataError: there are none.
    """
    found = []
    for name, row in new["rows"].items():
        before = old["rows"].get(name, {})
        for quantity in QUANTITIES:
            if quantity in row and quantity in before:
                what = DOING[gives_of(row)] if quantity == "images_per_s" else "the engine alone"
                found.append(_difference(name, what, row[quantity]["all"], before[quantity]["all"]))
    if not found:
        raise DataError(
            f"no row of the two records has the same name: {', '.join(old['rows'])} before",
            f"one of {', '.join(new['rows'])}",
            "compare with a record of the same models, engines and batches",
        )
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
    """Raise if a row that was measured misses an objective.

    Args:
        slo_p99_ms: the 99th percentile of the engine's latency of a batch.
        min_throughput: images a second of labelling or embedding, median of the rounds.
        max_error_rate: share of images that failed.

    Raises:
        ObjectiveError: with every row that misses one.
    """
    missed = []
    for name, row in made["rows"].items():
        if "images_per_s" not in row:
            continue
        p99, rate, errors = row["latency_ms"]["p99"], row["images_per_s"]["median"], row["error_rate"]
        if slo_p99_ms is not None and p99 > slo_p99_ms:
            missed.append(f"{name}: p99 {p99:.2f} ms")
        if min_throughput is not None and rate < min_throughput:
            missed.append(f"{name}: {rate:.2f} images/s")
        if max_error_rate is not None and errors > max_error_rate:
            missed.append(f"{name}: {errors:.1%} failed")
    if missed:
        asked = {
            "p99 at most {:g} ms": slo_p99_ms,
            "at least {:g} images/s": min_throughput,
            "at most {:.1%} failed": max_error_rate,
        }
        wanted = ", ".join(text.format(value) for text, value in asked.items() if value is not None)
        raise ObjectiveError("; ".join(missed), wanted, "the table says which phase takes the time")


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
    if min(d.rounds for d in found) < ENOUGH_ROUNDS:
        notes.append(
            f"fewer than {ENOUGH_ROUNDS} rounds: the intervals are too narrow; pass --rounds {ENOUGH_ROUNDS}"
        )
    return notes

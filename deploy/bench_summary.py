"""The record of a benchmark: every row with its rounds, its shares of the limits, its verdict and its marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from cliplet.record import record, spread

from .bench import BenchResult, ideal_rate
from .bench_limits import lowest_precision, roofline
from .bench_rows import DOING, ORIGINAL, Row

NAME = "bench"
PHASES = ("read", "decode", "canvas", "to_device", "engine", "record+write")
PERCENTILES = (50, 90, 95, 99)
# From these shares on a row says that its rounds, or the parts of a round, differ.
SPREAD, DRIFT = 0.1, 0.1
# With fewer latencies, the 99th percentile is little more than the largest.
FEW_BATCHES = 100
MB = 1e6


def bench_record(result: BenchResult, command: str) -> dict[str, Any]:
    """All that was found, as `bench.json` holds it; rows by name, those that were not measured with `why`."""
    job = result.job
    work = {row.settings.model: row.phases[0]["work"] for row in reversed(result.rows) if _counted(row)}
    rows: dict[str, dict[str, Any]] = {}
    first: dict[str, Row] = {}
    for row in result.rows:
        base = first.setdefault(row.settings.model, row) if row.phases else row
        rows[row.name] = _row(result, row, work.get(row.settings.model), base)
    return record(
        NAME,
        command,
        {
            "what": f"images a second of {_doings(result)}, each phase alone and all together",
            "model": ", ".join(dict.fromkeys(row.model for row in result.rows)),
            "images": result.images,
            "rounds": job.rounds,
            "seconds": job.seconds,
            "device": job.device,
            "threads": job.threads,
            "limits": result.limits,
            "interrupted": result.interrupted,
            "rows": rows,
        },
    )


def _doings(result: BenchResult) -> str:
    """What was done to images, in words."""
    given = {row.gives for row in result.rows}
    return " and ".join(doing for gives, doing in DOING.items() if gives in given)


def _counted(row: Row) -> bool:
    return bool(row.phases and row.phases[0]["work"])


def _row(result: BenchResult, row: Row, work: Mapping[str, float] | None, first: Row) -> dict[str, Any]:
    asked = {
        "model": row.model,
        "engine": row.engine,
        "runtime": row.runtime,
        "precision": row.precision,
        "batch": row.batch_size,
        "gives": row.gives,
    }
    if not row.phases:
        return {**asked, "why": row.why or "interrupted before its first round", "fix": row.fix}
    facts, parity = row.phases[0]["facts"], row.phases[0]["parity"]
    views = facts["views"]
    alone = [1 / p["seconds_per_image"]["engine"] for p in row.phases]
    together = [w["images_per_s"] for w in row.wholes]
    ideal = [ideal_rate(p, result.job.threads) for p in row.phases]
    latencies = np.concatenate([p["engine"]["latencies_s"] for p in row.phases])
    summary = {
        **asked,
        "streams": None if row.is_served else row.streams,
        **{"batch": facts["batch"], "views": row.phases[0]["views_shown"], "views_per_image": views},
        "classes": facts["classes"],
        "embedding_width": facts.get("embedding_width"),
        "canvas": facts["canvas"],
        "runtime_read": facts["runtime"],
        "device_read": facts["device"],
        "precision_read": facts["precision"],
        "parity": parity,
        "verdict": _verdict(parity),
        "images_per_s": spread(together),
        "engine_images_per_s": spread(alone),
        "views_per_s": spread([views * rate for rate in alone]),
        "latency_ms": {
            **{f"p{p}": 1000 * float(np.percentile(latencies, p)) for p in PERCENTILES},
            "batches": len(latencies),
        },
        "phases_ms_per_image": {name: _phase(row, name) for name in PHASES},
        "core_ms_per_image": 1000 * median(p["engine"]["core_seconds_per_image"] for p in row.phases),
        "ideal_images_per_s": spread(ideal),
        "share_of_ideal": spread([t / i for t, i in zip(together, ideal, strict=True)]),
        "share_of_engine": spread([t / a for t, a in zip(together, alone, strict=True)]),
        "load_s": spread([p["facts"]["load_s"] for p in row.phases]),
        "peak_mb": spread([(w["peak_bytes"] or 0) / MB for w in row.wholes]),
        "engine_peak_mb": spread([(p["peak_bytes"] or 0) / MB for p in row.phases]),
        "device_mb": _largest([p["device_bytes"] for p in row.phases], MB),
        "joules_per_image": _middle([p["engine"]["joules_per_image"] for p in row.phases]),
        "load_by_others": _others(row),
        "error_rate": _error_rate(row),
        "rounds": len(row.phases),
        "work": work,
        "limit": None,
        "share_of_limit": None,
        "ratio_to_first": spread(_ratios(row, first)),
        "why": row.why,
    }
    if work and not row.is_served and result.limits:
        limit = roofline(work, result.limits, lowest_precision(facts["precision"]), views * facts["batch"])
        if limit:
            summary["limit"] = limit
            summary["share_of_limit"] = summary["views_per_s"]["median"] / limit["views_per_s"]
    return {**summary, "marks": _marks(row, summary)}


def _verdict(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "none"
    if not parity.get("passed"):
        return "differs"
    if parity.get("against") == ORIGINAL:
        return "original"
    # An engine for a GPU that was not there: the graph that it was built from was compared.
    return "source equal" if "of" in parity else "equal"


def _phase(row: Row, name: str) -> dict[str, Any] | None:
    found = [p["seconds_per_image"][name] for p in row.phases]
    return None if None in found else spread([1000 * seconds for seconds in found])


def _ratios(row: Row, first: Row) -> list[float]:
    """How many times as fast as the first row of the same model, round by round."""
    pairs = zip(row.wholes, first.wholes, strict=False)
    return [own["images_per_s"] / other["images_per_s"] for own, other in pairs]


def _others(row: Row) -> dict[str, Any] | None:
    """Cores that others took, in each round at worst; None where the system does not tell."""
    found = [
        max(p["engine"]["load"]["taken"], w["load"]["taken"])
        for p, w in zip(row.phases, row.wholes, strict=True)
        if p["engine"]["load"]["taken"] is not None
    ]
    return spread(found) if found else None


def _error_rate(row: Row) -> float:
    """Share of the images that failed; a round that broke counts as one whose images all failed."""
    inputs, failed = sum(w["inputs"] for w in row.wholes), sum(w["failed"] for w in row.wholes)
    lost = row.broken * inputs / len(row.wholes)
    return (failed + lost) / (inputs + lost)


def _marks(row: Row, summary: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before trusting a row's numbers."""
    marks = []
    if summary["verdict"] in ("none", "differs"):
        marks.append(f"unverified: {'no verdict' if summary['parity'] is None else 'it disagrees'}")
    disturbed = [
        number
        for number, (p, w) in enumerate(zip(row.phases, row.wholes, strict=True), start=1)
        if p["engine"]["load"]["disturbed"] or w["load"]["disturbed"]
    ]
    # A server on this machine is no disturbance but what is measured.
    if disturbed and not row.is_served:
        most = summary["load_by_others"]["max"]
        rounds = ", ".join(map(str, disturbed))
        marks.append(f"machine under load: others took up to {most:.1f} cores (round {rounds})")
    for name, what in (("images_per_s", DOING[row.gives]), ("engine_images_per_s", "the engine")):
        relative = _relative(summary[name])
        if relative > SPREAD:
            marks.append(f"rounds of {what} differ by {relative:.0%}")
    if summary["latency_ms"]["batches"] < FEW_BATCHES:
        marks.append(f"p99 of only {summary['latency_ms']['batches']} batches")
    if any(not p["engine"]["warm_up"]["stable"] for p in row.phases):
        marks.append("not stable after its warm-up")
    if (summary["share_of_limit"] or 0) > 1:
        marks.append(
            "beyond the machine's limits: they were measured too low, or the engine does with less arithmetic"
        )
    drift = max(
        abs(p["engine"]["parts_images_per_s"][-1] / p["engine"]["parts_images_per_s"][0] - 1)
        for p in row.phases
    )
    if drift > DRIFT:
        marks.append(f"the engine's speed drifted by {drift:.0%} within a round")
    marks += list(dict.fromkeys(note for p in row.phases for note in p["notes"]))
    marks += row.notes
    if row.why:
        marks.append(f"stopped after round {len(row.phases)}: {row.why}")
    return marks


def _relative(values: Mapping[str, Any]) -> float:
    return float((values["max"] - values["min"]) / values["median"])


def _largest(values: Sequence[float | None], unit: float) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) / unit if known else None


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None

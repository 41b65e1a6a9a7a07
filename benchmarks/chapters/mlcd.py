"""The chapter about trunks that learn from a collection without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.mlcd_compare import LEARNED, NOTHING, UNTRAINED

COLUMNS = {
    "linear": "linear probe, mAP",
    "linear_11_point": "11-point mAP",
    "knn": "best k-NN, mAP",
    "retrieval": "retrieval, mAP@R",
}


def chapter(record: dict[str, Any]) -> str:
    """Every way to learn and its settings, then the CCD students that start from each beginning."""
    lines = [
        f"{record['epochs']} epochs in batches of {record['batch']}, {record['seeds']} seeds; mean ± deviation. "
        f"Where a row does not say otherwise: {_settings(record['base'])}.\n",
        f"| | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in record["rows"].items():
        lines.append(f"| {name} | {' | '.join(_shown(row[key]) for key in COLUMNS)} |")
    if record["students"]:
        lines += ["", "| CCD student | mAP |", "|---|---|"]
        lines += [f"| {start} | {_shown(found)} |" for start, found in record["students"].items()]
    return "\n".join([*lines, "", " ".join(_reading(record))])


def _settings(base: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in base.items())


def _shown(found: Mapping[str, Any]) -> str:
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.1f}"
    return f"{found['mean']:.1f}{deviation}"


def _reading(record: dict[str, Any]) -> Iterator[str]:
    means = {name: row["linear"]["mean"] for name, row in record["rows"].items()}
    best = max(means, key=lambda name: means[name])
    yield f"By the linear probe, {best} is the best with {means[best]:.1f}; {UNTRAINED} have {means[UNTRAINED]:.1f}."
    rivals = [name for name in ("MLCD", "MLC", "UNICOM-style") if name in means]
    order = " > ".join(sorted(rivals, key=lambda name: -means[name]))
    yield f"The order here is {order}; the paper's is MLCD > MLC, and MLCD > UNICOM."
    students = {start: found["mean"] for start, found in record["students"].items()}
    if {LEARNED, NOTHING} <= students.keys():
        gain = students[LEARNED] - students[NOTHING]
        yield f"A CCD student that starts from MLCD has {gain:+.1f} mAP over one that starts from nothing."

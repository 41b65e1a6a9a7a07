"""The chapter about training without labels."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from cliplet.train.compare import markdown


def chapter(record: dict[str, Any]) -> str:
    """Every method and every part of CCD, beside the paper's numbers."""
    return f"{markdown(record)}\n{_reading(record)}"


def _reading(record: dict[str, Any]) -> str:
    rows = {name: row for name, row in record["rows"].items() if row["map"] is not None}
    whole, *views = record["teacher"].values()
    reported = [row for row in rows.values() if row["reported"] is not None]
    # Pairs that the paper tells apart: a tie there has no order to keep.
    pairs = [(a, b) for a, b in combinations(reported, 2) if a["reported"] != b["reported"]]
    kept = sum((a["map"]["mean"] - b["map"]["mean"]) * (a["reported"] - b["reported"]) > 0 for a, b in pairs)
    zero_shot = f"{whole:.1f} with the whole image" + (f", {views[-1]:.1f} with its views" if views else "")
    return (
        f"CCD reaches {rows['ccd']['map']['mean']:.1f} without a label; its teacher, zero-shot, {zero_shot}. Of the "
        f"{len(pairs)} pairs of rows that the paper orders, {kept} come out in the same order on these scenes."
    )

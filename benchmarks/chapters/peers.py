"""The chapter about cliplet beside other ways to score images."""

from __future__ import annotations

from collections.abc import Mapping
from operator import truediv
from statistics import median
from typing import Any

from benchmarks.chapters.telling import in_brackets, spread_of
from benchmarks.peers import CLIPLET, LOOP

Rows = Mapping[str, Mapping[str, Any]]


def chapter(record: dict[str, Any]) -> str:
    """A table for each number of views, who could not be measured, and who is fastest by how much."""
    lines = [
        f"From files to scores, decoding included. One view takes {record['gflop_per_view']:.1f} GFLOP; `of the peak` is "
        "that arithmetic against the products of matrices that this machine reaches in the precision that was read. "
        "Ratios are against the loop of the same round; memory is that of all processes of a contender.\n"
    ]
    for views, rows in record["rows"].items():
        counts = {row["images"] for row in rows.values()}
        lines += [
            f"**Views `{views}`**, {' or '.join(map(str, sorted(counts)))} images in a round\n",
            "| | images/s | spread | views/s | ratio to the loop | spread | of the peak | precision read | peak memory |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(name, row) for name, row in rows.items()),
            "",
        ]
    lines += _remarks(record)
    return "\n".join([*lines, *(_reading(views, rows) for views, rows in record["rows"].items())])


def _row(name: str, row: Mapping[str, Any]) -> str:
    rate, ratio, share = row["images_per_s"], row["ratio_to_loop"], row["share_of_peak"]
    return (
        f"| {name} | {rate['median']:.2f} | {spread_of(rate, _two_places)} | {row['views_per_s']['median']:.1f} | "
        f"**{ratio['median']:.2f}** | {spread_of(ratio, _two_places)} | {'' if share is None else f'{share:.0%}'} | "
        f"{row['precision_read']} | {row['peak_mb']['median']:.0f} MB |"
    )


def _two_places(value: float) -> str:
    return f"{value:.2f}"


def _remarks(record: Mapping[str, Any]) -> list[str]:
    """What a contender does otherwise, which were disturbed, and which are missing, a line each."""
    lines = []
    noted = {name: row for rows in record["rows"].values() for name, row in rows.items() if "note" in row}
    for name, row in noted.items():
        versions = ", ".join(f"{package} {version}" for package, version in row.get("versions", {}).items())
        lines.append(f"- {name}: {row['note']}{f' ({versions})' if versions else ''}")
    for views, rows in record["rows"].items():
        disturbed = [name for name, row in rows.items() if row["disturbed_rounds"]]
        if disturbed:
            lines.append(f"- views `{views}`: other processes disturbed {', '.join(disturbed)}")
    lines += [f"- {name}: not measured, {why}" for name, why in record["skipped"].items()]
    return [*lines, ""] if lines else []


def _reading(views: str, rows: Rows) -> str:
    best = _fastest(rows)
    if best == LOOP:
        return f"Views `{views}`: nothing is faster than the {LOOP}.{_room(rows[best])}\n"
    told = f"Views `{views}`: {best} is the fastest, {_times(rows[best])} the loop"
    if best in CLIPLET:
        other = _fastest({name: row for name, row in rows.items() if name not in CLIPLET})
        ratio = median(map(truediv, *(rows[name]["images_per_s"]["all"] for name in (best, other))))
        told += f" and {ratio:.2f} times the best that is not cliplet's ({other})"
    told += f".{_room(rows[best])}"
    usual = rows[LOOP]["precision_read"]
    own = {name: row for name, row in rows.items() if name in CLIPLET and row["precision_read"] == usual}
    if own and best not in own:
        fair = _fastest(own)
        told += f" In {usual}, as the loop computes, {fair} does {_times(rows[fair])} the loop.{_room(rows[fair])}"
    return told + "\n"


def _fastest(rows: Rows) -> str:
    return max(rows, key=lambda name: rows[name]["images_per_s"]["median"])


def _times(row: Mapping[str, Any]) -> str:
    ratio = row["ratio_to_loop"]
    return f"{ratio['median']:.2f} times{in_brackets(ratio, _two_places)}"


def _room(row: Mapping[str, Any]) -> str:
    """How near the machine's limit it is, and what that leaves."""
    share = row["share_of_peak"]
    if share is None:
        return ""
    if share >= 1:
        return " That is all the arithmetic that the machine showed in the same run: no room is left."
    return f" That is {share:.0%} of the peak: nothing in {row['precision_read']} can be more than {1 / share:.2f} times as fast."

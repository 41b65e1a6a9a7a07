"""The chapter about what clusters cost against their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.chapters.telling import spread_of


def chapter(record: dict[str, Any]) -> str:
    """K-means, then the loss alone, then training with it; each against the number of clusters."""
    rows = record["rows"]
    lines = [
        f"Median of {record['rounds']} rounds. K-means, an iteration, and the nearest "
        f"{record['positives']} centres of every row:\n",
        "| clusters | rows in k-means | s an iteration | rows/s | assigned rows/s | found of the nearest | peak MB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows["clusters"]:
        cells = [
            f"{row['clusters']:,}",
            f"{_of(row, 'sample'):,.0f}",
            f"{_of(row, 'iteration_s'):.2f}",
            f"{_of(row, 'rows_per_s'):,.0f}",
            f"{_of(row, 'assigned_per_s'):,.0f}",
            f"{_of(row, 'recall'):.1%}",
            f"{_of(row, 'peak_mb'):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"A step of the loss alone (batches of {record['batch']}, loss, gradients and AdamW):\n",
        "| clusters | negatives drawn | s a step | of the full loss | memory grew by, MB | stated at most, MB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    full = {row["clusters"]: _of(row, "step_s") for row in rows["loss"] if row["rate"] == 1}
    for row in rows["loss"]:
        cells = [
            f"{row['clusters']:,}",
            f"{row['rate']:.0%}",
            f"{_of(row, 'step_s'):.4f}",
            f"{_of(row, 'step_s') / full[row['clusters']]:.2f}",
            f"{_of(row, 'grown_mb'):,.0f}",
            f"{_of(row, 'stated_mb'):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    precision = rows["training"][0]["precision"]
    lines += [
        "",
        f"An epoch of training the trunk in {precision}, from files to weights:\n",
        "| clusters | negatives drawn | images/s | least to most | peak MB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows["training"]:
        rate = row["images_per_s"]
        cells = [
            f"{row['clusters']:,}",
            f"{row['rate']:.0%}",
            f"{rate['median']:.1f}",
            spread_of(rate, "{:.1f}".format),
            f"{_of(row, 'peak_mb'):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", " ".join(_reading(rows))])


def _of(row: Mapping[str, Any], key: str) -> float:
    return float(row[key]["median"])


def _reading(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    least, most = rows["clusters"][0], rows["clusters"][-1]
    times = most["clusters"] / least["clusters"]
    slower = _of(least, "rows_per_s") / _of(most, "rows_per_s")
    yield f"{times:,.0f} times as many clusters make k-means {slower:,.0f} times as slow a row."
    inexact = [row for row in rows["clusters"] if _of(row, "recall") < 1]
    if inexact:
        yield (
            f"From {inexact[0]['clusters']:,} clusters on an inverted index looks for the nearest, "
            f"and finds {_of(inexact[0], 'recall'):.1%} of them."
        )
    at_most = {row["rate"]: _of(row, "step_s") for row in rows["loss"] if row["clusters"] == most["clusters"]}
    sampled = ", ".join(
        f"{at_most[1.0] / at_most[rate]:.1f} times as fast with {rate:.0%} of the negatives"
        for rate in sorted(at_most, reverse=True)
        if rate < 1
    )
    yield f"At {most['clusters']:,} clusters a step of the loss is {sampled}."
    trained = {
        row["rate"]: _of(row, "images_per_s")
        for row in rows["training"]
        if row["clusters"] == most["clusters"]
    }
    first = next(_of(row, "images_per_s") for row in rows["training"] if row["rate"] == 0.1)
    yield (
        f"Training with a tenth of them reads {trained[0.1] / first:.0%} of the images a second that it reads at "
        f"{least['clusters']:,} clusters; with all of them {trained[1.0] / first:.0%}."
    )
    disturbed = sum(row["disturbed"] for part in rows.values() for row in part)
    if disturbed:
        yield f"Other processes disturbed {disturbed} of the measurements."
    beyond = [
        row
        for row in rows["loss"]
        if _of(row, "grown_mb") > _of(row, "stated_mb") and _of(row, "stated_mb") > 100
    ]
    if beyond:
        told = ", ".join(f"{row['clusters']:,} at {row['rate']:.0%}" for row in beyond)
        yield (
            f"Memory grew beyond what was stated for {told}: torch's own, which is what the fewest clusters grew by, "
            "and freed blocks that the C library keeps for later are not stated."
        )

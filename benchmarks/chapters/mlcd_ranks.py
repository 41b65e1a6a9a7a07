"""The chapter about memory against the number of processes that hold the class centres together."""

from __future__ import annotations

from typing import Any


def chapter(record: dict[str, Any]) -> str:
    """What a process is stated to need for its share of the centres, and by how much the largest one grew."""
    rows = record["rows"]["ranks"]
    lines = [
        f"{rows[0]['clusters']:,} class centres, {rows[0]['rate']:.0%} of the negatives drawn, batches of "
        f"{record['batch']} over all processes; freed blocks go back to the system. The growth is that of the largest "
        "process and has torch's own memory in it, the statement has not.\n",
        "| processes | stated, MB | grew by, MB | more than stated, MB |",
        "|---:|---:|---:|---:|",
    ]
    for row in rows:
        stated, grown = row["stated_mb"]["median"], row["grown_mb"]["median"]
        lines.append(f"| {row['world']} | {stated:,.0f} | {grown:,.0f} | {grown - stated:,.0f} |")
    first, last = rows[0]["grown_mb"]["median"], rows[-1]["grown_mb"]["median"]
    return "\n".join(
        [
            *lines,
            "",
            f"With {rows[-1]['world']} processes each needs {last / first:.0%} of what one alone does.",
        ]
    )

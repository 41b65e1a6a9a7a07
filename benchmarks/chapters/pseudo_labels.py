"""The chapter about the pass that makes pseudo-labels."""

from __future__ import annotations

from typing import Any

from benchmarks.label_pass import BATCHED, PUBLIC, PUBLIC_SMALL


def chapter(record: dict[str, Any]) -> str:
    """The contenders side by side, and what batching and what the smaller images gain."""
    lines = [
        f"{record['views_per_image']:.1f} views and crops an image; {record['what']}.\n",
        "| | images/s | spread | batched is faster by |",
        "|---|---|---|---|",
    ]
    for name, row in record["rows"].items():
        rate, ratio = row["images_per_s"], record["ratio_batched_to"].get(name)
        faster = f"**{ratio['median']:.1f}** ({ratio['min']:.1f} to {ratio['max']:.1f})" if ratio else ""
        lines.append(f"| {name} | {rate['median']:.2f} | {rate['min']:.2f} to {rate['max']:.2f} | {faster} |")
    return "\n".join([*lines, "", _reading(record)])


def _reading(record: dict[str, Any]) -> str:
    public, small = (record["ratio_batched_to"][name]["median"] for name in (PUBLIC, PUBLIC_SMALL))
    aim = record["expected_ratio"]
    met = "met" if public >= aim else "missed"
    return (
        f"The {BATCHED} pass is {public:.1f} times as fast as the public way (aim {aim:g}: {met}). At the encoder's own "
        f"size it still gains {small:.1f}: that much is due to batches, the rest to fewer pixels."
    )

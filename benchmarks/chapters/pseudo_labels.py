"""The chapter about the pass that makes pseudo-labels."""

from __future__ import annotations

from typing import Any

from benchmarks.chapters.telling import in_brackets, spread_of, verdict
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
        faster = f"**{ratio['median']:.1f}**{in_brackets(ratio, '{:.1f}'.format)}" if ratio else ""
        lines.append(f"| {name} | {rate['median']:.2f} | {spread_of(rate, '{:.2f}'.format)} | {faster} |")
    return "\n".join([*lines, "", _reading(record)])


def _reading(record: dict[str, Any]) -> str:
    public, small = (record["ratio_batched_to"][name] for name in (PUBLIC, PUBLIC_SMALL))
    aim = record["expected_ratio"]
    return (
        f"The {BATCHED} pass is {public['median']:.1f} times as fast as the public way "
        f"(aim {aim:g}: {verdict(public, aim, '{:.1f}'.format)}). At the encoder's own "
        f"size it still gains {small['median']:.1f}: that much is due to batches, the rest to fewer pixels."
    )

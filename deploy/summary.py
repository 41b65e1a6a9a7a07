"""What a folder of labels holds, in a few numbers: how many images a class has, what failed and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cliplet.labels import read_errors, read_run

# Shares of the images for which the threshold that would tag them is named when nothing gets tagged.
TAGGED_SHARES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class LabelSummary:
    """Counts over all rows of a folder.

    Attributes:
        per_class: images that carry each class, in vocabulary order.
        untagged: images without any label.
        best_scores: 10th, 50th and 90th percentile of the images' best scores.
        threshold_to_tag: for some shares of the images, the threshold that would give that many a label.
        errors: for each stage and reason, how many inputs.
    """

    images: int
    per_class: dict[str, int]
    untagged: int
    best_scores: tuple[float, float, float]
    threshold_to_tag: dict[float, float]
    errors: dict[str, int]


def summarise(folder: Path) -> LabelSummary:
    """The summary of a folder of labels, read part by part."""
    run = read_run(folder)
    names: list[str] = run["classes"]
    counts: Counter[str] = Counter()
    best: list[np.ndarray] = []
    untagged = 0
    for part in sorted((folder / "labels").glob("part-*.parquet")):
        table = pq.read_table(part, columns=["labels", "scores"], partitioning=None)
        for pair in pc.value_counts(pc.list_flatten(table["labels"])).to_pylist():
            counts[pair["values"]] += pair["counts"]
        untagged += pc.sum(pc.equal(pc.list_value_length(table["labels"]), 0)).as_py() or 0
        scores = pc.list_flatten(table["scores"]).to_numpy().reshape(-1, len(names))
        best.append(scores.max(axis=1))
    best_N = np.concatenate(best) if best else np.zeros(0, np.float32)
    low, middle, high = np.percentile(best_N, [10, 50, 90]).tolist() if len(best_N) else (0.0, 0.0, 0.0)
    return LabelSummary(
        images=len(best_N),
        per_class={name: counts[name] for name in names},
        untagged=untagged,
        best_scores=(low, middle, high),
        threshold_to_tag={s: float(np.quantile(best_N, 1 - s)) for s in TAGGED_SHARES} if len(best_N) else {},
        errors=dict(Counter(f"{e.stage}: {e.reason}" for e in read_errors(folder)).most_common()),
    )

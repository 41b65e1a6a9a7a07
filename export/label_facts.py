"""Facts about a folder of labels: how many images carry which class, what failed and why, and whether it is done."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cliplet.errors import ClipletError, DataError
from cliplet.labels import LabelStore, read_run
from cliplet.listing import find_images
from cliplet.vocabulary import Vocabulary

from .facts import Facts, class_facts, read_json, understood

_EXPECTED = "a folder that `cliplet label` wrote"
_FIX = "run the same `cliplet label` again, with --overwrite"
_FIX_PART = "remove that file and run the same `cliplet label` again: its images are labelled anew"


def label_facts(folder: Path) -> Facts:
    """Counts over all rows, and what the job was.

    `finished` is whether every input that the job's sources name now has its row; null where they cannot be
    listed, `unfinished_because` says why. A run with --limit is finished only once there is no limit.

    Raises:
        DataError: the folder is a training run, or a table is cut short.
        ArtifactError: its run.json or a table cannot be read, or is of another schema.
    """
    store = LabelStore(folder)
    with understood(store.run_file, _EXPECTED, _FIX):
        _refuse_training(folder, read_json(store.run_file, _EXPECTED, _FIX))
        run = read_run(folder)
        fingerprint = run["fingerprint"]
        names = tuple(run["classes"])
        vocabulary = Vocabulary.from_json(fingerprint["vocabulary"], str(store.run_file))
        parts = sorted(store.parts_folder.glob("part-*.parquet"))
        counts = _counted(parts)
        labelled = store.labelled_paths()
        with understood(store.errors_file, "a whole Parquet file of errors", _FIX_PART):
            errors = store.errors(labelled)
        strangers = sorted(counts.per_class.keys() - set(names))
        damage = [f"rows carry {name!r}, which run.json does not name" for name in strangers]
        return {
            "intact": not damage,
            "damage": damage,
            **_finish(fingerprint, labelled | {e.path for e in errors}),
            "rows": counts.rows,
            "failed": len(errors),
            "untagged": counts.untagged,
            "labels": counts.per_class.total(),
            "engine_seconds": counts.seconds,
            "parts": len(parts),
            "bytes": sum(file.stat().st_size for file in (*parts, store.errors_file) if file.exists()),
            "errors": dict(Counter(f"{e.stage}: {e.reason}" for e in errors).most_common()),
            "images_per_class": {name: counts.per_class[name] for name in names},
            "model": run["model"],
            "identity": fingerprint["model"],
            "runtime": fingerprint["runtime"],
            "sources": list(fingerprint["inputs"]),
            "views": run["views"],
            "aggregation": fingerprint["aggregation"],
            "thresholds": {
                "least": min(run["thresholds"]),
                "most": max(run["thresholds"]),
                "how": run["threshold_source"],
            },
            **class_facts(vocabulary),
            "begun": run["begun"],
            "versions": run["versions"],
        }


def _refuse_training(folder: Path, run: Facts) -> None:
    if "fingerprint" not in run and "recipe" in run:
        raise DataError(
            f"{folder} is a training run",
            "labels, or the classifier that the run ends with",
            f"cliplet inspect {folder / 'classifier'}",
        )


@dataclass
class _Counts:
    """What is counted over all rows.

    Attributes:
        per_class: images that carry each class.
        untagged: images without any label.
        seconds: of the engine.
    """

    per_class: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    untagged: int = 0
    seconds: float = 0.0

    def add(self, table: pa.Table) -> None:
        labels, seconds = table["labels"], table["seconds"]
        for pair in pc.value_counts(pc.list_flatten(labels)).to_pylist():
            self.per_class[pair["values"]] += pair["counts"]
        self.rows += table.num_rows
        self.untagged += pc.sum(pc.equal(pc.list_value_length(labels), 0)).as_py() or 0
        self.seconds += pc.sum(seconds).as_py() or 0.0


def _counted(parts: list[Path]) -> _Counts:
    counts = _Counts()
    for part in parts:
        with understood(part, "a whole Parquet file of labels", _FIX_PART):
            counts.add(pq.read_table(part, columns=["labels", "seconds"], partitioning=None))
    return counts


def _finish(fingerprint: dict[str, Any], settled: set[str]) -> Facts:
    """Whether all inputs are settled, as far as they can still be listed."""
    home = fingerprint.get("cwd")
    if home is not None and home != os.getcwd():
        return {
            "finished": None,
            "unfinished_because": f"its sources are relative to {home}: inspect it there",
        }
    try:
        inputs = find_images(fingerprint["inputs"]).images
    except ClipletError as error:
        return {"finished": None, "unfinished_because": f"its sources cannot be listed: {error.happened}"}
    waiting = sum(ref.path not in settled for ref in inputs)
    return {"finished": waiting == 0, "inputs": len(inputs), "waiting": waiting}

"""How good a model is on a labelled data set: numbers, pictures, and the scores they were counted from.

    OUT/metrics.json         every number, what was evaluated, and what could not be
    OUT/scores.parquet       path, scores and truth of every image that was counted
    OUT/*.png                see `plots`

Legend: N images that were scored, C classes of the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliplet.artifact import library_versions
from cliplet.datasets import Dataset
from cliplet.errors import UsageError, explained_os_errors
from cliplet.labels import write_atomically
from cliplet.metrics import (
    ClassQuality,
    OverallQuality,
    Reliability,
    agreement,
    average_precisions,
    class_quality,
    co_occurrence,
    confusion,
    overall_quality,
    reliability,
)

from .scoring import Scored

METRICS_FILE = "metrics.json"
SCORES_FILE = "scores.parquet"
SCHEMA = 1
# False tags of one class beside another that metrics.json names.
MOST_CONFUSIONS = 20
# A share of fewer images says little.
FEWEST_IMAGES = 10


@dataclass(frozen=True)
class Confusion:
    """`share` of the `images` that hold `present` and lack `tagged` were tagged with it; see `metrics.confusion`."""

    present: str
    tagged: str
    share: float
    images: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores beside the truth, images that failed left out; the numbers are counted when they are first asked for.

    Attributes:
        names: the classes of the data [C].
        scores_NC: float32 [N, C]; `truth_NC` bool [N, C]; `paths` the images [N].
        thresholds_C: float32 [C], and `threshold_source` says where they come from.
        model, data: what was evaluated on what, ready for JSON.
        failed: (path, reason) of the images left out.
        fewest_images: a share of fewer images is no confusion worth naming.
    """

    names: tuple[str, ...]
    scores_NC: np.ndarray
    truth_NC: np.ndarray
    paths: list[str]
    thresholds_C: np.ndarray
    threshold_source: str
    model: dict[str, Any]
    data: dict[str, Any]
    failed: list[tuple[str, str]]
    fewest_images: int = FEWEST_IMAGES

    @cached_property
    def tagged_NC(self) -> np.ndarray:
        return np.asarray(self.scores_NC >= self.thresholds_C)

    @cached_property
    def average_precision_C(self) -> np.ndarray:
        return average_precisions(self.scores_NC, self.truth_NC)

    @property
    def mean_average_precision(self) -> float:
        """In percent."""
        return 100 * float(self.average_precision_C.mean())

    @cached_property
    def by_class(self) -> ClassQuality:
        return class_quality(self.tagged_NC, self.truth_NC)

    @cached_property
    def overall(self) -> OverallQuality:
        return overall_quality(self.tagged_NC, self.truth_NC)

    @cached_property
    def reliability(self) -> Reliability:
        return reliability(self.scores_NC, self.truth_NC)

    @cached_property
    def confusion_CC(self) -> np.ndarray:
        return confusion(self.tagged_NC, self.truth_NC)

    @cached_property
    def confusable_CC(self) -> np.ndarray:
        """Number of images that hold the class of the row and lack that of the column."""
        together_CC = co_occurrence(self.truth_NC)
        return np.asarray(together_CC.diagonal()[:, None] - together_CC)

    @cached_property
    def confusions(self) -> list[Confusion]:
        """The pairs of classes confused most often, of those that `fewest_images` could confuse."""
        images_CC = self.confusable_CC
        share_CC = np.where(images_CC >= self.fewest_images, np.nan_to_num(self.confusion_CC), 0)
        order = np.argsort(-share_CC, axis=None, kind="stable")[:MOST_CONFUSIONS]
        pairs = zip(*np.unravel_index(order, share_CC.shape), strict=True)
        return [
            Confusion(self.names[i], self.names[j], float(share_CC[i, j]), int(images_CC[i, j]))
            for i, j in pairs
            if share_CC[i, j] > 0
        ]

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` holds; qualities in percent, scores and thresholds 0..1."""
        quality = {name: round(100 * value, 3) for name, value in asdict(self.overall).items()}
        return {
            "schema": SCHEMA,
            "units": "percent, but thresholds and kappa (at most 1)",
            "model": self.model,
            "data": self.data,
            "images": len(self.paths),
            "mAP": round(self.mean_average_precision, 3),
            **quality,
            "ECE": round(100 * self.reliability.expected_calibration_error, 3),
            "labels_per_image": {
                "truth": round(float(self.truth_NC.sum(1).mean()), 3),
                "tagged": round(float(self.tagged_NC.sum(1).mean()), 3),
            },
            "thresholds": self.threshold_source,
            "classes_without_positives": [
                name for c, name in enumerate(self.names) if not self.truth_NC[:, c].any()
            ],
            "classes": self._classes_to_json(),
            "confusions": [{**vars(c), "share": round(100 * c.share, 3)} for c in self.confusions],
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
        }

    def _classes_to_json(self) -> dict[str, dict[str, Any]]:
        kappa_C = agreement(self.tagged_NC, self.truth_NC)
        percent = {
            "AP": self.average_precision_C,
            "precision": self.by_class.precision_C,
            "recall": self.by_class.recall_C,
            "F1": self.by_class.f1_C,
        }
        return {
            name: {
                **{key: round(100 * float(values_C[c]), 3) for key, values_C in percent.items()},
                "kappa": None if np.isnan(kappa_C[c]) else round(float(kappa_C[c]), 4),
                "threshold": float(str(self.thresholds_C[c])),
                "positives": int(self.truth_NC[:, c].sum()),
                "tagged": int(self.tagged_NC[:, c].sum()),
            }
            for c, name in enumerate(self.names)
        }


def evaluate(scored: Scored, data: Dataset) -> Evaluation:
    """The evaluation of scores against a data set's truth.

    Raises:
        UsageError: the images have no labels.
    """
    if data.truth_NC is None:
        raise UsageError(
            f"the images of {data.name} {data.split} have no labels ({'; '.join(data.notes)})",
            "a data set with labels",
            "cliplet label and cliplet gallery show what a model finds where no truth is known",
        )
    done_N = scored.done_N
    return Evaluation(
        names=data.vocabulary.names,
        scores_NC=scored.scores_NC[done_N],
        truth_NC=data.truth_NC[done_N],
        paths=[path for path, done in zip(data.paths, done_N, strict=True) if done],
        thresholds_C=scored.thresholds_C,
        threshold_source=scored.thresholds.source,
        model=model_to_json(scored),
        data=data_to_json(data),
        failed=scored.failed,
    )


def model_to_json(scored: Scored) -> dict[str, Any]:
    """What tells a model from all others."""
    return {
        "name": scored.model,
        "kind": scored.kind,
        "identity": scored.identity,
        "classes_not_in_the_data": scored.other_names,
    }


def data_to_json(data: Dataset) -> dict[str, Any]:
    """What tells a data set from all others: its name, and a hash of file names, classes and truth."""
    return {
        "name": data.name,
        "split": data.split,
        "images": len(data.images),
        "sha256": data_digest(data),
        "notes": list(data.notes),
    }


def data_digest(data: Dataset) -> str:
    """Hex SHA-256 of the images' file names, the classes and the truth: the same wherever the files lie."""
    digest = hashlib.sha256()
    for words in ([Path(path).name for path in data.paths], data.vocabulary.names):
        digest.update(json.dumps(list(words)).encode())
    digest.update(b"" if data.truth_NC is None else np.packbits(data.truth_NC).tobytes())
    return digest.hexdigest()


def write_evaluation(evaluation: Evaluation, out: Path) -> list[Path]:
    """Paths of the files written to `out`: metrics, scores and pictures.

    Raises:
        EnvironmentError_: the folder cannot be written.
    """
    from .plots import write_plots

    with explained_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False)
    write_atomically(out / METRICS_FILE, text.encode())
    sink = pa.BufferOutputStream()
    pq.write_table(_scores_table(evaluation), sink, compression="zstd")
    write_atomically(out / SCORES_FILE, sink.getvalue())
    return [out / METRICS_FILE, out / SCORES_FILE, *write_plots(evaluation, out)]


def _scores_table(evaluation: Evaluation) -> pa.Table:
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("scores", pa.list_(pa.float32())),
            ("truth", pa.list_(pa.bool_())),
        ],
        {"classes": json.dumps(list(evaluation.names))},
    )
    columns: Sequence[Any] = [evaluation.paths, list(evaluation.scores_NC), list(evaluation.truth_NC)]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)

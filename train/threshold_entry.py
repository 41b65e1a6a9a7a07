"""Thresholds for a model: found on a data set, said how, and stored where `cliplet label` and `eval` find them.

Legend: N images that were scored, M classes of the model, C classes of the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.artifact import Bundle
from cliplet.datasets import Dataset
from cliplet.errors import DataError, UsageError, explained_os_errors
from cliplet.labels import write_atomically
from cliplet.metrics import OverallQuality, class_quality, overall_quality
from cliplet.model_spec import MANIFEST_NAME
from cliplet.thresholds import THRESHOLDS_FILE

from .calibrate import (
    FOLDS,
    MIN_POSITIVES,
    count_thresholds,
    cross_validate,
    expected_counts,
    f1_thresholds,
)
from .evaluate import data_to_json, model_to_json
from .scoring import Scored, ScoringOptions, kind_of_model, score_dataset

METHODS = ("f1", "pseudo-f1", "expected-count")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How thresholds are found.

    Attributes:
        method: `f1`: the best F1 of each class on labelled images. `pseudo-f1`: the same against pseudo-labels.
            `expected-count`: as many tags of each class as its probabilities add up to.
        pseudo: a folder of `cliplet label`, or a .npy or .npz file with one array [N, C] in the order of the data.
        pseudo_threshold: from which value on an entry of such an array is a label.
        mean_per_image: of expected-count: the known mean number of classes in an image.
        folds, seed: of the cross-validation.
        min_positives: classes with fewer get the global threshold.
    """

    method: str = METHODS[0]
    pseudo: Path | None = None
    pseudo_threshold: float = 0.5
    mean_per_image: float | None = None
    folds: int = FOLDS
    min_positives: int = MIN_POSITIVES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"no method {self.method!r}", f"one of {', '.join(METHODS)}", "--method f1")
        if self.method == "pseudo-f1" and self.pseudo is None:
            raise UsageError("--method pseudo-f1 without pseudo-labels", "--pseudo FILE or FOLDER")
        if self.method == "f1" and self.pseudo is not None:
            raise UsageError(
                "--method f1 with --pseudo", "the labels of the data alone", "--method pseudo-f1"
            )
        if self.method != "expected-count" and self.mean_per_image is not None:
            raise UsageError(
                f"--method {self.method} with --mean-per-image",
                "that option for --method expected-count only",
            )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Thresholds and what is known about them.

    Attributes:
        entry: what is stored; see `cliplet.thresholds`.
        by_class, by_global: of methods that count F1: the quality out of fold, with a threshold for each class
            and with one for all.
        in_sample: the quality on the very images that the thresholds were found on.
        few: classes that got the global threshold.
    """

    entry: dict[str, Any]
    by_class: OverallQuality | None = None
    by_global: OverallQuality | None = None
    in_sample: OverallQuality | None = None
    few: tuple[str, ...] = ()


def calibrate(
    scored: Scored, data: Dataset, settings: CalibrationSettings, options: ScoringOptions
) -> Calibration:
    """Thresholds for all classes of the model; those that the data does not have get the global one.

    Raises:
        UsageError: the data has no labels and the method needs them.
        DataError: pseudo-labels that do not fit, or too few positives for anything.
    """
    done_N = scored.done_N
    pseudo_NC = None
    if settings.pseudo is not None:
        pseudo_NC, known_N = _pseudo_labels(settings, data, options)
        done_N = done_N & known_N
    if settings.method == "expected-count":
        return _by_expected_count(scored, data, settings, done_N, pseudo_NC)
    if pseudo_NC is not None:
        return _by_f1(scored, data, settings, done_N, pseudo_NC)
    if data.truth_NC is None:
        raise UsageError(
            f"the images of {data.name} {data.split} have no labels ({'; '.join(data.notes)})",
            "labelled images for --method f1",
            "--method expected-count needs none",
        )
    return _by_f1(scored, data, settings, done_N, data.truth_NC)


def _pseudo_labels(
    settings: CalibrationSettings, data: Dataset, options: ScoringOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-labels [N, C] (tags of `pseudo-f1`, probabilities else), and which rows are known, bool [N]."""
    assert settings.pseudo is not None
    tags = settings.method == "pseudo-f1"
    if settings.pseudo.is_dir():
        if kind_of_model(str(settings.pseudo)) != "labels":
            raise UsageError(
                f"--pseudo {settings.pseudo} is no folder of labels", "what `cliplet label` wrote"
            )
        own = ScoringOptions(quiet=options.quiet)
        found = score_dataset(str(settings.pseudo), data, own)
        scores_NC = found.scores_NC
        return (scores_NC >= found.thresholds_C if tags else scores_NC), found.done_N
    probs_NC = _read_matrix(settings.pseudo, (len(data.images), len(data.vocabulary.names)))
    known_N = np.isfinite(probs_NC).all(1)
    return (probs_NC >= settings.pseudo_threshold if tags else probs_NC), known_N


def _read_matrix(file: Path, shape: tuple[int, int]) -> np.ndarray:
    expected = f"one array of numbers {list(shape)}: images and classes in the order of the data"
    try:
        found = np.load(file, allow_pickle=False)
        arrays = [found] if isinstance(found, np.ndarray) else [found[name] for name in found.files]
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {file}: {error}", expected, "write it with numpy.save") from error
    if len(arrays) != 1 or arrays[0].shape != shape or arrays[0].dtype.kind not in "bfiu":
        held = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
        raise DataError(f"{file} holds {held or 'nothing'}", expected, "write it with numpy.save")
    return arrays[0].astype(np.float32)


def _by_expected_count(
    scored: Scored,
    data: Dataset,
    settings: CalibrationSettings,
    done_N: np.ndarray,
    pseudo_NC: np.ndarray | None,
) -> Calibration:
    scores_NM = scored.scores_NM[done_N]
    probs_NM = scores_NM.copy()
    if pseudo_NC is not None:
        probs_NM[:, scored.columns_C] = pseudo_NC[done_N]
    expected_M = expected_counts(probs_NM, settings.mean_per_image)
    values_M = count_thresholds(scores_NM, expected_M)
    if settings.mean_per_image is not None:
        counted = (
            f"as many tags as {settings.mean_per_image:g} classes an image make, shared out by probability"
        )
    else:
        counted = "as many tags as the probabilities add up to"
    if pseudo_NC is not None:
        counted += f" ({settings.pseudo})"
    how = f"{counted}, on {len(scores_NM):,} images of {data.name} {data.split}; no labels were used"
    details = {"expected_per_image": round(float(expected_M.sum()) / len(scores_NM), 4)}
    return Calibration(_entry(scored, data, settings, values_M, how, details))


def _by_f1(
    scored: Scored, data: Dataset, settings: CalibrationSettings, done_N: np.ndarray, truth_NC: np.ndarray
) -> Calibration:
    scores_NC, truth_NC = scored.scores_NC[done_N], truth_NC[done_N]
    found = f1_thresholds(scores_NC, truth_NC, settings.min_positives)
    held_out = cross_validate(
        scores_NC,
        truth_NC,
        folds=settings.folds,
        min_positives=settings.min_positives,
        seed=settings.seed,
    )
    values_M = np.full(len(scored.names), found.overall)
    values_M[scored.columns_C] = found.values_C
    tagged_NC = scores_NC >= found.values_C.astype(scores_NC.dtype)
    in_sample = overall_quality(tagged_NC, truth_NC)
    names = data.vocabulary.names
    few = tuple(names[c] for c in found.few) + tuple(scored.other_names)
    details = {
        "global": {"value": found.overall, "classes": list(few)},
        "f1_cross_validated": {
            "folds": held_out.folds,
            **_percent(held_out.by_class),
            "with_one_threshold": _percent(held_out.by_global),
            "classes": {name: round(100 * float(held_out.f1_C[c]), 3) for c, name in enumerate(names)},
        },
        "f1_in_sample": {
            **_percent(in_sample),
            "classes": dict(zip(names, _rounded(class_quality(tagged_NC, truth_NC).f1_C), strict=True)),
        },
    }
    against = f"against the pseudo-labels {settings.pseudo} " if settings.pseudo else ""
    how = (
        f"best F1 of each class {against}on {len(truth_NC):,} images of {data.name} {data.split}; "
        f"CF1 {100 * held_out.by_class.CF1:.1f} %, OF1 {100 * held_out.by_class.OF1:.1f} % "
        f"by {held_out.folds}-fold cross-validation"
    )
    entry = _entry(scored, data, settings, values_M, how, details)
    return Calibration(entry, held_out.by_class, held_out.by_global, in_sample, few)


def _percent(quality: OverallQuality) -> dict[str, float]:
    return {name: round(100 * value, 3) for name, value in asdict(quality).items()}


def _rounded(shares_C: np.ndarray) -> list[float]:
    return [round(100 * float(share), 3) for share in shares_C]


def _entry(
    scored: Scored,
    data: Dataset,
    settings: CalibrationSettings,
    values_M: np.ndarray,
    how: str,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    looked = {}
    if scored.plan is not None:
        looked = {"views": str(scored.plan.views), "aggregation": scored.plan.aggregation.to_json()}
    return {
        "values": {name: float(value) for name, value in zip(scored.names, values_M, strict=True)},
        "how": how,
        "method": settings.method,
        **looked,
        "on": {**data_to_json(data), "images_failed": len(scored.failed)},
        "model": model_to_json(scored),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **details,
    }


def place_of_entry(model: str, out: Path | None) -> Path:
    """Where the thresholds of a model are stored.

    Raises:
        UsageError: neither the model has such a place nor was a file named.
    """
    if out is not None:
        return out
    kind = kind_of_model(model)
    if kind not in ("classifier", "bundle"):
        raise UsageError(
            f"{model} has no place for thresholds",
            "a classifier's folder, a bundle, or a file to write",
            "--out thresholds.json",
        )
    return Path(model) / (THRESHOLDS_FILE if kind == "classifier" else MANIFEST_NAME)


def store_entry(entry: Mapping[str, Any], place: Path) -> None:
    """Write an entry as a file of its own, or into a bundle's manifest under its way to look.

    Raises:
        EnvironmentError_: the file cannot be written.
    """
    if place.name == MANIFEST_NAME:
        manifest = Bundle.load(place.parent).manifest
        stored = replace(manifest, thresholds={**manifest.thresholds, entry["views"]: dict(entry)}).to_json()
    else:
        stored = dict(entry)
    with explained_os_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, json.dumps(stored, indent=2, ensure_ascii=False).encode())

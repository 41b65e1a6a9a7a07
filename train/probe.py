"""How good the features of a frozen encoder are: linear probe, nearest neighbours, retrieval, zero-shot.

    report = probe("tiny", train, evaluation, Path("probe"), ProbeOptions())

    OUT/embeddings/SPLIT    features of the images, which a later run of the same encoder finds
    OUT/report.json         all that was measured, of what and how

`probe_measures` says what is in it, `probe_linear` how the linear probe is fitted.

Legend: N images of a split, C classes, D width of the features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.artifact import library_versions
from cliplet.datasets import Dataset
from cliplet.errors import DataError, UsageError
from cliplet.labels import write_atomically
from cliplet.lock import lock_folder
from cliplet.model_spec import ModelSpec
from cliplet.teacher import load_teacher
from cliplet.tower_files import PREFIX
from cliplet.trunk_files import is_trunk_folder
from cliplet.vocabulary import Vocabulary

from .embedder import encoder_spec, teacher_embedder
from .embeddings import Embedder, EmbedOptions, embed_images
from .probe_judge import Labelled
from .probe_measures import MEASURES, ProbeOptions, TextScores, probe_features
from .run_folder import described

REPORT_FILE = "report.json"
SCHEMA = 1
EVALUATION_SALT = 1  # tells the random choice of evaluation images from others of the same seed


def probe(
    model: str, train: Dataset, evaluation: Dataset | None, out: Path, options: ProbeOptions
) -> dict[str, Any]:
    """What was measured of an encoder's features, also written to `out`.

    Args:
        model: see `embedder.teacher_embedder`.
        evaluation: None sets a random share of the training images aside for it.

    Raises:
        UsageError: images without labels, a measure that the encoder is not capable of, features of another encoder
            or collection in `out`, or another run that is writing there.
        DataError: features that are broken, or no class that can be measured.
        EnvironmentError_: this machine lacks weights, a library, the device, or room.
    """
    for data in (train, evaluation):
        _refuse_unlabelled(data)
    clip = text_model(model)
    measures = options.measures or tuple(m for m in MEASURES if m != "zero-shot" or clip is not None)
    if "zero-shot" in measures and clip is None:
        raise _no_text_tower(model, measures)
    lock = lock_folder(out)
    try:
        embedder = teacher_embedder(model, options.device, options.threads)
        parts, failed = _embedded(train, evaluation, out, embedder, options)
        report = {
            "schema": SCHEMA,
            "model": {**embedder.identity, "width": embedder.width},
            "data": {role: described(data) for role, (data, _) in parts.items()},
            "images": {
                **{role: len(found.paths) for role, (_, found) in parts.items()},
                "failed": failed,
            },
            "settings": {**asdict(options), "measures": list(measures)},
        }
        text_of = None if clip is None else _text_scores(clip, train.vocabulary)
        found = probe_features(
            parts["train"][1],
            parts["evaluation"][1],
            train.vocabulary.names,
            options,
            measures=measures,
            text_scores=text_of,
        )
        report = {**report, **found, "versions": library_versions()}
        write_atomically(out / REPORT_FILE, json.dumps(report, indent=2, ensure_ascii=False).encode())
    finally:
        os.close(lock)
    return report


def text_model(model: str) -> ModelSpec | None:
    """The CLIP that `model` names; None for encoders without a text tower."""
    if model.startswith(PREFIX) or is_trunk_folder(Path(model)):
        return None
    spec = encoder_spec(model)
    scores_only = spec.classifier is not None or spec.bundle is not None or spec.server is not None
    return None if scores_only else spec


def _text_scores(spec: ModelSpec, vocabulary: Vocabulary) -> TextScores:
    def scores(features_ND: np.ndarray) -> Mapping[str, np.ndarray]:
        """Cosines with each class's text, and where the CLIP has a softmax, probabilities among these classes."""
        teacher = load_teacher(spec)
        cosines_NC = features_ND @ teacher.text_matrix(vocabulary).numpy().T.astype(np.float64)
        if teacher.bias is not None:
            return {"cosine": cosines_NC}
        powers_NC = np.exp(teacher.scale * (cosines_NC - cosines_NC.max(1, keepdims=True)))
        return {"softmax": powers_NC / powers_NC.sum(1, keepdims=True), "cosine": cosines_NC}

    return scores


def _no_text_tower(model: str, measures: tuple[str, ...]) -> UsageError:
    others = ",".join(name for name in measures if name != "zero-shot")
    return UsageError(
        f"zero-shot with {model}, which has no text tower: neither had MLCD's towers when they were released, nor "
        "does `cliplet train` make one (as LiT would, over a trunk that stays as it is)",
        "a CLIP, whose own text tower is used: tiny, open_clip:ARCH/PRETRAINED, …",
        f"--measures {others or 'linear,knn,retrieval'}",
    )


def _refuse_unlabelled(data: Dataset | None) -> None:
    if data is not None and data.truth_NC is None:
        raise UsageError(
            f"the images of {data.name} {data.split} have no labels ({'; '.join(data.notes)})",
            "labelled images: a probe measures features by labels",
            "choose another split, or put a labels.csv beside the images",
        )


def _embedded(
    train: Dataset, evaluation: Dataset | None, out: Path, embedder: Embedder, options: ProbeOptions
) -> tuple[dict[str, tuple[Dataset, Labelled]], dict[str, str]]:
    """By role (`train`, `evaluation`) the images that have features; and why others have none, by path."""
    whole: dict[str, Dataset] = {"train": train}
    if evaluation is not None:
        whole["evaluation"] = evaluation
    kept: dict[str, tuple[Dataset, Labelled]] = {}
    failed: dict[str, str] = {}
    for role, data in whole.items():
        settings = EmbedOptions(
            workers=options.workers,
            batch=options.batch,
            quiet=options.quiet,
            dtype="float32",
            overwrite=options.overwrite,
        )
        found = embed_images(data.images, out / "embeddings" / data.split, embedder, settings)
        failed |= {error.path: error.reason for error in found.failed}
        kept[role] = _with_rows(data, np.flatnonzero(found.done_N), found.features_ND)
    if evaluation is None:
        kept = _divided(*kept["train"], options)
    return kept, failed


def _with_rows(data: Dataset, rows: np.ndarray, features_ND: np.ndarray) -> tuple[Dataset, Labelled]:
    part = data if len(rows) == len(data.images) else data.subset(rows)
    assert part.truth_NC is not None
    return part, Labelled(np.asarray(features_ND[rows]), part.truth_NC, part.paths)


def _divided(data: Dataset, found: Labelled, options: ProbeOptions) -> dict[str, tuple[Dataset, Labelled]]:
    """The images at random in two parts."""
    count = len(found.paths)
    if count < 2:
        raise DataError("one image to learn from and to measure on", "at least two")
    shuffled = np.random.default_rng([options.seed, EVALUATION_SALT]).permutation(count)
    cut = min(max(round(options.evaluation_share * count), 1), count - 1)
    return {
        "train": _with_rows(data, np.sort(shuffled[cut:]), found.features_ND),
        "evaluation": _with_rows(data, np.sort(shuffled[:cut]), found.features_ND),
    }

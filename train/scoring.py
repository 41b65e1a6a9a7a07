"""Scores of a data set's images, whatever gives them: a classifier, a CLIP, a bundle, a server, or stored labels.

Legend: N images, M classes of the model, C classes of the data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.artifact import Bundle
from cliplet.dataset_contents import spelling
from cliplet.datasets import Dataset
from cliplet.errors import DataError, UsageError
from cliplet.images import ImageError, ImageRef, Picture, decode_image, read_image
from cliplet.labels import read_errors, read_labels, read_run
from cliplet.machine import usable_cores
from cliplet.model_spec import MANIFEST_NAME, TRUNK_STEM, parse_model_spec
from cliplet.plan import CLASSIFIER_THRESHOLD, Plan, TaggerSettings, make_plan
from cliplet.plan_checks import hold_labels
from cliplet.progress import ProgressBar
from cliplet.server_address import ServerAddress
from cliplet.tagger import load_plan
from cliplet.thresholds import THRESHOLDS_FILE, Thresholds, read_thresholds
from cliplet.vocabulary import Vocabulary

from .feed import ahead


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How images are scored.

    Attributes:
        views: where a CLIP or a bundle looks; classifiers and stored labels have no choice.
        batch_size: images in a batch; 0 chooses by the model.
        workers: threads that decode; 0 means one a core.
        thresholds: a file of thresholds to use in place of the model's own.
    """

    views: str | None = None
    device: str = "cpu"
    batch_size: int = 0
    workers: int = 0
    thresholds: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--batch-size", self.batch_size), ("--workers", self.workers)):
            if value < 0:
                raise UsageError(f"{flag} {value}", "a whole number from 0 on")


@dataclass(frozen=True, eq=False)
class Scored:
    """A model's scores of a data set.

    Attributes:
        model: as the user named it; `kind` is classifier, bundle, server, labels or clip.
        identity: what tells this model, and how it looked, from all others.
        names: the model's classes [M].
        scores_NM: float32 [N, M]; rows of images that failed are nan.
        columns_C: the model's column of each class of the data.
        thresholds: [M], and where they come from.
        failed: (path, reason) of images without scores.
        plan: how a CLIP or a bundle looked.
    """

    model: str
    kind: str
    identity: dict[str, Any]
    names: tuple[str, ...]
    scores_NM: np.ndarray
    columns_C: np.ndarray
    thresholds: Thresholds
    failed: list[tuple[str, str]]
    plan: Plan | None = None

    @property
    def done_N(self) -> np.ndarray:
        """Which images have scores, bool [N]."""
        return np.asarray(np.isfinite(self.scores_NM).all(1))

    @property
    def scores_NC(self) -> np.ndarray:
        """Scores of the data's classes in their order, float32 [N, C]."""
        return self.scores_NM[:, self.columns_C]

    @property
    def thresholds_C(self) -> np.ndarray:
        """Thresholds of the data's classes in their order, float32 [C]: what a tagger compares with."""
        return np.asarray(self.thresholds.values, np.float32)[self.columns_C]

    @property
    def other_names(self) -> list[str]:
        """Classes of the model that the data does not have."""
        return [name for m, name in enumerate(self.names) if m not in set(self.columns_C.tolist())]


def kind_of_model(model: str) -> str:
    """What `model` names: a classifier's folder, a bundle, a bundle on a server, a folder of labels, or a CLIP.

    Raises:
        DataError: a folder with none of these in it.
    """
    if model == "tiny":
        return "clip"
    if ServerAddress.is_meant(model):
        return "server"
    folder = Path(model)
    # Written out and not imported: the classifier's module needs torch, which labels do not.
    for file, kind in (("classifier.json", "classifier"), (MANIFEST_NAME, "bundle"), ("run.json", "labels")):
        if (folder / file).is_file():
            return kind
    if (folder / f"{TRUNK_STEM}.json").is_file():
        hold_labels(parse_model_spec(model), None)
    if folder.is_dir():
        raise DataError(
            f"{model} holds no classifier.json, {MANIFEST_NAME} or run.json",
            "the folder of a classifier, of a bundle, or of labels",
            "check the path",
        )
    return "clip"


def own_vocabulary(model: str) -> Vocabulary | None:
    """The classes that a model was made for; None for a CLIP, which can be asked about any."""
    kind = kind_of_model(model)
    if kind == "classifier":
        from cliplet.classifier import classifier_details

        return Vocabulary.from_json(classifier_details(Path(model))["vocabulary"], model)
    if kind == "server":
        return make_plan(TaggerSettings(model=model)).vocabulary
    if kind == "bundle":
        bundle = Bundle.load(Path(model))
        hold_labels(parse_model_spec(model), bundle.manifest)
        return bundle.manifest.vocabulary
    if kind == "labels":
        return Vocabulary.from_json(read_run(Path(model))["fingerprint"]["vocabulary"], model)
    return None


def score_dataset(model: str, data: Dataset, options: ScoringOptions) -> Scored:
    """The scores of a data set's images by `model`. A CLIP is asked about the classes of the data.

    Raises:
        UsageError: an option that this kind of model does not have.
        DataError: the model lacks a class of the data, labels lack an image, or no image could be scored.
        EnvironmentError_: this machine lacks the runtime or the device.
    """
    kind = kind_of_model(model)
    if kind in ("classifier", "labels") and options.views is not None:
        raise UsageError(
            f"--views {options.views} for {model}",
            "no --views: a classifier looks at the whole image, labels were looked for before",
            "leave --views out",
        )
    score = {"classifier": _by_classifier, "labels": _by_labels}.get(kind, _by_tagger)
    scored = score(model, data, options)
    if not scored.done_N.any():
        path, reason = scored.failed[0]
        raise DataError(
            f"none of {len(data.images):,} images could be scored; {path}: {reason}",
            "images that can be read",
            "check --root",
        )
    return scored


def matched_columns(names: Sequence[str], data: Dataset, model: str) -> np.ndarray:
    """The model's column of each class of the data, int [C]; case, spaces, `_` and `-` do not matter.

    Raises:
        DataError: the model lacks one.
    """
    columns = {spelling(name): m for m, name in enumerate(names)}
    missing = [name for name in data.vocabulary.names if spelling(name) not in columns]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise DataError(
            f"{model} knows no {', '.join(map(repr, missing[:8]))}{more} of {data.name}",
            f"a model that knows all {len(data.vocabulary.names)} classes of the data; it has {len(names)}",
            "choose the model that was made for these classes, or name its classes with --classes",
        )
    return np.array([columns[spelling(name)] for name in data.vocabulary.names])


def _own_or_given(options: ScoringOptions, names: tuple[str, ...], own: Thresholds) -> Thresholds:
    return read_thresholds(options.thresholds, names) if options.thresholds else own


def _by_classifier(model: str, data: Dataset, options: ScoringOptions) -> Scored:
    from cliplet.classifier import classifier_details, load_classifier

    from .predict import PREDICTION_BATCH, predict

    folder = Path(model)
    details = classifier_details(folder)
    names = Vocabulary.from_json(details["vocabulary"], model).names
    columns_C = matched_columns(names, data, model)
    file = options.thresholds or folder / THRESHOLDS_FILE
    if options.thresholds or file.is_file():
        thresholds = read_thresholds(file, names)
    else:
        fix = f"not calibrated; `cliplet calibrate {model}` does that"
        thresholds = Thresholds.same(CLASSIFIER_THRESHOLD, names, fix)
    with ProgressBar("scoring", len(data.images), quiet=options.quiet) as bar:
        found = predict(
            load_classifier(folder),
            data.images,
            device=options.device,
            batch_size=options.batch_size or PREDICTION_BATCH,
            workers=options.workers or usable_cores(),
            progress=bar.advance,
        )
    identity = {"sha256": details["sha256"], "config": details["config"]}
    return Scored(model, "classifier", identity, names, found.scores_NC, columns_C, thresholds, found.failed)


def _by_labels(model: str, data: Dataset, options: ScoringOptions) -> Scored:
    folder = Path(model)
    run = read_run(folder)
    names = tuple(run["classes"])
    columns_C = matched_columns(names, data, model)
    base = run["cwd"]
    row_of = {os.path.abspath(path): row for row, path in enumerate(data.paths)}
    scores_NM = np.full((len(data.images), len(names)), np.nan, np.float32)
    for record in read_labels(folder):
        row = row_of.get(os.path.normpath(os.path.join(base, record.path)))
        if row is not None:
            scores_NM[row] = record.scores
    reasons = {os.path.normpath(os.path.join(base, e.path)): e.reason for e in read_errors(folder)}
    without = [data.paths[row] for row in np.flatnonzero(np.isnan(scores_NM).any(1))]
    unknown = [path for path in without if os.path.abspath(path) not in reasons]
    if unknown:
        raise DataError(
            f"{model} has no row for {len(unknown):,} of {len(data.images):,} images, such as {unknown[0]}",
            "labels of all images of the data",
            "label that folder too, or count only the first images with --limit",
        )
    own = Thresholds(tuple(run["thresholds"]), run["threshold_source"])
    thresholds = _own_or_given(options, names, own)
    failed = [(path, reasons[os.path.abspath(path)]) for path in without]
    return Scored(model, "labels", run["fingerprint"], names, scores_NM, columns_C, thresholds, failed)


def _by_tagger(model: str, data: Dataset, options: ScoringOptions) -> Scored:
    kind = kind_of_model(model)
    settings = TaggerSettings(model=model, views=options.views, device=options.device)
    plan = make_plan(settings, None if kind in ("bundle", "server") else data.vocabulary)
    names = plan.vocabulary.names
    columns_C = matched_columns(names, data, model)
    thresholds = _own_or_given(options, names, Thresholds(plan.thresholds, plan.threshold_source))
    scores_NM = np.full((len(data.images), len(names)), np.nan, np.float32)
    failed = []
    with (
        load_plan(plan) as tagger,
        ProgressBar("scoring", len(data.images), quiet=options.quiet) as bar,
    ):
        loaded = ahead(lambda ref: _load(ref, tagger.room), data.images, options.workers or usable_cores())
        for batch in _batches(loaded, options.batch_size or plan.images_per_batch):
            good = [(row, found) for row, found in batch if isinstance(found, Picture)]
            if good:
                rows = [row for row, _ in good]
                scores_NM[rows] = tagger.score([picture for _, picture in good])["scores"]
            failed += [(data.paths[row], found) for row, found in batch if isinstance(found, str)]
            bar.advance(len(batch))
    return Scored(model, kind, plan.fingerprint(), names, scores_NM, columns_C, thresholds, failed, plan)


def _load(ref: ImageRef, room: dict[str, int]) -> Picture | str:
    """The picture, or why there is none."""
    try:
        return decode_image(read_image(ref), **room)
    except ImageError as error:
        return error.reason


def _batches(loaded: Iterator[Picture | str], size: int) -> Iterator[list[tuple[int, Picture | str]]]:
    numbered = enumerate(loaded)
    while batch := list(islice(numbered, size)):
        yield batch

"""From which score on a class is a label: what a plan finds beside a model, in a bundle, or among its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cliplet.errors import ArtifactError, UsageError
from cliplet.model_spec import ModelSpec
from cliplet.thresholds import THRESHOLDS_FILE, Thresholds, read_entries, thresholds_from_json
from cliplet.views import Aggregation
from cliplet.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from cliplet.plan import TaggerSettings


def own_vocabulary(spec: ModelSpec) -> Vocabulary | None:
    """The class names that lie beside a model's weights."""
    file = spec.folder / "classes.txt" if spec.folder else None
    return read_vocabulary(str(file)) if file and file.is_file() else None


def classifier_thresholds(spec: ModelSpec) -> dict[str, Any]:
    """The thresholds that lie beside a classifier, as those of its one way to look."""
    assert spec.classifier is not None
    file = spec.classifier / THRESHOLDS_FILE
    return {"1": read_entries(file)} if file.is_file() else {}


def calibrated_thresholds(spec: ModelSpec, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a model's folder says of thresholds: for each way to look a value, and how it was found.

    They were found for the model's own classes and prompts; softmax scores among others mean something else.
    """
    own = own_vocabulary(spec)
    file = spec.folder / THRESHOLDS_FILE if spec.folder else None
    if own is None or file is None or not file.is_file() or own.to_json() != vocabulary.to_json():
        return {}
    return read_entries(file)


def chosen_thresholds(
    settings: TaggerSettings,
    names: Sequence[str],
    views: str,
    aggregation: Aggregation,
    calibrated: Mapping[str, Any],
    usual: float,
) -> Thresholds:
    """The value that was asked for, or what was calibrated for this way to look, or the usual one.

    Raises:
        ArtifactError: what was calibrated is no good.
    """
    if settings.threshold is not None:
        return Thresholds.same(settings.threshold, names, "given")
    entry = calibrated.get(views)
    where = f"{settings.model}, views {views},"
    if entry is not None and aggregation == _aggregation_of(entry, where):
        return thresholds_from_json(entry, names, where)
    return Thresholds.same(usual, names, "not calibrated for this model; choose one with --threshold")


def _aggregation_of(entry: object, where: str) -> Aggregation:
    """What an entry of thresholds was found with; the usual aggregation if it names none."""
    named = entry.get("aggregation", {}) if isinstance(entry, Mapping) else {}
    try:
        return Aggregation(**named)
    except (TypeError, UsageError) as error:
        raise ArtifactError(
            f"{where} has thresholds for the aggregation {named!r}",
            'an aggregation such as {"kind": "cdul", "zeta": 0.0}',
            "cliplet calibrate MODEL writes it anew",
        ) from error

"""Which model labels, with which names, looking where, from which score on: all that is decided before an engine.

Legend: C classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from cliplet.artifact import Bundle
from cliplet.errors import UsageError
from cliplet.model_spec import ModelSpec, parse_model_spec
from cliplet.thresholds import THRESHOLDS_FILE, Thresholds, thresholds_from_json
from cliplet.views import Aggregation, Views
from cliplet.vocabulary import Vocabulary, prompt_set, read_vocabulary

DEFAULT_VIEWS = "1+3x3"
# Where nothing was calibrated. Softmax scores of present objects usually lie above it; it is only a start.
DEFAULT_THRESHOLD = 0.3
# Views in one batch: enough to fill the engine's matrix products, few enough to stay within a few hundred MB.
VIEWS_PER_BATCH = 32
RUNTIMES = ("onnx", "torch")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TaggerSettings:
    """Which model labels, with which names, looking where.

    Attributes:
        model: see `cliplet.model_spec`.
        classes: a class file, or names separated by commas; needed unless the model brings its own.
        prompts: a prompt set's name, or templates with {} in them separated by `|`.
        views: such as `1`, `1+2x2`, `1+3x3`.
        aggregate, zeta: see `cliplet.views.Aggregation`; by default the bundle's own, or `cdul` with 0.
        threshold: score from which on a class is a label; by default the model's own, if it was calibrated.
        runtime: `onnx` (onnxruntime) or `torch` (eager, the reference).
        threads: of the engine; 0 means one a core.
    """

    model: str = "tiny"
    classes: str | None = None
    prompts: str | None = None
    views: str = DEFAULT_VIEWS
    aggregate: str | None = None
    zeta: float | None = None
    threshold: float | None = None
    runtime: str = "onnx"
    device: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("runtime", self.runtime, RUNTIMES), ("device", self.device, DEVICES)):
            if value not in known:
                raise UsageError(f"{name} {value!r}", f"one of {', '.join(known)}", f"--{name} {known[0]}")
        if self.threads < 0:
            raise UsageError(
                f"--threads {self.threads}", "a whole number from 0 on", "--threads 0 means one a core"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold {self.threshold}", "a score between 0 and 1", "--threshold 0.3")


@dataclass(frozen=True)
class Plan:
    """All that is decided before an engine is loaded: what a run does, and what its results depend on."""

    settings: TaggerSettings
    spec: ModelSpec
    vocabulary: Vocabulary
    views: Views
    aggregation: Aggregation
    thresholds: tuple[float, ...]
    threshold_source: str
    bundle: Bundle | None
    calibrated: dict[str, Any]

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for two runs to give the same scores and labels."""
        return {
            "model": self.bundle.manifest.identity if self.bundle else self.spec.identity(),
            "vocabulary": self.vocabulary.to_json(),
            "views": str(self.views),
            "aggregation": self.aggregation.to_json(),
            "thresholds": list(self.thresholds),
            "runtime": f"{self.settings.runtime}/{self.settings.device}",
        }

    @property
    def images_per_batch(self) -> int:
        """Images that make a batch of about VIEWS_PER_BATCH views."""
        return max(1, VIEWS_PER_BATCH // self.views.count)


def make_plan(settings: TaggerSettings, vocabulary: Vocabulary | None = None) -> Plan:
    """Everything about a tagger that can be known, and refused, without loading an engine.

    Args:
        vocabulary: the classes and prompts, where they are no text that a settings field could hold.

    Raises:
        UsageError, DataError, ArtifactError: the model, classes, prompts, views or thresholds are no good.
    """
    spec = parse_model_spec(settings.model)
    views = Views.parse(settings.views)
    bundle = Bundle.load(spec.bundle) if spec.bundle else None
    if bundle is not None:
        own = _bundle_vocabulary(bundle, settings, vocabulary)
        aggregation = _bundle_aggregation(bundle, settings)
        calibrated = dict(bundle.manifest.thresholds)
    else:
        own = vocabulary or _chosen_vocabulary(spec, settings)
        aggregation = _asked_aggregation(settings, Aggregation())
        calibrated = _calibrated_thresholds(spec, own)
    thresholds = _thresholds(settings, own, str(views), aggregation, calibrated)
    found, source = thresholds.values, thresholds.source
    return Plan(settings, spec, own, views, aggregation, found, source, bundle, calibrated)


def _bundle_vocabulary(bundle: Bundle, settings: TaggerSettings, given: Vocabulary | None) -> Vocabulary:
    vocabulary = bundle.manifest.vocabulary
    prompts = prompt_set(settings.prompts) if settings.prompts else (given or vocabulary).prompts
    asked = (
        (given or vocabulary).names if settings.classes is None else read_vocabulary(settings.classes).names
    )
    if asked != vocabulary.names or prompts != vocabulary.prompts:
        raise UsageError(
            f"the bundle {bundle.folder} was made for other classes or prompts than --classes and --prompts name",
            f"its own {len(vocabulary.names)} classes ({', '.join(vocabulary.names[:8])}, …)",
            f"leave both out, or start from its original: --model {bundle.manifest.model}",
        )
    return vocabulary


def _bundle_aggregation(bundle: Bundle, settings: TaggerSettings) -> Aggregation:
    own = Aggregation(**bundle.manifest.aggregation)
    if _asked_aggregation(settings, own) != own:
        raise UsageError(
            f"the bundle {bundle.folder} aggregates with {own.kind}, zeta {own.zeta}: that is inside its graph",
            "no other --aggregate or --zeta",
            f"leave both out, or start from its original: --model {bundle.manifest.model}",
        )
    return own


def _asked_aggregation(settings: TaggerSettings, usual: Aggregation) -> Aggregation:
    kind = usual.kind if settings.aggregate is None else settings.aggregate
    return Aggregation(kind, usual.zeta if settings.zeta is None else settings.zeta)


def _chosen_vocabulary(spec: ModelSpec, settings: TaggerSettings) -> Vocabulary:
    prompts = prompt_set(settings.prompts) if settings.prompts else None
    if settings.classes is not None:
        return read_vocabulary(settings.classes, prompts)
    own = _own_vocabulary(spec)
    if own is None:
        raise UsageError(
            f"{spec} brings no class names of its own",
            "a class file with one name a line, or names separated by commas",
            "--classes classes.txt, or --classes 'cat,dog,person'",
        )
    return own if prompts is None else replace(own, prompts=prompts)


def _own_vocabulary(spec: ModelSpec) -> Vocabulary | None:
    """The class names that lie beside a model's weights."""
    file = spec.folder / "classes.txt" if spec.folder else None
    return read_vocabulary(str(file)) if file and file.is_file() else None


def _calibrated_thresholds(spec: ModelSpec, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a model's folder says of thresholds: for each way to look a value, and how it was found.

    They were found for the model's own classes and prompts; softmax scores among others mean something else.
    """
    own = _own_vocabulary(spec)
    file = spec.folder / THRESHOLDS_FILE if spec.folder else None
    if own is None or file is None or not file.is_file() or own.to_json() != vocabulary.to_json():
        return {}
    calibrated: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return calibrated


def _thresholds(
    settings: TaggerSettings,
    vocabulary: Vocabulary,
    views: str,
    aggregation: Aggregation,
    calibrated: dict[str, Any],
) -> Thresholds:
    if settings.threshold is not None:
        return Thresholds.same(settings.threshold, vocabulary.names, "given")
    entry = calibrated.get(views)
    # An entry that names no aggregation was found with the usual one.
    named = entry.get("aggregation", {}) if isinstance(entry, dict) else {}
    if entry is not None and aggregation == Aggregation(**named):
        return thresholds_from_json(entry, vocabulary.names, f"{settings.model}, views {views},")
    return Thresholds.same(
        DEFAULT_THRESHOLD, vocabulary.names, "not calibrated for this model; choose one with --threshold"
    )

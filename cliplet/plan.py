"""Which model labels, with which names, looking where, from which score on: all that is decided before an engine.

Legend: C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from cliplet.artifact import Bundle, Engine, Manifest
from cliplet.contract import CLASSIFIER, SNIPPETS, TRUNK, GraphContract
from cliplet.errors import UsageError
from cliplet.model_spec import ModelSpec, parse_model_spec
from cliplet.plan_checks import (
    asked_aggregation,
    chosen_views,
    gives_features,
    hold_labels,
    hold_vocabulary,
    own_aggregation,
    refuse_aggregation,
    refuse_labels,
)
from cliplet.plan_thresholds import (
    calibrated_thresholds,
    chosen_thresholds,
    classifier_thresholds,
    own_vocabulary,
)
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.serving import ModelCard
from cliplet.views import Aggregation, Views
from cliplet.vocabulary import NO_CLASSES, Vocabulary, prompt_set, read_vocabulary

DEFAULT_VIEWS = "1+3x3"
# Where nothing was calibrated. Softmax scores of present objects usually lie above it; it is only a start.
DEFAULT_THRESHOLD = 0.3
# A sigmoid's middle; where a classifier was not calibrated there is nothing better.
CLASSIFIER_THRESHOLD = 0.5
# Views in one batch: enough to fill the engine's matrix products, few enough to stay within a few hundred MB.
VIEWS_PER_BATCH = 32
RUNTIMES = ("auto", "openvino", "onnx", "tensorrt", "tensorrt_rtx", "torch")
# What runs on a device, and what `auto` takes, best first. On a CPU OpenVINO is the faster one where it is installed.
PREFERRED = {"cpu": ("openvino", "onnx"), "cuda": ("tensorrt", "tensorrt_rtx", "onnx")}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DEVICES = ("cpu", "cuda")
# The precisions that a runtime's engines are built in.
OFFERED = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "tensorrt": ("fp32", "fp16", "bf16"),
    "tensorrt_rtx": ("fp32", "fp16", "bf16"),
}
# The precisions of the eager model, for which nothing is built.
TORCH_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class TaggerSettings:
    """Which model labels, with which names, looking where.

    Attributes:
        model: see `cliplet.model_spec`.
        classes: a class file, or names separated by commas; needed unless the model brings its own.
        prompts: a prompt set's name, or templates with {} in them separated by `|`.
        views: such as `1`, `1+2x2`, `1+3x3`; by default the last, or `1` for a classifier, which has no other.
        aggregate, zeta: see `cliplet.views.Aggregation`; by default the bundle's own, or `cdul` with 0. A
            classifier has neither.
        threshold: score from which on a class is a label; by default the model's own, if it was calibrated.
        runtime: `openvino`, `onnx` (onnxruntime), `tensorrt`, `tensorrt_rtx`, `torch` (eager, the reference), or
            `auto`: the first of them that is there for the device and has the precision.
        precision: of the encoder: `fp32`, `fp16`, `bf16` or `int8`; which runtime has which stands in OFFERED.
        threads: of the engine; 0 means one a core.
        connection: how to talk to a server, if the model is on one.
    """

    model: str = "tiny"
    classes: str | None = None
    prompts: str | None = None
    views: str | None = None
    aggregate: str | None = None
    zeta: float | None = None
    threshold: float | None = None
    runtime: str = "auto"
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 0
    connection: ConnectionSettings = field(default_factory=ConnectionSettings)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("runtime", self.runtime, RUNTIMES),
            ("precision", self.precision, PRECISIONS),
            ("device", self.device, DEVICES),
        ):
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
    """All that is decided before an engine is loaded: what a run does, and what its results depend on.

    Attributes:
        bundle: where the model is one on this machine.
        runtime: what will run it; `triton` where a server does.
        engine: the bundle's engine that will run; None where there is no bundle yet, or `torch` runs.
        card: what a server says of the bundle that it serves.
    """

    settings: TaggerSettings
    spec: ModelSpec
    vocabulary: Vocabulary
    views: Views
    aggregation: Aggregation
    thresholds: tuple[float, ...]
    threshold_source: str
    bundle: Bundle | None
    calibrated: dict[str, Any]
    runtime: str
    engine: Engine | None
    card: ModelCard | None = None

    @property
    def manifest(self) -> Manifest | None:
        """What is known of the bundle, here or on a server; None where there is none yet."""
        if self.card is not None:
            return self.card.manifest
        return None if self.bundle is None else self.bundle.manifest

    @property
    def contract(self) -> GraphContract:
        """The graph that its engine runs."""
        if self.manifest is not None:
            return self.manifest.contract
        if self.spec.trunk:
            return TRUNK
        return CLASSIFIER if self.spec.classifier else SNIPPETS

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for two runs to give the same scores and labels.

        A server counts as the engine that it runs: the same job may go on with the bundle itself, through another
        server of it, or through the same one at another address.
        """
        # Other bundles of the same weights, such as one that was calibrated on other images, score otherwise.
        files = self.manifest.files_of(self.engine) if self.manifest and self.engine else None
        return {
            **({"engine": files} if files else {}),
            "model": self.manifest.identity if self.manifest else self.spec.identity(),
            "vocabulary": self.vocabulary.to_json(),
            "views": str(self.views),
            "aggregation": self.aggregation.to_json(),
            "thresholds": list(self.thresholds),
            "runtime": "/".join(self._computed_by()),
        }

    def _computed_by(self) -> tuple[str, str, str]:
        """Runtime, precision and device of the engine, wherever it is."""
        if self.card is None or self.engine is None:
            return self.runtime, self.settings.precision, self.settings.device
        return self.engine.runtime, self.engine.precision, "cpu" if self.card.device == "cpu" else "cuda"

    @property
    def images_per_batch(self) -> int:
        """Images that make a batch of about VIEWS_PER_BATCH views."""
        return max(1, VIEWS_PER_BATCH // self.views.count)


def make_plan(
    settings: TaggerSettings, vocabulary: Vocabulary | None = None, *, features: bool = False
) -> Plan:
    """Everything about a tagger that can be known, and refused, without loading an engine.

    Args:
        vocabulary: the classes and prompts, where they are no text that a settings field could hold.
        features: a trunk will do as well, which gives features of images and no labels.

    Raises:
        UsageError: runtime, device and precision do not go together, a bundle holds no such engine, or the model
            cannot do what was asked.
        DataError, ArtifactError: the model, classes or thresholds are no good.
        ServerError: the model is on a server that does not answer.
    """
    if ServerAddress.is_meant(settings.model):
        from cliplet.plan_served import plan_of_server

        return plan_of_server(settings, vocabulary, features=features)
    if settings.runtime != "auto":
        _hold_offered(settings.runtime, settings.precision, settings.device)
    spec = parse_model_spec(settings.model)
    bundle = Bundle.load(spec.bundle) if spec.bundle else None
    manifest = bundle.manifest if bundle else None
    if not features:
        hold_labels(spec, manifest)
    if gives_features(spec, manifest):
        return _plan_of_trunk(settings, spec, bundle)
    is_classifier = spec.classifier is not None or _is_classifier(bundle)
    if is_classifier:
        refuse_aggregation(settings)
    if bundle is not None:
        aggregation = own_aggregation(bundle.manifest, settings)
        calibrated = dict(bundle.manifest.thresholds)
        own = bundle.manifest.vocabulary
    elif spec.classifier is not None:
        own = Vocabulary.from_json(spec.classifier_details()["vocabulary"], settings.model)
        aggregation = asked_aggregation(settings, Aggregation())
        calibrated = classifier_thresholds(spec)
    else:
        own = vocabulary or _chosen_vocabulary(spec, settings)
        aggregation = asked_aggregation(settings, Aggregation())
        calibrated = calibrated_thresholds(spec, own)
    if spec.bundle or spec.classifier:
        hold_vocabulary(own, settings, vocabulary, bundle)
    usual_views = "1" if is_classifier else DEFAULT_VIEWS
    views = chosen_views(settings, looks_once=is_classifier, usual=usual_views)
    usual = CLASSIFIER_THRESHOLD if is_classifier else DEFAULT_THRESHOLD
    thresholds = chosen_thresholds(settings, own.names, str(views), aggregation, calibrated, usual)
    runtime, engine = _engine(settings, bundle)
    return Plan(
        settings,
        spec,
        own,
        views,
        aggregation,
        thresholds.values,
        thresholds.source,
        bundle,
        calibrated,
        runtime,
        engine,
    )


def _plan_of_trunk(settings: TaggerSettings, spec: ModelSpec, bundle: Bundle | None) -> Plan:
    """The plan of a model that has no classes, and looks at whole images."""
    refuse_labels(settings)
    views = chosen_views(settings, looks_once=True, usual="1")
    runtime, engine = _engine(settings, bundle)
    return Plan(
        settings, spec, NO_CLASSES, views, Aggregation(), (), "it has none", bundle, {}, runtime, engine
    )


def _engine(settings: TaggerSettings, bundle: Bundle | None) -> tuple[str, Engine | None]:
    """The runtime, and the bundle's engine for it; None where there is no bundle, or the eager model runs."""
    runtime = _runtime(settings, bundle)
    if bundle is None or runtime == "torch":
        return runtime, None
    return runtime, find_engine(bundle, runtime, settings.precision, settings.device)


def usable_runtimes(device: str) -> list[str]:
    """The runtimes whose library is installed and that run on `device`, best first."""
    libraries = {"onnx": "onnxruntime"}
    return [name for name in PREFERRED[device] if find_spec(libraries.get(name, name)) is not None]


def find_engine(bundle: Bundle, runtime: str, precision: str, device: str) -> Engine:
    """The engine of a bundle that was asked for.

    Raises:
        UsageError: the bundle holds none such, or nobody could build it.
    """
    _hold_offered(runtime, precision, device)
    for engine in bundle.manifest.engines:
        on_cpu = engine.device == "cpu"
        # A graph for onnxruntime runs anywhere; an engine for a GPU was built for one kind of it.
        fits = engine.runtime == "onnx" or on_cpu == (device == "cpu")
        if (engine.runtime, engine.precision) == (runtime, precision) and fits:
            return engine
    held = ", ".join(engine.name for engine in bundle.manifest.engines)
    classes = " --classes CLASSES" if bundle.manifest.contract is SNIPPETS else ""
    raise UsageError(
        f"the bundle {bundle.folder} holds no engine {runtime}-{precision} for {device}",
        f"one of {held}",
        f"cliplet export {bundle.manifest.model}{classes} --runtime {runtime} --precision {precision} --out NEW",
    )


def _hold_offered(runtime: str, precision: str, device: str) -> None:
    """Raise `UsageError` unless a runtime runs on a device and has a precision."""
    if runtime != "torch" and runtime not in PREFERRED[device]:
        other = next(name for name in DEVICES if runtime in PREFERRED[name])
        raise UsageError(
            f"--runtime {runtime} with --device {device}",
            f"one of {', '.join((*PREFERRED[device], 'torch'))} for {device}; {runtime} runs on {other} alone",
            f"--device {other}",
        )
    offered = TORCH_PRECISIONS if runtime == "torch" else OFFERED[runtime]
    if precision not in offered:
        others = [name for name in PREFERRED[device] if precision in OFFERED[name]]
        raise UsageError(
            f"--runtime {runtime} with --precision {precision}",
            f"{runtime} has {', '.join(offered)}",
            f"--precision {offered[0]}, or --runtime {others[0]}",
        )


def _runtime(settings: TaggerSettings, bundle: Bundle | None) -> str:
    """The runtime that was asked for, or the best one that is here, has the precision and, for a bundle, is in it.

    Where there is none, the one whose absence is to be reported.
    """
    if settings.runtime != "auto":
        return settings.runtime
    offering = [name for name in PREFERRED[settings.device] if settings.precision in OFFERED[name]]
    if bundle is None:
        # TensorRT engines are built by `cliplet export` for one GPU; a graph for onnxruntime can be made at once.
        fitting = [name for name in offering if not name.startswith("tensorrt")]
    else:
        held = {e.runtime for e in bundle.manifest.engines if e.precision == settings.precision}
        fitting = [name for name in offering if name in held]
    usable = [name for name in usable_runtimes(settings.device) if name in fitting]
    return (usable or fitting or offering[-1:])[0]


def _is_classifier(bundle: Bundle | None) -> bool:
    return bundle is not None and bundle.manifest.contract is CLASSIFIER


def _chosen_vocabulary(spec: ModelSpec, settings: TaggerSettings) -> Vocabulary:
    prompts = prompt_set(settings.prompts) if settings.prompts else None
    if settings.classes is not None:
        return read_vocabulary(settings.classes, prompts)
    own = own_vocabulary(spec)
    if own is None:
        raise UsageError(
            f"{spec} brings no class names of its own",
            "a class file with one name a line, or names separated by commas",
            "--classes classes.txt, or --classes 'cat,dog,person'",
        )
    return own if prompts is None else replace(own, prompts=prompts)

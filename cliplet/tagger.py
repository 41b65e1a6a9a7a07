"""`load(model)`: one object that labels images, whatever the model is and whichever runtime runs it.

Legend: B images, V views, C classes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cliplet.artifact import MODEL_FILE, Bundle, SnippetsJob
from cliplet.contract import SNIPPETS
from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.images import ImageRef, decode_image, read_image
from cliplet.labels import LabelRecord
from cliplet.model_spec import ModelSpec, parse_model_spec
from cliplet.runners import Runner
from cliplet.views import Aggregation, Preprocessing, Views, place_on_canvas
from cliplet.vocabulary import Vocabulary, prompt_set, read_vocabulary

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("cliplet")
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
        aggregate, zeta: see `cliplet.views.Aggregation`.
        threshold: score from which on a class is a label; by default the model's own, if it was calibrated.
        runtime: `onnx` (onnxruntime) or `torch` (eager, the reference).
        threads: of the engine; 0 means one a core.
    """

    model: str = "tiny"
    classes: str | None = None
    prompts: str | None = None
    views: str = DEFAULT_VIEWS
    aggregate: str = "cdul"
    zeta: float = 0.0
    threshold: float | None = None
    runtime: str = "onnx"
    device: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("runtime", self.runtime, RUNTIMES), ("device", self.device, DEVICES)):
            if value not in known:
                raise UsageError(f"{name} {value!r}", f"one of {', '.join(known)}", f"--{name} {known[0]}")
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


def plan(settings: TaggerSettings) -> Plan:
    """Everything about a tagger that can be known, and refused, without loading an engine.

    Raises:
        UsageError, DataError, ArtifactError: the model, classes, prompts, views or thresholds are no good.
    """
    spec = parse_model_spec(settings.model)
    views = Views.parse(settings.views)
    aggregation = Aggregation(settings.aggregate, settings.zeta)
    bundle = Bundle.load(spec.bundle) if spec.bundle else None
    if bundle is not None:
        vocabulary = _bundle_vocabulary(bundle, settings)
        aggregation = Aggregation(**bundle.manifest.aggregation)
        calibrated = dict(bundle.manifest.thresholds)
    else:
        vocabulary = _chosen_vocabulary(spec, settings)
        calibrated = _calibrated_thresholds(spec)
    value, source = _threshold(settings, str(views), calibrated)
    thresholds = (value,) * len(vocabulary.names)
    return Plan(settings, spec, vocabulary, views, aggregation, thresholds, source, bundle, calibrated)


class Tagger:
    """A model ready to label images; a context manager that frees its engine.

    Attributes:
        plan: what was decided: vocabulary, views, thresholds.
        runner: the engine.
        preprocessing: what the encoder is fed.
    """

    def __init__(self, chosen: Plan, runner: Runner, preprocessing: Preprocessing) -> None:
        self.plan = chosen
        self.runner = runner
        self.preprocessing = preprocessing
        self._thresholds_C = np.asarray(chosen.thresholds, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of every score vector."""
        return self.plan.vocabulary.names

    @property
    def fit(self) -> int:
        """Longest side in pixels to which images may be shrunk when they are decoded."""
        return self.plan.views.fit(self.preprocessing)

    def score(
        self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """`scores` float32 [B, C] and `view_probs` float32 [B, V, C] of images uint8 [h, w, 3] RGB.

        Args:
            boxes: float32 [v, 4] for each image, in its pixels, to look at in place of the grids.

        Raises:
            DataError: a score is not finite.
        """
        feeds = place_on_canvas(pictures, self.plan.views, self.preprocessing, boxes)
        outputs = self.runner.infer(feeds)
        if not np.isfinite(outputs["scores"]).all():
            raise DataError(
                "the engine returned scores that are not finite", "probabilities", "try --runtime torch"
            )
        return outputs

    def labels_of(self, scores_C: np.ndarray) -> tuple[str, ...]:
        """Names of the classes at or above their threshold, best first."""
        order = np.argsort(-scores_C, kind="stable")
        return tuple(self.classes[c] for c in order if scores_C[c] >= self._thresholds_C[c])

    def label(
        self,
        images: Sequence[str | os.PathLike[str] | np.ndarray | Image.Image],
        boxes: Sequence[np.ndarray] | None = None,
    ) -> list[LabelRecord]:
        """One record for each image: a path, a PIL image, or an array uint8 [h, w, 3] RGB.

        With `boxes`, images have to be arrays or PIL images, since boxes are in their pixels.

        Raises:
            DataError: an image cannot be read or decoded.
        """
        records = []
        step = self.plan.images_per_batch
        for start in range(0, len(images), step):
            chunk = [self._picture(image) for image in images[start : start + step]]
            began = perf_counter()
            own = None if boxes is None else boxes[start : start + step]
            scores_BC = self.score([pixels for _, pixels, _ in chunk], own)["scores"]
            seconds = (perf_counter() - began) / len(chunk)
            for (path, _, (width, height)), scores_C in zip(chunk, scores_BC, strict=True):
                records.append(self.record(path, (width, height), scores_C, seconds))
        return records

    def record(self, path: str, size: tuple[int, int], scores_C: np.ndarray, seconds: float) -> LabelRecord:
        """The row of one scored image of `size` (width, height)."""
        return LabelRecord(path, *size, self.labels_of(scores_C), scores_C, str(self.plan.spec), seconds)

    def _picture(
        self, image: str | os.PathLike[str] | np.ndarray | Image.Image
    ) -> tuple[str, np.ndarray, tuple[int, int]]:
        if isinstance(image, str | os.PathLike):
            path = os.fspath(image)
            picture = decode_image(read_image(ImageRef(path, path)), fit=self.fit)
            return path, picture.pixels, (picture.width, picture.height)
        pixels = np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise DataError(
                f"an image of {pixels.dtype} {list(pixels.shape)}", "uint8 [height, width, 3], RGB"
            )
        return "", pixels, (pixels.shape[1], pixels.shape[0])


def load(model: str = "tiny", **settings: Any) -> Tagger:
    """A tagger for `model`; further settings are the fields of `TaggerSettings`.

    >>> tagger = cliplet.load("tiny", classes="cat, dog", views="1+3x3")
    >>> tagger.label(["photo.jpg"])[0].labels
    """
    return load_plan(plan(TaggerSettings(model=model, **settings)))


def load_plan(chosen: Plan) -> Tagger:
    """The tagger that `chosen` describes, its engine loaded.

    Raises:
        EnvironmentError_: this machine lacks the runtime, the device or the weights.
        ParityError: an exported graph does not agree with its original.
    """
    settings = chosen.settings
    if settings.runtime == "torch":
        return _load_eager(chosen)
    from cliplet.runners.onnx_runner import OnnxRunner

    bundle = chosen.bundle or _exported(chosen)
    runner = OnnxRunner(bundle.folder / MODEL_FILE, SNIPPETS, settings.device, settings.threads)
    return Tagger(chosen, runner, bundle.manifest.preprocessing)


def _load_eager(chosen: Plan) -> Tagger:
    if chosen.bundle is not None:
        raise UsageError(
            f"{chosen.spec} is a bundle: it holds a graph, not a torch model",
            "--runtime onnx for a bundle",
            f"use its original: --model {chosen.bundle.manifest.model} --runtime torch",
        )
    try:
        from cliplet.runners.torch_runner import TorchRunner
        from cliplet.teacher import load_teacher
    except ImportError as error:
        raise _lacks(f"--runtime torch needs {error.name}") from error
    teacher = load_teacher(chosen.spec)
    module = teacher.snippets(chosen.vocabulary, chosen.aggregation)
    runner = TorchRunner(module, SNIPPETS, chosen.settings.device, chosen.settings.threads)
    return Tagger(chosen, runner, teacher.preprocessing)


def _exported(chosen: Plan) -> Bundle:
    """The bundle of an open_clip model: from the cache, or made by the exporter that is installed."""
    job = SnippetsJob(chosen.spec, chosen.vocabulary, chosen.aggregation, chosen.calibrated)
    if job.cached_folder().exists():
        return Bundle.load(job.cached_folder())
    log.info("exporting %s to ONNX and comparing it with the original; once, then it is cached", chosen.spec)
    (exporter,) = entry_points(group="cliplet.exporters", name="onnx")
    try:
        export = exporter.load()
    except ImportError as error:
        raise _lacks(f"{chosen.spec} has to be exported to ONNX first, which needs {error.name}") from error
    bundle: Bundle = export(job)
    return bundle


def _lacks(happened: str) -> EnvironmentError_:
    return EnvironmentError_(
        happened,
        "torch and open_clip, or a bundle that was exported elsewhere",
        "pip install 'cliplet[export]'",
    )


def _bundle_vocabulary(bundle: Bundle, settings: TaggerSettings) -> Vocabulary:
    vocabulary = bundle.manifest.vocabulary
    if settings.classes is not None and read_vocabulary(settings.classes).names != vocabulary.names:
        raise UsageError(
            f"the bundle {bundle.folder} was made for {len(vocabulary.names)} classes, --classes names others",
            f"the classes in it: {', '.join(vocabulary.names[:8])}, …",
            "leave out --classes, or use the original model",
        )
    return vocabulary


def _chosen_vocabulary(spec: ModelSpec, settings: TaggerSettings) -> Vocabulary:
    prompts = prompt_set(settings.prompts) if settings.prompts else None
    if settings.classes is not None:
        return read_vocabulary(settings.classes, prompts)
    own = spec.folder / "classes.txt" if spec.folder else None
    if own is None or not own.is_file():
        raise UsageError(
            f"{spec} brings no class names of its own",
            "a class file with one name a line, or names separated by commas",
            "--classes classes.txt, or --classes 'cat,dog,person'",
        )
    return read_vocabulary(str(own), prompts)


def _calibrated_thresholds(spec: ModelSpec) -> dict[str, Any]:
    """What a model's folder says of thresholds: for each way to look a value, and how it was found."""
    file = spec.folder / "thresholds.json" if spec.folder else None
    if file is None or not file.is_file():
        return {}
    calibrated: dict[str, Any] = json.loads(file.read_text())
    return calibrated


def _threshold(settings: TaggerSettings, views: str, calibrated: dict[str, Any]) -> tuple[float, str]:
    if settings.threshold is not None:
        return settings.threshold, "given"
    usual = settings.aggregate == "cdul" and settings.zeta == 0
    if usual and views in calibrated:
        return float(calibrated[views]["value"]), f"calibrated with the model: {calibrated[views]['how']}"
    return DEFAULT_THRESHOLD, "a default that was not calibrated for this model; choose one with --threshold"

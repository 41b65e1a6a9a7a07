"""Builds bundles: traced once, written for every engine that was asked for, each compared with the original.

    build_bundle(job, Path("bundle"), BuildOptions(images=("photos",)))

Nothing is left behind unless every engine agrees with the original. Tracing a large encoder takes most of a minute,
so the traced graph is kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.artifact import (
    MODEL_FILE,
    TEXT_FILE,
    WRITABLE_CACHE,
    Bundle,
    BundleJob,
    Engine,
    Manifest,
    cache_folder,
    move_whole,
    staging_folder,
)
from cliplet.contract import CLASSIFIER, FEATURES, SNIPPETS
from cliplet.errors import ParityError, UsageError, explained_os_errors
from cliplet.machine import usable_cores
from cliplet.model_spec import file_sha256
from cliplet.plan import CLASSIFIER_THRESHOLD, DEFAULT_THRESHOLD, DEFAULT_VIEWS, OFFERED
from cliplet.runners import Runner, open_runner
from cliplet.runners.torch_runner import TorchRunner
from cliplet.thresholds import Thresholds, thresholds_from_json
from cliplet.views import Aggregation, Preprocessing, Views
from cliplet.vocabulary import Vocabulary

from .onnx_graph import name_axes, set_metadata, set_vocabulary, trace
from .originals import Original, load_original
from .parity import Gate, verdict
from .samples import CALIBRATION_SEED, COMPARISON_SEED, Samples, file_samples, scene_samples
from .tensorrt_engine import Profile, build_engine
from .text_tower import export_text

log = logging.getLogger("cliplet")
SEAL_FILE = "sha256"
REFERENCE = ("onnx", "fp32")
PLAIN_IR = "openvino/model.xml"
# Looking twice at one image costs more than it tells: INT8 sees each as a whole and in four parts.
CALIBRATION_VIEWS = Views.parse("1+2x2")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a bundle is built.

    Attributes:
        images: sources of images to compare on; by default scenes.
        count: how many of them.
        calibration: sources of images for INT8; by default scenes, which suit `tiny` and little else.
        calibration_count: how many of them.
        target: GPU that TensorRT builds for, such as `sm89`; by default the one in this machine.
        profile: sizes that TensorRT builds for; its canvas is that of all images that may come, unless `own_canvas`.
        text: also write the text tower, to exchange the vocabulary without the original.
        threads: of engines on the CPU; 0 means one a core.
        keep_all: for measurements: keep engines that disagree or are slow, with their verdicts.
    """

    images: tuple[str, ...] = ()
    count: int = 32
    calibration: tuple[str, ...] = ()
    calibration_count: int = 128
    target: str | None = None
    profile: Profile = field(default_factory=Profile)
    own_canvas: bool = False
    text: bool = False
    threads: int = 0
    keep_all: bool = False


def engines_for(runtimes: tuple[str, ...], precisions: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """All (runtime, precision) pairs of the two lists that there are, the float32 graph always among them.

    Raises:
        UsageError: a runtime or a precision that none of the others goes with.
    """
    pairs = tuple((r, p) for r in runtimes for p in precisions if p in OFFERED[r])
    lonely = [r for r in runtimes if r not in {pair[0] for pair in pairs}]
    lonely += [p for p in precisions if p not in {pair[1] for pair in pairs}]
    if lonely:
        known = "; ".join(f"{runtime}: {', '.join(found)}" for runtime, found in OFFERED.items())
        raise UsageError(
            f"nothing is built for {' and '.join(lonely)} with the others named",
            known,
            "--runtime onnx --precision fp32",
        )
    return tuple(dict.fromkeys((REFERENCE, *pairs)))


def cached_bundle(job: BundleJob) -> Bundle:
    """The bundle for `job` in the cache: made and compared unless it is there.

    Raises:
        ParityError: an engine does not agree with the original; nothing is kept.
        ArtifactError: the cached bundle was changed.
        EnvironmentError_: the cache folder cannot be written.
    """
    folder = job.cached_folder()
    for runtime, precision in job.engines:
        if precision == "int8" or runtime.startswith("tensorrt"):
            raise UsageError(
                f"--runtime {runtime} --precision {precision} for {job.spec}, which is no bundle",
                "a bundle that was exported for it: it takes images to calibrate on, or a GPU to build for",
                f"cliplet export {job.spec} --runtime {runtime} --precision {precision} --out BUNDLE",
            )
        engines_for((runtime,), (precision,))
    if folder.exists():
        return Bundle.load(folder)
    return build_bundle(job, folder, BuildOptions(), fix=WRITABLE_CACHE)


def build_bundle(
    job: BundleJob, folder: Path, options: BuildOptions, fix: str = "choose another --out"
) -> Bundle:
    """The finished bundle in `folder`, which does not exist yet.

    Args:
        fix: what to do where the folder cannot be written.

    Raises:
        ParityError: an engine does not agree with the original; nothing is kept.
        EnvironmentError_: a library is missing, or the folder cannot be written.
        UsageError, DataError: the images are no good, or the model cannot be exported.
    """
    if options.text and job.contract is not SNIPPETS:
        raise UsageError(
            f"--text for {job.spec}", f"a CLIP: a {job.contract.name} has no text tower", "leave --text out"
        )
    original = load_original(job)
    with staging_folder(folder, fix) as staged:
        builder = _Builder(job, original, staged, options)
        manifest = builder.built()
        return Bundle.write(folder, manifest, staged)


@dataclass
class _Builder:
    job: BundleJob
    original: Original
    staged: Path
    options: BuildOptions

    def __post_init__(self) -> None:
        self.contract = self.original.contract
        self.model = self.staged / MODEL_FILE
        self.engines: list[Engine] = []
        self.dropped: list[dict[str, Any]] = []

    def built(self) -> Manifest:
        """The manifest, after every file was written and compared."""
        self._write_reference()
        self.gate = open_gate(self.original, self.job, self.options)
        for runtime, precision in self.job.engines:
            log.info("building and comparing %s in %s", runtime, precision)
            self._add(runtime, precision)
        self._remove_unused()
        if self.options.text and self.original.teacher is not None:
            export_text(self.original.teacher, self.job.vocabulary, self.staged / TEXT_FILE)
        spec = self.job.spec
        return Manifest(
            kind=self.contract.name,
            model=str(spec),
            identity=spec.identity(),
            vocabulary=self.job.vocabulary,
            preprocessing=self.original.preprocessing,
            aggregation=self.job.aggregation.to_json() if self.contract is SNIPPETS else {},
            scale=self.original.scale,
            bias=self.original.bias,
            thresholds=self.job.thresholds,
            engines=tuple(self.engines),
            dropped=tuple(self.dropped),
            trained=self._training(),
        )

    def _write_reference(self) -> None:
        traced = _traced_graph(self.job, self.original)
        if self.original.text_CD is None:
            name_axes(traced, self.model, self.contract, {"C": len(self.job.vocabulary.names)})
        else:
            set_vocabulary(traced, self.model, self.original.text_CD.numpy())
        self._describe(self.model)

    def _describe(self, graph: Path) -> None:
        if self.job.vocabulary.names:
            describe_graph(graph, self.job.vocabulary.names, self.job.thresholds)

    def _remove_unused(self) -> None:
        """The float32 IR that INT8 was made from goes, unless it is an engine itself."""
        if PLAIN_IR not in {engine.file for engine in self.engines}:
            for file in (self.staged / PLAIN_IR).parent.glob(f"{Path(PLAIN_IR).stem}.[xb]*"):
                file.unlink()

    def _add(self, runtime: str, precision: str) -> None:
        if runtime.startswith("tensorrt"):
            self._add_tensorrt(runtime, precision)
            return
        file, details = self._written(runtime, precision)
        with self._opened(runtime, precision, file) as runner:
            found = verdict(self.gate.compare(runner), precision, self.gate.samples)
            speed = {**self.gate.speed(runner), "threads": self.options.threads or usable_cores()}
            name = file.relative_to(self.staged).as_posix()
            engine = Engine(
                runtime, precision, name, runner.precision, runner.device, found, {**details, "speed": speed}
            )
            if (
                precision == "int8"
                and not self.options.keep_all
                and (reason := self._why_not(engine, runner))
            ):
                self._drop(engine, reason)
                return
        self._keep(engine)

    def _written(self, runtime: str, precision: str) -> tuple[Path, dict[str, Any]]:
        """The file for an engine on the CPU, and what is to be said of how it was made."""
        if runtime == "onnx":
            return self._onnx(precision)
        # A bundle in the cache serves one engine: no second copy of its weights.
        if len(self.job.engines) == 1 and precision != "int8":
            return self.model, {}
        from .openvino_ir import quantize_ir, write_ir

        plain = self.staged / PLAIN_IR
        if not plain.exists():
            plain.parent.mkdir(exist_ok=True)
            write_ir(self.model, plain)
        if precision != "int8":
            return plain, {}
        target = plain.with_name("model.int8.xml")
        samples = self._calibration()
        report = quantize_ir(plain, target, self._calibration_feeds(samples), len(samples.pictures))
        return target, {"calibrated_on": samples.described, "calibration_images": report.images}

    def _onnx(self, precision: str) -> tuple[Path, dict[str, Any]]:
        target = self.model if precision == "fp32" else self.model.with_name(f"model.{precision}.onnx")
        if target.exists():
            return target, {}
        if precision == "int8":
            from .quantize import quantize_onnx

            samples = self._calibration()
            report = quantize_onnx(
                self.model, target, self._calibration_feeds(samples), len(samples.pictures)
            )
            self._describe(target)
            return target, {"calibrated_on": samples.described, "calibration_images": report.images}
        from .precision import lower_precision

        lower_precision(self.model, target, precision)
        self._describe(target)
        return target, {}

    def _add_tensorrt(self, runtime: str, precision: str) -> None:
        source, _ = self._onnx(precision)
        options = self.options
        own = options.profile
        built = build_engine(
            source,
            self.staged,
            contract=self.contract,
            precision=precision,
            library=runtime,
            target=options.target,
            profile=own if options.own_canvas else own.for_preprocessing(self.original.preprocessing),
        )
        plan = self.staged / built.file
        if built.runs_here:
            with self._opened(runtime, precision, plan) as runner:
                found = verdict(self.gate.compare(runner, own), precision, self.gate.samples)
                details = {**built.facts, "speed": self.gate.speed(runner)}
        else:
            # No GPU here: what can be shown is that the graph it was built from agrees. onnxruntime has no products
            # in bfloat16 on a CPU, OpenVINO has.
            by = "openvino" if precision == "bf16" else "onnx"
            with self._opened(by, precision, source) as runner:
                found = verdict(self.gate.compare(runner), precision, self.gate.samples)
                found |= {"of": source.name, "by": runner.runtime}
            details = built.facts
        self._keep(Engine(runtime, precision, built.file, built.precision_read, built.target, found, details))

    def _keep(self, engine: Engine) -> None:
        if not self.options.keep_all:
            hold_parity(engine)
        self.engines.append(engine)

    def _opened(self, runtime: str, precision: str, file: Path) -> Runner:
        return open_runner(
            runtime,
            file,
            self.contract,
            precision=precision,
            threads=self.options.threads,
            observe=(FEATURES,),
            device="cuda" if runtime.startswith("tensorrt") else "cpu",
        )

    def _why_not(self, engine: Engine, runner: Runner) -> str | None:
        """Why an INT8 engine is not worth keeping, if it is not: it has to be faster than float32, and near enough."""
        if not engine.parity["passed"]:
            return "; ".join(engine.parity["breaches"])
        plain, _ = self._written(engine.runtime, "fp32")
        with self._opened(engine.runtime, "fp32", plain) as base:
            # Measured in turns, so that a drift of the machine meets both.
            ratios = [
                self.gate.speed(runner)["views_per_s"] / self.gate.speed(base)["views_per_s"]
                for _ in range(3)
            ]
        ratio = float(np.median(ratios))
        engine.details["speed"]["times_fp32"] = ratio
        return None if ratio > 1 else f"not faster: {ratio:.2f} times fp32 of the same runtime"

    def _drop(self, engine: Engine, reason: str) -> None:
        log.warning("%s is not kept: %s", engine.name, reason)
        self.dropped.append({"engine": engine.name, "why": reason, **vars(engine)})
        for file in self.staged.glob(f"{Path(engine.file).with_suffix('')}*"):
            file.unlink()

    def _calibration(self) -> Samples:
        options, fed = self.options, self.original.preprocessing
        if options.calibration:
            return told(
                file_samples(options.calibration, fed, options.calibration_count), "not calibrated on"
            )
        return scene_samples(self.job.vocabulary.names, fed, options.calibration_count, CALIBRATION_SEED)

    def _calibration_feeds(self, samples: Samples) -> Iterator[dict[str, np.ndarray]]:
        views = CALIBRATION_VIEWS if self.contract.takes_views else Views()
        return samples.batches(4, views, self.original.preprocessing, self.contract)

    def _training(self) -> Mapping[str, Any]:
        spec = self.job.spec
        if spec.classifier is None and spec.trunk is None:
            return {}
        details = spec.classifier_details() if spec.classifier else spec.trunk_details()
        return {k: v for k, v in details.items() if k not in ("vocabulary", "arrays", "schema", "kind")}


def open_gate(original: Original, job: BundleJob, options: BuildOptions) -> Gate:
    """What the original gives of the images that the engines of `job` are compared on."""
    samples = comparison_samples(job.vocabulary, original.preprocessing, options)
    for_tensorrt = any(runtime.startswith("tensorrt") for runtime, _ in job.engines)
    eager = TorchRunner(original.eager, original.contract, threads=options.threads, observe=(FEATURES,))
    with eager:
        thresholds = _thresholds(job).values
        profile = options.profile if for_tensorrt else None
        return Gate(eager, original.contract, original.preprocessing, samples, thresholds, profile)


def _thresholds(job: BundleJob) -> Thresholds:
    """Those of the way to look that is compared, where they were calibrated for it."""
    is_classifier = job.contract is CLASSIFIER
    usual = CLASSIFIER_THRESHOLD if is_classifier else DEFAULT_THRESHOLD
    entry = job.thresholds.get("1" if is_classifier else DEFAULT_VIEWS)
    named = entry.get("aggregation", {}) if isinstance(entry, dict) else {}
    if entry is None or Aggregation(**named) != job.aggregation:
        return Thresholds.same(usual, job.vocabulary.names, "not calibrated")
    return thresholds_from_json(entry, job.vocabulary.names, str(job.spec))


def comparison_samples(vocabulary: Vocabulary, fed: Preprocessing, options: BuildOptions) -> Samples:
    """The images that engines are compared on: one's own, or scenes.

    Raises:
        UsageError, DataError: there are none.
    """
    if not options.images:
        return scene_samples(vocabulary.names, fed, options.count, COMPARISON_SEED)
    return told(file_samples(options.images, fed, options.count, vocabulary), "not compared on")


def told(samples: Samples, what: str) -> Samples:
    """The samples, after files that could not be decoded were named with their reasons."""
    for path, reason in samples.failed:
        log.warning("%s %s: %s", what, path, reason)
    return samples


def describe_graph(graph: Path, names: Sequence[str], thresholds: Mapping[str, Any]) -> None:
    """Class names and thresholds into the file itself, for those who take it without the manifest."""
    facts = {"classes": list(names), "thresholds": dict(thresholds)}
    set_metadata(
        graph, {f"cliplet.{key}": json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    )


def hold_parity(engine: Engine) -> None:
    """Raise `ParityError` if an engine was found to differ by more than its precision allows."""
    if engine.parity["passed"]:
        return
    found = engine.parity
    would_pass = (
        f"largest {found['largest']:.2g}, mean {found['mean']:.2g}, cosine {found['cosine']:.5f}, "
        f"agreement {found['agreement']:.4f}"
    )
    raise ParityError(
        f"{engine.name} differs from the eager float32 model: {'; '.join(found['breaches'])}",
        f"the tolerance of {engine.precision}, on {found['on']}; what would pass is {would_pass}",
        "export in a higher --precision, or for another --runtime",
    )


def _traced_graph(job: BundleJob, original: Original) -> Path:
    """The traced graph for `job`: from the cache if it is there unchanged."""
    folder = cache_folder() / "graphs" / job.graph_key()
    if not _is_sealed(folder):
        with staging_folder(folder) as staged:
            trace(original.traced, original.contract, original.example, staged / MODEL_FILE)
            with explained_os_errors(folder, WRITABLE_CACHE):
                (staged / SEAL_FILE).write_text(_folder_sha256(staged))
                if not _is_sealed(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                move_whole(staged, folder)
    return folder / MODEL_FILE


def _is_sealed(folder: Path) -> bool:
    """Whether a traced graph is there and unchanged since it was written."""
    seal = folder / SEAL_FILE
    return seal.is_file() and seal.read_text() == _folder_sha256(folder)


def _folder_sha256(folder: Path) -> str:
    """One hash for all of a traced graph's files."""
    files = sorted(folder.glob(f"{MODEL_FILE}*"))
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()

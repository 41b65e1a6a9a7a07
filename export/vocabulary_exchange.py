"""A bundle's vocabulary exchanged without tracing: new text rows into the files that are there.

Legend: B images, V views, C classes, D embedding.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch.nn import functional

from cliplet.artifact import MODEL_FILE, TEXT_FILE, Bundle, Engine, Manifest, staging_folder
from cliplet.contract import FEATURES, SNIPPETS, TRUNK
from cliplet.errors import UsageError
from cliplet.plan import DEFAULT_THRESHOLD
from cliplet.runners import Runner, open_runner
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.snippets import aggregate
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation
from cliplet.vocabulary import Vocabulary

from .bundle import BuildOptions, comparison_samples, describe_graph, hold_parity
from .onnx_graph import set_vocabulary
from .parity import Gate, verdict
from .text_tower import rows_from_graph
from .verification import find_original

log = logging.getLogger("cliplet")


def exchange_vocabulary(
    bundle: Bundle, vocabulary: Vocabulary, folder: Path, options: BuildOptions
) -> Bundle:
    """A bundle in `folder`, which does not exist yet, with the classes and prompts of `vocabulary`.

    Its text rows come from the bundle's own text tower, or else from the original. Every engine is compared with the
    features of the old float32 graph, which agreed with the original, and a softmax computed anew. TensorRT engines
    hold their vocabulary inside and are dropped.

    Raises:
        UsageError: a classifier, whose classes are learned.
        ParityError: an engine does not agree; nothing is kept.
        EnvironmentError_: neither a text tower nor the original is here, or the folder cannot be written.
    """
    manifest = bundle.manifest
    if manifest.contract is not SNIPPETS:
        why = "has none" if manifest.contract is TRUNK else "has learned its own"
        raise UsageError(
            f"other classes for {bundle.folder}: a {manifest.kind} {why}",
            "the bundle of a CLIP",
            "cliplet train teaches a classifier other classes",
        )
    text_CD = _text_rows(bundle, vocabulary)
    with staging_folder(folder, "choose another --out") as staged:
        _copy_with(text_CD, bundle, staged)
        samples = comparison_samples(vocabulary, manifest.preprocessing, options)
        thresholds = (DEFAULT_THRESHOLD,) * len(vocabulary.names)
        with _NewHead(bundle, text_CD, options.threads) as reference:
            gate = Gate(reference, SNIPPETS, manifest.preprocessing, samples, thresholds)
        kept, dropped = [], []
        for engine in manifest.engines:
            if engine.runtime.startswith("tensorrt"):
                why = "an engine holds its vocabulary inside: export again from the original"
                log.warning("%s is not kept: %s", engine.name, why)
                dropped.append({"engine": engine.name, "why": why})
                continue
            kept.append(_compared(engine, gate, staged, options))
        for graph in staged.glob("model*.onnx"):
            describe_graph(graph, vocabulary.names, {})
        found = replace(
            manifest, vocabulary=vocabulary, thresholds={}, engines=tuple(kept), dropped=tuple(dropped)
        )
        return Bundle.write(folder, found, staged)


def _text_rows(bundle: Bundle, vocabulary: Vocabulary) -> np.ndarray:
    graph = bundle.folder / TEXT_FILE
    if graph.is_file():
        return rows_from_graph(graph, vocabulary)
    return load_teacher(find_original(bundle)).text_matrix(vocabulary).numpy()


def _copy_with(text_CD: np.ndarray, bundle: Bundle, staged: Path) -> None:
    """The bundle's files into `staged`, with new text rows; engines for a GPU are left out."""
    for name in bundle.manifest.files:
        source, target = bundle.folder / name, staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".onnx" and name != TEXT_FILE:
            set_vocabulary(source, target, text_CD)
        elif source.suffix == ".xml":
            from .openvino_ir import set_text

            set_text(source, target, text_CD)
        elif name.startswith(TEXT_FILE):
            shutil.copyfile(source, target)


def _compared(engine: Engine, gate: Gate, staged: Path, options: BuildOptions) -> Engine:
    with open_runner(
        engine.runtime,
        staged / engine.file,
        SNIPPETS,
        precision=engine.precision,
        threads=options.threads,
        observe=(FEATURES,),
    ) as runner:
        found = verdict(gate.compare(runner), engine.precision, gate.samples)
        found["against"] = "the old float32 graph's features, scored anew"
        details = {**engine.details, "speed": gate.speed(runner)}
        result = replace(engine, parity=found, precision_read=runner.precision, details=details)
    hold_parity(result)
    return result


class _NewHead:
    """The features of a bundle's float32 graph against other text rows: what the exchanged files have to give."""

    def __init__(self, bundle: Bundle, text_CD: np.ndarray, threads: int) -> None:
        self._manifest: Manifest = bundle.manifest
        self._text_CD = torch.from_numpy(text_CD)
        graph = bundle.folder / MODEL_FILE
        self._graph: Runner = OnnxRunner(graph, SNIPPETS, threads=threads, observe=(FEATURES,))
        self.runtime, self.device, self.precision = self._graph.runtime, "cpu", "fp32"
        self.concurrency = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graph.__exit__(kind, error, trace)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        features_ND = self._graph.infer(feeds)[FEATURES]
        unit_ND = functional.normalize(torch.from_numpy(features_ND).float(), dim=-1)
        logits_NC = self._manifest.scale * (unit_ND @ self._text_CD.T)
        bias = self._manifest.bias
        probs_NC = logits_NC.softmax(-1) if bias is None else (logits_NC + bias).sigmoid()
        probs_BVC = probs_NC.unflatten(0, feeds["boxes"].shape[:2])
        scores_BC = aggregate(probs_BVC, Aggregation(**self._manifest.aggregation))
        return {"view_probs": probs_BVC.numpy(), "scores": scores_BC.numpy(), FEATURES: features_ND}

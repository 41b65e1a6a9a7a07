"""Exports the `snippets` graph to ONNX and proves it equal to the module that it was traced from.

Tracing a large encoder takes most of a minute, so the traced graph is kept in the cache and only its text
matrix, one named initializer, is exchanged when the vocabulary changes.

Legend: B images, V views, C classes, D embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from cliplet.artifact import (
    MODEL_FILE,
    Bundle,
    BundleFile,
    Manifest,
    SnippetsJob,
    cache_folder,
    library_versions,
    staging_folder,
)
from cliplet.contract import SNIPPETS, TEXT_INITIALIZER, TensorSpec
from cliplet.errors import ParityError
from cliplet.model_spec import file_sha256
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.runners.torch_runner import TorchRunner
from cliplet.snippets import Snippets
from cliplet.teacher import load_teacher
from cliplet.views import Views, place_on_canvas
from cliplet.vocabulary import Vocabulary

OPSET = 18
SEAL_FILE = "sha256"
# Largest difference of a probability between the eager module and the graph, in float32.
TOLERANCE_FP32 = 1e-4
# Protocol buffers end at 2 GiB; larger weights go into a file of their own.
LARGEST_INLINE_BYTES = 1_800_000_000


def export_snippets(job: SnippetsJob) -> Bundle:
    """The bundle for `job`: from the cache if it is there whole, traced and compared otherwise.

    Raises:
        ParityError: the graph does not agree with the module; nothing is kept.
        ArtifactError: the cached bundle was changed.
        EnvironmentError_: the cache folder cannot be written.
    """
    folder = job.cached_folder()
    if folder.exists():
        return Bundle.load(folder)
    teacher = load_teacher(job.spec)
    module = teacher.snippets(job.vocabulary, job.aggregation)
    with staging_folder(folder) as staged:
        traced = _traced_graph(job, module)
        text_CD = module.text.numpy()
        set_vocabulary(traced, staged / MODEL_FILE, text_CD, job.vocabulary)
        parity = compare(module, staged / MODEL_FILE)
        file = BundleFile(file_sha256(staged / MODEL_FILE), "fp32", parity.pop("precision_read"), parity)
        files = {MODEL_FILE: file}
        for extra in staged.glob("*.data"):
            files[extra.name] = replace(file, sha256=file_sha256(extra))
        manifest = Manifest(
            kind=SNIPPETS.name,
            model=str(job.spec),
            identity=job.spec.identity(),
            vocabulary=job.vocabulary,
            preprocessing=teacher.preprocessing,
            aggregation=job.aggregation.to_json(),
            scale=teacher.scale,
            bias=teacher.bias,
            thresholds=job.thresholds,
            files=files,
            versions=library_versions(),
        )
        return Bundle.write(folder, manifest, staged)


class TextFromOutside(torch.nn.Module):
    """The `snippets` graph with its text matrix as a third input, for tracing.

    As a constant it would be folded into its transpose and lose its name; `set_vocabulary` makes the input an
    initializer afterwards.
    """

    def __init__(self, snippets: Snippets) -> None:
        super().__init__()
        self.snippets = snippets

    def forward(
        self, image: torch.Tensor, boxes: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.snippets.score(image, boxes, text)


def trace(module: Snippets, target: Path) -> None:
    """Write the ONNX graph of `module` with the contract's tensor names and axes, and `text` as an input."""
    sizes = {"B": 2, "V": 3, "C": 5, "D": module.text.shape[1], "H": 64, "W": 96}
    text = TensorSpec(TEXT_INITIALIZER, "float32", ("C", module.text.shape[1]))
    inputs = (*SNIPPETS.inputs, text)
    example = {
        "image": torch.zeros(sizes["B"], sizes["H"], sizes["W"], 3, dtype=torch.uint8),
        "boxes": torch.tensor([0.0, 0, sizes["W"], sizes["H"]]).repeat(sizes["B"], sizes["V"], 1),
        TEXT_INITIALIZER: torch.ones(sizes["C"], sizes["D"]),
    }
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(t.axes) if isinstance(axis, str)}
        for t in inputs
    )
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        # Remarks on the exporter's own passes; what counts is the comparison that follows.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            TextFromOutside(module).eval(),
            tuple(example[t.name] for t in inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in inputs],
            output_names=[t.name for t in SNIPPETS.outputs],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    program.save(str(target), external_data=size > LARGEST_INLINE_BYTES)


def set_vocabulary(source: Path, target: Path, text_CD: np.ndarray, vocabulary: Vocabulary) -> None:
    """Write a traced graph with a text matrix as its initializer `text` and the class names in its metadata."""
    model = onnx.load(str(source))
    kept = [i for i in model.graph.input if i.name != TEXT_INITIALIZER]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    # Names of axes inside the graph are the tracer's; only the contract's shall be seen.
    del model.graph.value_info[:]
    rows_CD = np.ascontiguousarray(text_CD, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(rows_CD, TEXT_INITIALIZER))
    values = (*model.graph.input, *model.graph.output)
    for tensor, value in zip((*SNIPPETS.inputs, *SNIPPETS.outputs), values, strict=True):
        for dim, axis in zip(value.type.tensor_type.shape.dim, tensor.axes, strict=True):
            if axis == "C":
                dim.dim_value = len(vocabulary.names)
            elif isinstance(axis, str):
                dim.dim_param = axis
    names = json.dumps(vocabulary.names, ensure_ascii=False)
    onnx.helper.set_model_props(model, {"cliplet.classes": names})
    # Not ByteSize, which protobuf refuses to count beyond 2 GiB.
    large = sum(len(t.raw_data) for t in model.graph.initializer) > LARGEST_INLINE_BYTES
    onnx.save(
        model, str(target), save_as_external_data=large, location=f"{target.name}.data" if large else None
    )
    onnx.checker.check_model(str(target))


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Only errors of `logger` pass, for as long as the context lasts."""
    chosen = logging.getLogger(logger)
    before = chosen.level
    chosen.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chosen.setLevel(before)


def compare(module: Snippets, graph: Path) -> dict[str, Any]:
    """Largest difference between the eager module and the graph at batch 1, 3 and 16, with one view and with several.

    Raises:
        ParityError: it is larger than the tolerance.
    """
    worst, compared, mean = 0.0, 0, 0.0
    with TorchRunner(module, SNIPPETS) as eager, OnnxRunner(graph, SNIPPETS) as exported:
        for batch, views in ((1, "1"), (3, "1+2x2"), (16, "1")):
            feeds = place_on_canvas(_pictures(batch), Views.parse(views), module.preprocessing)
            wanted, found = eager.infer(feeds), exported.infer(feeds)
            for name, values in wanted.items():
                difference = np.abs(values - found[name])
                worst, mean = max(worst, float(difference.max())), mean + float(difference.sum())
                compared += difference.size
        precision = exported.precision
    verdict: dict[str, Any] = {
        "against": "eager fp32",
        "compared": compared,
        "largest_difference": worst,
        "mean_difference": mean / max(compared, 1),
        "tolerance": TOLERANCE_FP32,
        "precision_read": precision,
    }
    if not compared or not worst <= TOLERANCE_FP32:
        raise ParityError(
            f"the ONNX graph differs from the eager module by {worst:.2e} over {compared} probabilities",
            f"at most {TOLERANCE_FP32:.0e}",
            f"use --runtime torch; the tolerance that would pass is {worst:.1e}",
        )
    return verdict


def _traced_graph(job: SnippetsJob, module: Snippets) -> Path:
    """The traced graph for `job`: from the cache if it is there unchanged."""
    folder = cache_folder() / "graphs" / job.graph_key()
    if not _is_sealed(folder):
        with staging_folder(folder) as staged:
            trace(module, staged / MODEL_FILE)
            (staged / SEAL_FILE).write_text(_folder_sha256(staged))
            if not _is_sealed(folder):
                shutil.rmtree(folder, ignore_errors=True)
            # Should another process be faster, its graph is as good as ours.
            with suppress(OSError):
                os.replace(staged, folder)
    return folder / MODEL_FILE


def _is_sealed(folder: Path) -> bool:
    """Whether a traced graph is there and unchanged since it was written."""
    seal = folder / SEAL_FILE
    return seal.is_file() and seal.read_text() == _folder_sha256(folder)


def _folder_sha256(folder: Path) -> str:
    """One hash for all of a traced graph's files."""
    files = sorted(folder.glob(f"{MODEL_FILE}*"))
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def _pictures(count: int) -> list[np.ndarray]:
    """Smooth random images uint8 [h, w, 3] of different sizes and aspects, always the same."""
    generator = np.random.default_rng(count)
    pictures = []
    for _ in range(count):
        height, width = generator.integers(48, 400, 2)
        coarse = generator.integers(0, 256, (int(height) // 12 + 2, int(width) // 12 + 2, 3)).astype(np.uint8)
        pictures.append(np.kron(coarse, np.ones((12, 12, 1), np.uint8))[:height, :width])
    return pictures

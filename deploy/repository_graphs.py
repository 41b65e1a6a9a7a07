"""The graphs of a bundle as models of Triton's: which engine, which backend, which sizes, which files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cliplet.artifact import MODEL_FILE, TEXT_FILE, Bundle, Engine, Manifest
from cliplet.contract import GRAPHS, TEXT
from cliplet.engine_sidecar import MOST_ELEMENTS, Profile, SideCar, sidecar_path
from cliplet.errors import UsageError
from cliplet.machine import usable_cores
from cliplet.model_spec import MANIFEST_NAME
from cliplet.plan import Plan
from cliplet.serving import graph_model

from .engine_tensors import engine_tensors
from .graph_limits import GraphLimits
from .repository_types import ServedGraph, ServeSettings

# Which of Triton's own backends runs what, in its container. The embedded server has none of them: Python runs all.
BACKENDS = {"tensorrt": "tensorrt", "onnx": "onnxruntime", "openvino": "openvino"}
# What `auto` takes in a container, whatever is installed here. OpenVINO comes last: its backend does not say in which
# precision it computes.
CONTAINER_RUNTIMES = {"cpu": ("onnx", "openvino"), "cuda": ("tensorrt", "onnx")}
# Sentences that the text tower takes at once.
TEXT_ROWS = 256


def expected_profile(manifest: Manifest, views: int, batch: tuple[int, int, int]) -> Profile:
    """The sizes that an engine will meet that was built for none.

    Raises:
        UsageError: the largest batch is more than an engine can index.
    """
    canvas = Profile(batch=(1, 1, 1)).for_preprocessing(manifest.preprocessing).canvas
    most = MOST_ELEMENTS // (canvas[2] ** 2 * 3)
    if batch[2] > most:
        raise UsageError(
            f"--max-batch-size {batch[2]}: images may take {canvas[2]} x {canvas[2]} pixels each",
            f"at most {most}",
            f"--max-batch-size {most}",
        )
    return Profile(batch=batch, views=(1, views, views), canvas=canvas)


def container_runtime(folder: Path, settings: ServeSettings) -> str:
    """What `auto` means there: what is installed here does not matter."""
    file = folder / MANIFEST_NAME
    try:
        engines = json.loads(file.read_text(encoding="utf-8"))["engines"]
        held = {e["runtime"] for e in engines if e["precision"] == settings.precision}
    except (OSError, ValueError, LookupError, TypeError):
        return "auto"  # whoever loads the bundle will say what is wrong with it
    return next((name for name in CONTAINER_RUNTIMES[settings.device] if name in held), "auto")


def served_profile(plan: Plan, bundle: Bundle, engine: Engine, settings: ServeSettings) -> Profile:
    """The sizes that the engine was built for, or will meet; its largest batch is that of the server."""
    if not engine.runtime.startswith("tensorrt"):
        usual = plan.images_per_batch
        most = settings.max_batch_size or usual
        return expected_profile(bundle.manifest, plan.views.count, (1, min(usual, most), most))
    built = SideCar.of(bundle.folder / engine.file).profile
    least, best, limit = built.batch
    most = settings.max_batch_size or limit
    if least > 1 or most > limit:
        raise UsageError(
            f"batches of 1 to {most} images for {engine.name}, which was built for {least} to {limit}",
            "an engine that takes one image, and as many as --max-batch-size",
            f"cliplet export {bundle.manifest.model} --runtime {engine.runtime} --batch 1,{min(best, most)},{most} --out NEW",
        )
    low, _, high = built.views
    if bundle.manifest.contract.takes_views and not low <= plan.views.count <= high:
        raise UsageError(
            f"views {plan.views}, {plan.views.count} of an image, for {engine.name}, which was built for {low} to {high}",
            "an engine that takes as many views",
            f"cliplet export {bundle.manifest.model} --runtime {engine.runtime} --views {low},{plan.views.count},{max(high, plan.views.count)} --out NEW",
        )
    return replace(built, batch=(1, min(best, most), most))


def served_graphs(
    name: str, bundle: Bundle, engine: Engine, profile: Profile, settings: ServeSettings
) -> Iterator[ServedGraph]:
    yield _graph(name, bundle, bundle.manifest.kind, engine, profile, settings)
    if TEXT_FILE in bundle.manifest.files:
        rows = min(TEXT_ROWS, len(bundle.manifest.vocabulary.names))
        tower = Engine("onnx", "fp32", TEXT_FILE, "fp32", "cpu", {})
        sizes = Profile(batch=(1, rows, TEXT_ROWS), canvas=(1, 1, 1))
        yield _graph(name, bundle, TEXT.name, tower, sizes, replace(settings, device="cpu"))


def _graph(
    name: str, bundle: Bundle, kind: str, engine: Engine, profile: Profile, settings: ServeSettings
) -> ServedGraph:
    # All engines of a graph have the tensors of its first one, and that one can be read without a runtime.
    readable = engine.file if kind == TEXT.name or MODEL_FILE not in bundle.manifest.files else MODEL_FILE
    tensors = engine_tensors(bundle.folder / readable)
    contained = settings.target == "container"
    return ServedGraph(
        name=graph_model(name, kind),
        contract=GRAPHS[kind],
        axes={tensor: found.axes for tensor, found in tensors.items()},
        backend=BACKENDS[engine.runtime] if contained else "python",
        files=_version_files(bundle, engine) if contained else {},
        parameters=_native_parameters(engine, settings)
        if contained
        else _python_parameters(bundle, kind, engine, settings) | GraphLimits.of(profile).to_parameters(),
        profile=profile,
        is_built=engine.runtime.startswith("tensorrt"),
        on_gpu=contained and settings.device == "cuda",
    )


def _version_files(bundle: Bundle, engine: Engine) -> dict[str, Path]:
    """An engine's files by the names that its backend looks for, the main one first."""
    names = sorted(bundle.manifest.files_of(engine), key=lambda name: name != engine.file)
    # An IR finds its weights by its own name, and its backend finds an IR by this one; the others keep theirs, which
    # may be written in the file.
    is_ir = engine.file.endswith(".xml")
    files = {f"model{Path(n).suffix}" if is_ir else Path(n).name: bundle.folder / n for n in names}
    if engine.runtime == "tensorrt":
        # Triton does not look at it; `cliplet serve check` does, since a plan says nothing by itself.
        sidecar = sidecar_path(bundle.folder / engine.file)
        files[sidecar.name] = sidecar
    return files


def _native_parameters(engine: Engine, settings: ServeSettings) -> dict[str, str]:
    if engine.runtime == "onnx":
        return {"intra_op_thread_count": str(settings.threads)} if settings.threads else {}
    if engine.runtime == "openvino":
        threads = {"INFERENCE_NUM_THREADS": str(settings.threads)} if settings.threads else {}
        return {**threads, **({"HINT_BF16": "YES"} if engine.precision == "bf16" else {})}
    return {}


def _python_parameters(bundle: Bundle, kind: str, engine: Engine, settings: ServeSettings) -> dict[str, str]:
    """What `cliplet.deploy.triton_backend.GraphService` opens its engine with."""
    # Several engines at a time share the cores.
    share = max(1, usable_cores() // settings.instances) if settings.instances > 1 else 0
    return {
        "graph": kind,
        "bundle": str(bundle.folder.resolve()),
        "file": engine.file,
        "runtime": engine.runtime,
        "precision": engine.precision,
        "device": settings.device,
        "threads": str(settings.threads or share),
    }

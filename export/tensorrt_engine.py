"""TensorRT engines from ONNX graphs: for the GPU of this machine, or ahead of time for a named one.

    BUNDLE/engines/sm89-1.7.1.116-fp16.plan    the engine
    BUNDLE/engines/sm89-1.7.1.116-fp16.json    its side-car, see `cliplet.engine_sidecar`

Precision lies in the graph; it is read back from what was built. Finished engines are kept in the cache folder under a
name derived from all that shapes them, so that a second build is a copy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cliplet.artifact import WRITABLE_CACHE, cache_folder, move_whole, staging_folder
from cliplet.contract import FEATURES, GraphContract
from cliplet.cuda import Cuda, Gpu
from cliplet.engine_sidecar import SIDECAR_SCHEMA, Profile, SideCar, place_file, sidecar_path
from cliplet.errors import ArtifactError, DataError, EnvironmentError_, explained_os_errors
from cliplet.model_spec import file_sha256
from cliplet.tensorrt_layers import (
    EngineLayer,
    computes_in,
    engine_products,
    layers_of_builder,
    layers_of_inspector,
    network_products,
    summary,
)
from cliplet.tensorrt_library import Library, Said, find_library

from .tensorrt_network import parse_graph

__all__ = ["EngineFile", "Profile", "build_engine"]

log = logging.getLogger(__name__)

_PLAN = "engine.plan"


@dataclass(frozen=True)
class EngineFile:
    """An engine in a bundle.

    Attributes:
        file: its plan, relative to the bundle.
        runs_here: whether this machine has the GPU that it was built for.
        cached: whether it had been built before.
    """

    file: str
    sidecar: SideCar
    runs_here: bool
    cached: bool

    @property
    def target(self) -> str:
        return self.sidecar.target

    @property
    def precision_read(self) -> str:
        return self.sidecar.precision_read

    @property
    def facts(self) -> dict[str, Any]:
        """What a bundle's manifest tells of it."""
        told = asdict(self.sidecar)
        names = ("library", "version", "gpu", "read_from", "products", "layers", "profile", "build_seconds")
        return {name: told[name] for name in names}


@dataclass(frozen=True)
class _Job:
    """One engine to build; `gpu` is the one in this machine, and None where it has none."""

    source: Path
    contract: GraphContract
    precision: str
    library: Library
    target: str
    gpu: Gpu | None
    profile: Profile
    observe: tuple[str, ...]

    @property
    def runs_here(self) -> bool:
        return self.gpu is not None and self.gpu.target == self.target

    @property
    def built_on(self) -> str:
        """Name of the GPU that the engine is timed on; "" if it is built without."""
        return self.gpu.name if self.gpu and self.library.times_kernels else ""

    def source_sha256(self) -> str:
        """Hash of the graph, and of the weights that lie beside it."""
        weights = Path(f"{self.source}.data")
        hashes = [file_sha256(path) for path in (self.source, weights) if path.exists()]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def cached_folder(self) -> Path:
        parts = [
            SIDECAR_SCHEMA,
            self.source_sha256(),
            self.contract.name,
            self.precision,
            str(self.library),
            self.target,
            self.built_on,
            asdict(self.profile),
            self.observe,
        ]
        name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return cache_folder() / "tensorrt" / "engines" / name


def build_engine(
    onnx: Path,
    folder: Path,
    *,
    contract: GraphContract,
    precision: str,
    library: str = "tensorrt",
    target: str | None = None,
    profile: Profile | None = None,
    observe: tuple[str, ...] = (FEATURES,),
) -> EngineFile:
    """Write the engine of a graph into the bundle in `folder`, with its side-car, or not at all.

    Args:
        onnx: a graph of `contract`, whose encoder computes in `precision`.
        library: `tensorrt` or `tensorrt_rtx`.
        target: GPU to build for ahead of time, such as `sm89` (`tensorrt_rtx` only); None means the one in this
            machine.
        observe: inner tensors that the engine shall give beside the contract's outputs.

    Raises:
        DataError: the graph is of another contract or precision, or holds an operator that the library refuses.
        EnvironmentError_: no library, no GPU, no space; or the engine does not compute in `precision`.
        UsageError: a target that the library does not build for.
    """
    chosen = find_library(library)
    gpu = _gpu(needed=target is None)
    job = _Job(
        onnx,
        contract,
        precision,
        chosen,
        _target(chosen, target, gpu),
        gpu,
        profile or Profile(),
        observe,
    )
    kept = job.cached_folder()
    cached = _whole(kept)
    if not cached:
        _build_into(job, kept)
    name = f"{job.target}-{chosen.version}-{precision}.plan"
    plan = folder / "engines" / name
    for source, copy in ((sidecar_path(kept / _PLAN), sidecar_path(plan)), (kept / _PLAN, plan)):
        place_file(copy, functools.partial(shutil.copyfile, source))
    return EngineFile(plan.relative_to(folder).as_posix(), SideCar.of(plan), job.runs_here, cached)


def _gpu(*, needed: bool) -> Gpu | None:
    """The GPU of this machine; without the bindings that could tell, None unless one is needed."""
    try:
        return Cuda().gpu()
    except EnvironmentError_:
        if needed:
            raise
        return None


def _target(library: Library, asked: str | None, gpu: Gpu | None) -> str:
    """The GPU to build for."""
    if asked is None and gpu is None:
        raise EnvironmentError_(
            f"{library} has no GPU here to build for",
            "an NVIDIA GPU and its driver, or the name of a GPU to build for ahead of time",
            "--runtime tensorrt_rtx --target sm89",
        )
    chosen = asked or (gpu.target if gpu else "")
    if library.targets or gpu is None or gpu.target != chosen:
        library.check_target(chosen)
    return chosen


def _whole(folder: Path) -> bool:
    """Whether the cache holds a finished and undamaged engine there."""
    plan = folder / _PLAN
    try:
        return plan.is_file() and file_sha256(plan) == SideCar.of(plan).plan_sha256
    except ArtifactError:
        return False


def _build_into(job: _Job, kept: Path) -> None:
    """Build the engine into the cache, where it appears whole or not at all."""
    with staging_folder(kept) as staged:
        _build(job, staged / _PLAN)
        if kept.exists():
            shutil.rmtree(kept, ignore_errors=True)
        with explained_os_errors(kept, WRITABLE_CACHE):
            move_whole(staged, kept)
    if not _whole(kept):
        raise EnvironmentError_(f"{kept} is damaged", "a finished engine", f"rm -r {kept}, then again")


def _build(job: _Job, plan: Path) -> None:
    library = job.library
    builder = library.builder()
    network = library.network(builder)
    parse_graph(library, job.source, network, job.contract, job.observe)
    asked = network_products(network)
    precision, _ = summary(asked)
    if not computes_in(job.precision, precision):
        raise DataError(
            f"asked for {job.precision}, but the encoder of {job.source} computes in {precision or 'nothing'}",
            f"a graph in {job.precision}: TensorRT takes its precision from the graph",
            f"cliplet export MODEL --runtime {library.name} --precision {job.precision} --out BUNDLE",
        )
    started = time.monotonic()
    said = _compile(job, builder, network, plan)
    seconds = round(time.monotonic() - started, 2)
    layers, source = _finished_layers(job, plan, said)
    seen = engine_products(layers, asked)
    read, counts = summary(seen or asked)
    if not computes_in(job.precision, read):
        raise EnvironmentError_(
            f"asked for {job.precision}, but the engine that {library} built computes in {read}",
            "an engine whose layers are typed as in its graph",
            "another --precision or --runtime",
        )
    SideCar(
        library=library.name,
        version=library.version,
        target=job.target,
        gpu=job.built_on,
        driver=job.gpu.driver if job.gpu else "",
        cuda=job.gpu.cuda if job.gpu else "",
        graph=job.contract.name,
        outputs=tuple(network.get_output(i).name for i in range(network.num_outputs)),
        source_sha256=job.source_sha256(),
        plan_sha256=file_sha256(plan),
        precision=job.precision,
        precision_read=read,
        read_from=source if seen else "network",
        products=counts,
        nodes=tuple(asked),
        layers=len(layers) or network.num_layers,
        profile=job.profile,
        build_seconds=seconds,
    ).write(sidecar_path(plan))


def _compile(job: _Job, builder: Any, network: Any, plan: Path) -> Said:
    """Write the plan of a network; what the builder said of it.

    Raises:
        DataError: the builder gives no engine.
        KeyboardInterrupt: the build was interrupted.
    """
    library = job.library
    # Where the GPU is here, `tensorrt` builds for it without being told.
    config = library.config(builder, job.target if library.targets else None)
    config.add_optimization_profile(_optimization_profile(job, builder))
    timings = cache_folder() / "tensorrt" / f"timings-{_file_name(f'{library.version} {job.built_on}')}.cache"
    if library.times_kernels:
        library.load_timings(config, timings)
    with _interruptible() as keep_on, library.listening() as said:
        monitor = library.monitor(keep_on)
        config.progress_monitor = monitor
        built = builder.build_serialized_network(network, config)
        if not keep_on():
            raise KeyboardInterrupt
    if built is None:
        short = re.search(r"memory|cuda", said.reason, re.IGNORECASE)
        raise (EnvironmentError_ if short else DataError)(
            f"{library} cannot build {job.source} for {job.target}: {said.reason}",
            "an engine",
            "a smaller --batch, --views or --canvas, or --runtime onnx",
        )
    with open(plan, "wb") as file:
        file.write(built)
    if library.times_kernels:
        collected = library.timings(config)
        place_file(timings, lambda path: path.write_bytes(collected))
    return said


def _optimization_profile(job: _Job, builder: Any) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in job.contract.inputs:
        profile.set_shape(tensor.name, *job.profile.shapes(tensor))
    return profile


def _finished_layers(job: _Job, plan: Path, said: Said) -> tuple[list[EngineLayer], Any]:
    """Layers of the finished engine and where they were read; of the builder's list where it cannot be loaded here."""
    if job.runs_here:
        engine = job.library.load_engine(plan)
        return layers_of_inspector(job.library.inspect(engine)), "engine"
    return layers_of_builder(said.layers), "builder"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Context in which Ctrl-C is only noted: the library calls back from C++, where Python may not raise.

    Yields:
        Whether to keep on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: True
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield lambda: not noted
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text)

"""One adapter for TensorRT's libraries: `tensorrt` 10 and 11, and `tensorrt_rtx` (TensorRT for RTX).

What differs between them is here, and nowhere else:

    types            10 builds a strongly typed network where a flag says so; the others know no other, with the flag
                     or without
    ahead of time    `tensorrt_rtx` builds for named GPUs on a machine without one; `tensorrt` times kernels on the GPU
                     that is there, and remembers the timings
    on the GPU       `tensorrt_rtx` compiles kernels when an engine meets a shape, remembers them, and captures CUDA
                     graphs itself; `tensorrt` leaves that to who calls it

Precision lies in the ONNX graph: no flag here lowers it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliplet.errors import ArtifactError, EnvironmentError_, UsageError

log = logging.getLogger(__name__)

# In this order where any will do, each with what installs it.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}


@dataclass
class Said:
    """What a library said while it worked.

    Attributes:
        errors: its complaints, in order.
        layers: the builder's list of the finished engine's layers, if it gave one.
    """

    errors: list[str] = field(default_factory=list)
    layers: str = ""

    @property
    def reason(self) -> str:
        """The first complaint that says more than that there is one."""
        telling = [line for line in self.errors if "Error Code" in line or "ERROR" not in line]
        return (telling or self.errors or ["it gave no reason"])[0].strip()


class Library:
    """An installed TensorRT.

    Attributes:
        name: `tensorrt` or `tensorrt_rtx`.
        module: the library itself.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.version = str(module.__version__)
        self.logger = _logger(module)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def targets(self) -> tuple[str, ...]:
        """GPUs that it builds for without having one, such as `sm89`; none for `tensorrt`."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        return tuple(sorted((m.lower() for m in members if m.startswith("SM")), key=lambda m: int(m[2:])))

    @property
    def times_kernels(self) -> bool:
        """Whether its builder times kernels on the GPU, so that remembering them pays."""
        return self.name == "tensorrt"

    @contextmanager
    def listening(self) -> Iterator[Said]:
        """Context in which what the library says is collected, and its complaints are not logged as errors."""
        before, self.logger.said = self.logger.said, Said()
        try:
            yield self.logger.said
        finally:
            self.logger.said = before

    def check_target(self, target: str) -> None:
        """Raise `UsageError` unless it can build for `target` without that GPU."""
        if target in self.targets:
            return
        if not self.targets:
            raise UsageError(
                f"{self} cannot build for {target}: it builds for the GPU of this machine only",
                "no --target, or a library that builds ahead of time",
                f"--runtime tensorrt_rtx --target {target}",
            )
        raise UsageError(
            f"{self} cannot build for {target}", f"one of {', '.join(self.targets)}", "--target sm89"
        )

    def network(self, builder: Any) -> Any:
        """An empty network, strongly typed."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def parser(self, network: Any) -> Any:
        return self.module.OnnxParser(network, self.logger)

    def builder(self) -> Any:
        return self.module.Builder(self.logger)

    def config(self, builder: Any, target: str | None) -> Any:
        """Settings of a build: float32 means float32, and the engine can be inspected in detail.

        Args:
            target: GPU to build for ahead of time; None builds for the one that is there.
        """
        config = builder.create_builder_config()
        config.profiling_verbosity = self.module.ProfilingVerbosity.DETAILED
        # Else products of float32 are rounded to 10 bits of mantissa, which is on by default.
        tf32 = getattr(self.module.BuilderFlag, "TF32", None)
        if tf32 is not None:
            config.clear_flag(tf32)
        capabilities = getattr(self.module, "ComputeCapability", None)
        if capabilities is not None:
            config.num_compute_capabilities = 1
            chosen = capabilities.CURRENT if target is None else getattr(capabilities, target.upper())
            config.set_compute_capability(chosen, 0)
        return config

    def load_timings(self, config: Any, file: Path) -> None:
        """Let a build start with the timings in `file`, if it is there, and collect new ones."""
        known = file.read_bytes() if file.exists() else b""
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, False):
            log.warning("%s does not accept the timings in %s; starting anew", self, file)
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def timings(self, config: Any) -> bytes:
        """All timings that a build knows."""
        return bytes(config.get_timing_cache().serialize())

    def monitor(self, keep_on: Any) -> Any:
        """A progress monitor that ends a build at its next step once `keep_on()` is false."""
        return _monitor(self.module, keep_on)

    def load_engine(self, plan: Path) -> Any:
        """The engine of a plan on the GPU of this machine.

        Raises:
            ArtifactError: the library refuses it.
        """
        runtime = self.module.Runtime(self.logger)
        with self.listening() as said:
            engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise ArtifactError(
                f"{self} cannot load {plan}: {said.reason}",
                "a plan that this version built for this GPU",
                f"cliplet export MODEL --runtime {self.name} --out BUNDLE",
            )
        return engine

    def inspect(self, engine: Any) -> str:
        """JSON about the layers of an engine."""
        inspector = engine.create_engine_inspector()
        return str(inspector.get_engine_information(self.module.LayerInformationFormat.JSON))

    def context(self, engine: Any, kernels: Any = None) -> Any:
        """An execution context whose memory the caller gives with `set_memory`.

        Args:
            kernels: what `kernel_cache` gave.
        """
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if kernels is None:
            return engine.create_execution_context(strategy)
        kernels.settings.set_execution_context_allocation_strategy(strategy)
        return engine.create_execution_context(kernels.settings)

    def kernel_cache(self, engine: Any, known: bytes) -> KernelCache | None:
        """The kernels that `tensorrt_rtx` compiled before, and its own CUDA graphs switched on; None elsewhere."""
        strategies = getattr(self.module, "CudaGraphStrategy", None)
        if strategies is None:
            return None
        settings = engine.create_runtime_config()
        settings.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE
        cache = settings.create_runtime_cache()
        if known and not cache.deserialize(known):
            log.warning("%s does not accept the kernels that it kept; compiling anew", self)
            cache.reset()
        settings.set_runtime_cache(cache)
        return KernelCache(settings, cache)

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether a context's work may be captured in a CUDA graph, as far as the library can tell beforehand."""
        ask = getattr(context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream))

    @staticmethod
    def memory_bytes(engine: Any) -> int:
        """Bytes that a context needs for what lies between inputs and outputs."""
        return int(engine.device_memory_size_v2)

    @staticmethod
    def set_memory(context: Any, address: int, size: int) -> None:
        context.set_device_memory(address, size)


@dataclass(frozen=True)
class KernelCache:
    """Compiled kernels of an engine in `tensorrt_rtx`, and the settings that hold them."""

    settings: Any
    cache: Any

    def to_bytes(self) -> bytes:
        return bytes(self.cache.serialize())


def find_library(name: str | None = None) -> Library:
    """The library of that name, or the first one that is installed.

    Raises:
        EnvironmentError_: it is not there, or does not load.
        UsageError: no such library.
    """
    if name is not None and name not in PACKAGES:
        raise UsageError(f"no TensorRT library {name!r}", f"one of {', '.join(PACKAGES)}")
    names = [name] if name else [n for n in PACKAGES if importlib.util.find_spec(n)] or list(PACKAGES)[:1]
    try:
        return Library(names[0], importlib.import_module(names[0]))
    # Bindings whose libraries are missing raise OSError; a broken installation AttributeError or RuntimeError.
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise EnvironmentError_(
            f"cannot import {names[0]}: {error}",
            "TensorRT with its libraries",
            f"pip install {PACKAGES[names[0]]}, or choose another --runtime",
        ) from error


def _logger(module: Any) -> Any:
    """TensorRT's messages into Python's logging; made here since its base class is only known once it is imported."""
    kinds = module.ILogger
    levels = {
        int(kinds.INTERNAL_ERROR): logging.CRITICAL,
        int(kinds.ERROR): logging.ERROR,
        int(kinds.WARNING): logging.WARNING,
    }

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.said: Said | None = None

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(int(severity), logging.DEBUG)
            if self.said is not None and level >= logging.ERROR:
                self.said.errors.append(message)
                level = logging.DEBUG
            elif self.said is not None and message.startswith("Layers:\n"):
                self.said.layers = message
            log.log(level, "%s", message)

    return Logger()


def _monitor(module: Any, keep_on: Any) -> Any:
    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            log.debug("%s, %d steps", name, steps)

        def step_complete(self, name: str, step: int) -> bool:
            return bool(keep_on())

        def phase_finish(self, name: str) -> None:
            log.debug("%s: done", name)

    return Monitor()

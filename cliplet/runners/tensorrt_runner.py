"""Runs a TensorRT engine on the GPU that it was built for, or not at all.

The side-car decides whether the engine may be loaded, before anything touches it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from cliplet.artifact import cache_folder
from cliplet.contract import GraphContract
from cliplet.cuda import Cuda, CudaFailure, Gpu
from cliplet.engine_sidecar import REBUILD, SideCar
from cliplet.errors import ArtifactError, EnvironmentError_, ForeignEngine, UsageError
from cliplet.model_spec import file_sha256
from cliplet.runners import engine_failure
from cliplet.runners.tensorrt_session import Session, SessionFailure
from cliplet.tensorrt_layers import computes_in, engine_products, layers_of_inspector, summary
from cliplet.tensorrt_library import Library, find_library

log = logging.getLogger(__name__)


class TensorRtRunner:
    """A TensorRT engine behind the contract of its graph.

    Args:
        engine: its plan, with the side-car beside it.
        device: "cuda"; there is no other.
        precision: what it has to be built for; None takes it as it is.
        observe: inner tensors that the engine was built to give, and that `infer` returns beside the outputs.
        graphs: shapes whose CUDA graphs are kept; 0 captures none.
        library, cuda: stand for the installed ones.

    Attributes:
        gpu: the GPU that it runs on.

    Raises:
        ForeignEngine: an engine of another GPU, library or version.
        ArtifactError: an engine of another contract or precision, or one that has changed.
        EnvironmentError_: no GPU, no library, or the engine computes in another precision than its side-car says.
        UsageError: another device, or inner tensors that the engine does not give.
    """

    concurrency = 1

    def __init__(
        self,
        engine: Path,
        contract: GraphContract,
        *,
        device: str = "cuda",
        precision: str | None = None,
        observe: tuple[str, ...] = (),
        graphs: int = 8,
        library: Library | None = None,
        cuda: Cuda | None = None,
    ) -> None:
        self.contract = contract
        self.sidecar = SideCar.of(engine)
        self._rebuild = REBUILD.format(library=self.sidecar.library)
        names = (*(t.name for t in contract.outputs), *observe)
        self._check_request(engine, device, precision, names)
        # First of all: a damaged engine is no better for having been made elsewhere.
        self._check_plan(engine)
        chosen = library or find_library(self.sidecar.library)
        cuda = cuda or Cuda()
        self.gpu = self._accepted_gpu(engine, chosen, cuda)
        self.runtime, self.device = str(chosen), device
        try:
            self._session = Session(
                chosen,
                cuda,
                engine,
                self.sidecar,
                contract,
                names=names,
                graphs=graphs,
                kernels=self._kernels_file(),
            )
        except (CudaFailure, SessionFailure) as error:
            raise EnvironmentError_(
                f"{self.runtime} cannot set up {engine}: {error}",
                f"memory on {self.gpu.name} for the largest batch of the engine's profile",
                f"{self._rebuild}, with smaller maxima in --batch, --views or --canvas",
            ) from error
        try:
            self.precision = self._read_precision(engine)
        except BaseException:
            self._session.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._session.keep_kernels()
        finally:
            self._session.close()

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, the caller's own.

        Raises:
            DataError: feeds that do not fit the contract.
            UsageError: feeds beyond the engine's profile.
            EnvironmentError_: the engine fails on them.
        """
        self.contract.check_feeds(feeds)
        self.sidecar.profile.check(self.contract, feeds, self.sidecar.library)
        try:
            outputs = self._session.run(feeds)
        except (CudaFailure, SessionFailure) as error:
            raise engine_failure(self.runtime, feeds, error) from error
        self.contract.check_outputs(feeds, outputs)
        return outputs

    def _check_request(
        self, engine: Path, device: str, precision: str | None, names: tuple[str, ...]
    ) -> None:
        if device != "cuda":
            raise UsageError(
                f"asked for device {device!r}, but {engine} is a TensorRT engine",
                "an NVIDIA GPU",
                "--device cuda, or another engine of the bundle",
            )
        if self.sidecar.graph != self.contract.name:
            raise ArtifactError(
                f"{engine} is graph {self.sidecar.graph!r}", f"graph {self.contract.name!r}", self._rebuild
            )
        if precision not in (None, self.sidecar.precision):
            raise ArtifactError(
                f"asked for {precision}, but {engine} was built for {self.sidecar.precision}",
                f"an engine in {precision}",
                f"{self._rebuild} --precision {precision}",
            )
        missing = [name for name in names if name not in self.sidecar.outputs]
        if missing:
            raise UsageError(
                f"{engine} does not give {missing}", f"some of {list(self.sidecar.outputs)}", self._rebuild
            )

    def _accepted_gpu(self, engine: Path, library: Library, cuda: Cuda) -> Gpu:
        """The GPU of this machine, if library and GPU are those that the engine was built for."""
        wanted = self.sidecar
        if (library.name, library.version) != (wanted.library, wanted.version):
            raise ForeignEngine(
                f"{engine} was built by {wanted.library} {wanted.version}; here is {library}",
                "an engine of the version that loads it",
                self._rebuild,
            )
        gpu = cuda.gpu()
        if gpu is None:
            raise EnvironmentError_(
                f"{engine} needs a GPU, and none can be used here",
                f"an NVIDIA GPU of {wanted.target} and its driver",
                "run `cliplet doctor`, or use another engine of the bundle",
            )
        if gpu.target != wanted.target:
            raise ForeignEngine(
                f"{engine} was built for {wanted.target}; here is {gpu.name}, which is {gpu.target}",
                "an engine of the GPU that runs it",
                self._rebuild,
            )
        if wanted.gpu and wanted.gpu != gpu.name:
            log.warning(
                "%s was timed on %s; on %s it may be slow: %s", engine, wanted.gpu, gpu.name, self._rebuild
            )
        return gpu

    def _check_plan(self, engine: Path) -> None:
        if not engine.is_file() or file_sha256(engine) != self.sidecar.plan_sha256:
            state = "has changed since it was built" if engine.is_file() else "is missing"
            raise ArtifactError(f"{engine} {state}", f"sha256 {self.sidecar.plan_sha256}", self._rebuild)

    def _read_precision(self, engine: Path) -> str:
        """What the loaded engine computes in, as far as its inspector shows; else what was seen when it was built."""
        layers = layers_of_inspector(self._session.layers())
        seen, _ = summary(engine_products(layers, self.sidecar.nodes))
        if seen and not computes_in(self.sidecar.precision, seen):
            raise EnvironmentError_(
                f"{engine} computes in {seen}, as its inspector shows",
                f"{self.sidecar.precision}, as its side-car says",
                self._rebuild,
            )
        return seen or self.sidecar.precision_read

    def _kernels_file(self) -> Path:
        """Where the kernels of this engine are kept that `tensorrt_rtx` compiled on this GPU."""
        named = re.sub(r"[^\w.]+", "-", f"{self.gpu.name}-{self.sidecar.plan_sha256[:32]}")
        return cache_folder() / "tensorrt" / "kernels" / f"{named}.cache"

"""One class for each runtime that can run a graph: `with runner: outputs = runner.infer(feeds)`.

Tensor names, types and shapes are those of `cliplet.contract`, for every runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from cliplet.contract import GraphContract
from cliplet.errors import EnvironmentError_


class Runner(Protocol):
    """What every runtime offers.

    Attributes:
        runtime: its name and version.
        device: the device that it was found to run on, not the one that was asked for.
        precision: likewise; `weights/products` where its products are done in another type than its weights have,
            such as `fp16/fp32`.
        concurrency: how many threads may call `infer` at the same time.
    """

    runtime: str
    device: str
    precision: str
    concurrency: int

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name; `DataError` if the feeds do not fit the contract."""
        ...


def open_runner(
    runtime: str,
    file: Path,
    contract: GraphContract,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    threads: int = 0,
    streams: int = 1,
    observe: tuple[str, ...] = (),
) -> Runner:
    """The runner of a file, its engine loaded.

    Args:
        precision: what the engine has to compute in; see the runner.
        threads: of an engine on the CPU; 0 means one for each core that this process may use.
        streams: batches that an engine on the CPU scores at the same time, each by its share of the threads. Several
            leave no thread waiting for another at the end of each layer; a batch alone takes longer.
        observe: inner tensors that `infer` returns beside the contract's outputs.

    Raises:
        EnvironmentError_: this machine lacks the library, the device or the precision.
        ArtifactError: the file is no engine of this contract or precision.
        ForeignEngine: it is an engine for another machine.
    """
    if runtime == "onnx":
        from cliplet.runners.onnx_runner import OnnxRunner

        return OnnxRunner(
            file, contract, device, threads, precision=precision, streams=streams, observe=observe
        )
    if runtime == "openvino":
        from cliplet.runners.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(
            file, contract, precision=precision, threads=threads, streams=streams, observe=observe
        )
    from cliplet.runners.tensorrt_runner import TensorRtRunner

    return TensorRtRunner(file, contract, device=device, precision=precision, observe=observe)


def engine_failure(runtime: str, feeds: Mapping[str, np.ndarray], error: Exception) -> EnvironmentError_:
    """What to raise when an engine fails on feeds that fit the contract."""
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return EnvironmentError_(
        f"{runtime} failed on {shapes}: {reason}", "memory for one batch", "use a smaller --batch-size"
    )

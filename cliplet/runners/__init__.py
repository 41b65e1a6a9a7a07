"""One class for each runtime that can run a graph: `with runner: outputs = runner.infer(feeds)`.

Tensor names, types and shapes are those of `cliplet.contract`, for every runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from cliplet.errors import EnvironmentError_


class Runner(Protocol):
    """What every runtime offers.

    Attributes:
        runtime: its name and version.
        device: the device that it was found to run on, not the one that was asked for.
        precision: likewise.
    """

    runtime: str
    device: str
    precision: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name; `DataError` if the feeds do not fit the contract."""
        ...


def engine_failure(runtime: str, feeds: Mapping[str, np.ndarray], error: Exception) -> EnvironmentError_:
    """What to raise when an engine fails on feeds that fit the contract."""
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return EnvironmentError_(
        f"{runtime} failed on {shapes}: {reason}", "memory for one batch", "use a smaller --batch-size"
    )

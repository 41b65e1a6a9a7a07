"""Runs the graph of a bundle that a server serves."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np

from cliplet.serving import ModelCard
from cliplet.triton_calls import Connection


class TritonRunner:
    """A served graph behind its contract; may be called by many threads at once.

    Args:
        connection: ended with the runner.
        card: of the bundle.

    Attributes:
        runtime: such as `triton/onnx`.
        device, precision: as the server says.
        concurrency: calls at a time that keep the server busy.
    """

    def __init__(self, connection: Connection, card: ModelCard) -> None:
        self.connection = connection
        self.card = card
        self.contract = card.manifest.contract
        self.runtime = f"triton/{card.runtime}"
        self.device = card.device
        self.precision = card.precision
        self.concurrency = connection.settings.in_flight

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, from as many requests as the server's largest batch asks for.

        Raises:
            DataError: the feeds do not fit, or the server refuses them.
            ServerError: it is away, busy, too slow, or its engine failed.
        """
        self.contract.check_feeds(feeds)
        images, step = len(feeds[self.contract.inputs[0].name]), self.card.max_batch_size
        parts = [
            self.connection.infer(
                self.card.graph,
                self.contract,
                {name: array[start : start + step] for name, array in feeds.items()},
            )
            for start in range(0, images, step)
        ]
        if len(parts) == 1:
            return parts[0]
        return {t.name: np.concatenate([part[t.name] for part in parts]) for t in self.contract.outputs}

"""What a client of a served model sends: encoded bytes, raw tensors, or tensors in shared memory; and what it cost.

Triton's own statistics are asked through its HTTP port, which the state file of a local server names.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from cliplet.images import decode_image
from cliplet.server_address import ConnectionSettings, ServerAddress, read_state
from cliplet.triton_calls import Connection
from cliplet.views import Views, place_on_canvas

TRANSPORTS = ("bytes", "tensors", "shared memory")
# Different images that requests take turns with.
MOST_IMAGES = 64
# More than a load ever asks for.
MOST_IN_FLIGHT = 4096
Counts = Mapping[str, Mapping[str, float]]


class Caller:
    """One image a request, always the same images in turn.

    Args:
        transport: `bytes` asks the tagger; the other two ask the raw graph with images that are decoded already.
    """

    def __init__(self, model: str, transport: str, images: Path) -> None:
        shared = "on" if transport == "shared memory" else "off"
        address = ServerAddress.parse(model)
        # A load generator takes every answer as it comes: nothing is tried again, and nothing waits for a turn.
        settings = ConnectionSettings(
            retries=0, shared_memory=shared, deadline_s=120.0, in_flight=MOST_IN_FLIGHT
        )
        self.connection = Connection(address, settings)
        self.card = self.connection.card()
        paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        encoded = [path.read_bytes() for path in paths[:MOST_IMAGES]]
        if transport == "bytes":
            self.model, self.contract = self.card.name, self.card.front
            self.feeds = [{"image": np.array([[data]], object)} for data in encoded]
        else:
            self.model, self.contract = self.card.graph, self.card.manifest.contract
            self.feeds = [self._tensors(data) for data in encoded]
        state = read_state(address.port)
        assert state is not None, "the server runs on this machine"
        self._statistics_url = f"http://127.0.0.1:{state.ports['http']}/v2/models/stats"

    def _tensors(self, data: bytes) -> dict[str, np.ndarray]:
        views, fed = Views.parse(self.card.views), self.card.manifest.preprocessing
        picture = decode_image(data, **views.room(fed))
        feeds = place_on_canvas([picture.pixels], views, fed, None, [(picture.width, picture.height)])
        return self.contract.of_views(feeds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def call(self, number: int) -> None:
        """Send one request and wait for its answer."""
        self.connection.infer(self.model, self.contract, self.feeds[number % len(self.feeds)])

    def statistics(self) -> dict[str, dict[str, float]]:
        """What Triton has counted so far for each of this bundle's models."""
        with urllib.request.urlopen(self._statistics_url, timeout=10) as answer:
            found = json.load(answer)["model_stats"]
        return {
            model["name"]: {
                "images": model["inference_count"],
                "batches": model["execution_count"],
                "requests": model["inference_stats"]["success"]["count"],
                **{
                    f"{part}_s": model["inference_stats"][part]["ns"] / 1e9
                    for part in ("queue", "compute_input", "compute_infer", "compute_output")
                },
            }
            for model in found
            if model["name"] in (self.card.name, self.card.graph)
        }

    def spent(self, before: Counts, after: Counts) -> dict[str, dict[str, float]]:
        """Of the requests between two statistics: images in a batch, and milliseconds of queue and compute each."""
        spent = {}
        for name, now in after.items():
            grown = {key: value - before[name][key] for key, value in now.items()}
            requests, batches = max(grown["requests"], 1), max(grown["batches"], 1)
            spent["tagger" if name == self.card.name else "graph"] = {
                "images_per_batch": grown["images"] / batches,
                "queue_ms": 1e3 * grown["queue_s"] / requests,
                "compute_ms": 1e3
                * (grown["compute_input_s"] + grown["compute_infer_s"] + grown["compute_output_s"])
                / requests,
            }
        return spent

"""One graph of a bundle on this machine's runtime, for Triton's Python backend."""

from __future__ import annotations

import cliplet_paths  # noqa: F401 - before all that follows, which it lets Python find

# isort: split
import json
from collections.abc import Mapping
from typing import Any

from cliplet.deploy.triton_backend import GraphService, response


class TritonPythonModel:
    """Named by Triton."""

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.graph = GraphService({key: value["string_value"] for key, value in parameters.items()})

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, all of them from one run of the engine."""
        feeds = [{tensor.name(): tensor.as_numpy() for tensor in r.inputs()} for r in requests]
        return [response(answer) for answer in self.graph.answer(feeds)]

    def finalize(self) -> None:
        self.graph.close()

"""Encoded images in, labels or embeddings out, for Triton's Python backend."""

from __future__ import annotations

import cliplet_paths  # noqa: F401 - before all that follows, which it lets Python find

# isort: split
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from cliplet.deploy.triton_backend import TaggerService, graph_error, response
from cliplet.serving import CARD_KEY, ModelCard


class TritonPythonModel:
    """Named by Triton."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        text = config["parameters"][CARD_KEY]["string_value"]
        self.card = ModelCard.from_json(text, args["model_name"])
        cached = config.get("response_cache", {}).get("enable", False)
        self.tagger = TaggerService(self.card, self.infer, whole_answers=cached)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; a bad image spoils the answer to its own request alone."""
        (image,) = self.card.front.inputs
        images = [pb_utils.get_input_tensor_by_name(r, image.name).as_numpy() for r in requests]
        wanted = [r.requested_output_names() for r in requests]
        return [response(answer) for answer in self.tagger.answer(images, wanted)]

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the bundle's graph, another model of this server, gives for feeds."""
        outputs = self.card.manifest.contract.outputs
        asked = pb_utils.InferenceRequest(
            model_name=self.card.graph,
            inputs=[pb_utils.Tensor(name, array) for name, array in feeds.items()],
            requested_output_names=[output.name for output in outputs],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        )
        found = asked.exec()
        if found.has_error():
            raise graph_error(found.error().message())
        return {tensor.name(): tensor.as_numpy() for tensor in found.output_tensors()}

"""What a server says of a bundle, and the names and tensors that its models are called by.

One bundle is served as a handful of Triton models. For a bundle served as `pets`:

    pets               encoded images in; out come labels, or the embeddings of a trunk: what most clients call
                       (contracts TAGGER and EMBEDDER)
    pets_snippets      the raw graph of a CLIP, or
    pets_classifier    the raw graph of a classifier, or
    pets_trunk         the raw graph of a trunk (contracts of `cliplet.contract`)
    pets_text          the text tower, where the bundle holds one

The configuration of `pets` carries, as the parameter CARD_KEY, a JSON text with everything that a client needs to
know about the bundle: `ModelCard`. The repository writes it; clients and the runner read it.

Legend: B images, V views, C classes, h x w cells of a class activation map (CAM).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cliplet.artifact import Manifest
from cliplet.contract import CLASSIFIER, SNIPPETS, TRUNK, GraphContract, TensorSpec
from cliplet.errors import ArtifactError

SCORES = "scores"
# `image` holds one encoded file (JPEG, PNG, …) in each row. `record` is a JSON text for each image: `ImageRecord`.
TAGGER = GraphContract(
    name="tagger",
    inputs=(TensorSpec("image", "object", ("B", 1)),),
    outputs=(
        TensorSpec("record", "object", ("B", 1)),
        TensorSpec(SCORES, "float32", ("B", "C")),
    ),
)
EMBEDDER = GraphContract(name="embedder", inputs=TAGGER.inputs, outputs=TRUNK.outputs)
# What a client may ask a tagger for beside them: of a CLIP, or of a classifier.
VIEW_PROBS = TensorSpec("view_probs", "float32", ("B", "V", "C"))
CAM = TensorSpec("cam", "float32", ("B", "C", "h", "w"))
# Triton's word for each type of a tensor, as requests spell it; configurations say TYPE_STRING for BYTES.
TRITON_TYPES = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64", "object": "BYTES"}
CARD_KEY = "cliplet"
CARD_SCHEMA = 1
_IMAGE_PROBLEM = re.compile(r"^(?:image \d+ of \d+: )?(read|decode|infer): (.*)", re.DOTALL)


def front_contract(kind: str) -> GraphContract:
    """What the model of encoded images over the graph `kind` takes and gives."""
    return EMBEDDER if kind == TRUNK.name else TAGGER


def tagger_extras(kind: str) -> tuple[TensorSpec, ...]:
    """What it gives to those who ask for it by name: of a tagger one tensor, of an embedder none."""
    return {SNIPPETS.name: (VIEW_PROBS,), CLASSIFIER.name: (CAM,)}.get(kind, ())


def image_problem(stage: str, reason: str) -> str:
    """The message of the error that the tagger answers with where an image, not the server, is to blame.

    Before it stands `image 2 of 4: ` where a request holds several.
    """
    return f"{stage}: {reason}"


def parse_image_problem(message: str) -> tuple[str, str] | None:
    """Stage (`read`, `decode` or `infer`) and reason, if a server's error is about an image; or else None."""
    found = _IMAGE_PROBLEM.search(message)
    return (found[1], found[2]) if found else None


def graph_model(name: str, kind: str) -> str:
    """The Triton model that runs the graph `kind` (`snippets`, `classifier`, `trunk`, `text`) of the bundle `name`."""
    return f"{name}_{kind}"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a server tells about a bundle that it serves.

    Attributes:
        name: the model to call with encoded images.
        manifest: the bundle's.
        views: where the server looks, such as `1+3x3`.
        thresholds: one for each class, of which a trunk has none; `threshold_source` says where they came from.
        runtime, precision, device: of the engine, as the bundle's manifest says they were read back.
        max_batch_size: most images in one request.
        max_pixels: larger images are refused.
    """

    name: str
    manifest: Manifest
    views: str
    thresholds: tuple[float, ...]
    threshold_source: str
    runtime: str
    precision: str
    device: str
    max_batch_size: int
    max_pixels: int

    @property
    def front(self) -> GraphContract:
        """What the model that is called with encoded images takes and gives."""
        return front_contract(self.manifest.kind)

    @property
    def graph(self) -> str:
        """The Triton model that runs the bundle's raw graph."""
        return graph_model(self.name, self.manifest.kind)

    def to_json(self) -> str:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(
            {
                "schema": CARD_SCHEMA,
                **own,
                "manifest": self.manifest.to_json(),
                "thresholds": list(self.thresholds),
            }
        )

    @classmethod
    def from_json(cls, text: str, source: str) -> ModelCard:
        """The card that `to_json` wrote.

        Raises:
            ArtifactError: it is none, or of another version.
        """
        fix = "serve the bundle again with this version: cliplet serve BUNDLE"
        try:
            data = json.loads(text)
            if data["schema"] != CARD_SCHEMA:
                raise ArtifactError(
                    f"{source} describes its model with schema {data['schema']}", f"schema {CARD_SCHEMA}", fix
                )
            own = {f.name: data[f.name] for f in fields(cls)}
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{source} does not describe its model: {error}", "a server that cliplet started", fix
            ) from error
        own["manifest"] = Manifest.from_json(data["manifest"], source, fix)
        own["thresholds"] = tuple(data["thresholds"])
        return cls(**own)


@dataclass(frozen=True)
class ImageRecord:
    """What the tagger says of one image: the JSON text of its tensor `record`.

    Attributes:
        width, height: pixels of the image as it is displayed (after EXIF rotation).
        labels: `{"name": …, "score": …, "threshold": …}` for each class at or above its threshold, best first.
        boxes: (x0, y0, x1, y1) of each view in those pixels, view 0 the whole image.
    """

    width: int
    height: int
    labels: tuple[Mapping[str, Any], ...]
    boxes: tuple[tuple[float, float, float, float], ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> ImageRecord:
        data = json.loads(text)
        return cls(
            data["width"],
            data["height"],
            tuple(data["labels"]),
            tuple((b[0], b[1], b[2], b[3]) for b in data["boxes"]),
        )

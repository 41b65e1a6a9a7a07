"""Names, shapes and types of every graph's tensors, once; all else derives from here.

Legend: B images, V views of an image, C classes, D embedding, L text context, H x W canvas pixels, h x w cells of
a class activation map (CAM).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cliplet.errors import DataError


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, its type, and its axes as symbols (dynamic) or numbers (fixed)."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def check(self, array: np.ndarray, sizes: dict[str, int]) -> None:
        """Raise `DataError` unless `array` fits; `sizes` collects what each symbol stood for so far."""
        shown = "x".join(map(str, self.axes))
        if array.dtype != np.dtype(self.dtype) or array.ndim != len(self.axes):
            raise DataError(
                f"tensor {self.name!r} is {array.dtype} {list(array.shape)}", f"{self.dtype} [{shown}]"
            )
        for axis, size in zip(self.axes, array.shape, strict=True):
            wanted = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
            if size != wanted:
                raise DataError(
                    f"tensor {self.name!r} is {list(array.shape)}: its axis {axis} is {size}",
                    f"[{shown}] with {axis} = {wanted} as in the other tensors",
                )


@dataclass(frozen=True)
class GraphContract:
    """What goes into a graph and what comes out, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def takes_views(self) -> bool:
        """Whether it looks at several views of an image; others look at the whole."""
        return any("V" in spec.axes for spec in self.inputs)

    def of_views(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `cliplet.views.place_on_canvas` gives, as this graph takes it: for whole images a box each, not a list."""
        return dict(feeds) if self.takes_views else {**feeds, "boxes": feeds["boxes"][:, 0]}

    def check_feeds(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Raise `DataError` unless `feeds` are exactly the inputs, each of its type and shape."""
        self._check(feeds, self.inputs, {})

    def check_outputs(self, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Raise `DataError` unless `outputs` are what this graph owes for `feeds`; others may lie beside them."""
        sizes: dict[str, int] = {}
        self._check(feeds, self.inputs, sizes)
        names = {t.name for t in self.outputs}
        self._check({name: array for name, array in outputs.items() if name in names}, self.outputs, sizes)

    def _check(
        self, arrays: Mapping[str, np.ndarray], specs: tuple[TensorSpec, ...], sizes: dict[str, int]
    ) -> None:
        names = [s.name for s in specs]
        if sorted(arrays) != sorted(names):
            raise DataError(f"graph {self.name!r} got tensors {sorted(arrays)}", f"exactly {sorted(names)}")
        for spec in specs:
            spec.check(arrays[spec.name], sizes)


EMBEDDINGS = "embeddings"
SNIPPETS = GraphContract(
    name="snippets",
    inputs=(
        TensorSpec("image", "uint8", ("B", "H", "W", 3)),
        TensorSpec("boxes", "float32", ("B", "V", 4)),
    ),
    outputs=(
        TensorSpec("view_probs", "float32", ("B", "V", "C")),
        TensorSpec("scores", "float32", ("B", "C")),
    ),
)
CLASSIFIER = GraphContract(
    name="classifier",
    inputs=(
        TensorSpec("image", "uint8", ("B", "H", "W", 3)),
        # Where on its canvas each image lies: images of a batch may differ in size.
        TensorSpec("boxes", "float32", ("B", 4)),
    ),
    outputs=(
        TensorSpec("probs", "float32", ("B", "C")),
        TensorSpec("cam", "float32", ("B", "C", "h", "w")),
    ),
)
TRUNK = GraphContract(
    name="trunk",
    inputs=CLASSIFIER.inputs,
    # Rows of length 1. Not `embedding`: the tracer calls the operator of that name so, of which a CLIP has one.
    outputs=(TensorSpec(EMBEDDINGS, "float32", ("B", "D")),),
)
TEXT = GraphContract(
    name="text",
    inputs=(TensorSpec("tokens", "int64", ("C", "L")),),
    outputs=(TensorSpec("text", "float32", ("C", "D")),),
)
GRAPHS = {graph.name: graph for graph in (SNIPPETS, CLASSIFIER, TRUNK, TEXT)}
# The initializer of `snippets` that holds the unit text rows [C, D]; exchanging it exchanges the vocabulary.
TEXT_INITIALIZER = "text"
# Tensors inside `snippets`, `classifier` and `trunk` with these names in every graph: the normalised pixels float32
# [N, 3, S, S] that the encoder is fed, and what it gives, [N, D] or [N, C, h, w]. Between the two lies nearly all of
# the arithmetic, and all that may be done in low precision.
PIXELS = "pixels"
FEATURES = "features"

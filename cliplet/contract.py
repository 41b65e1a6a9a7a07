"""Names, shapes and types of every graph's tensors, once; all else derives from here.

Legend: B images, V views of an image, C classes, H x W canvas pixels.
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

    def check_feeds(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Raise `DataError` unless `feeds` are exactly the inputs, each of its type and shape."""
        self._check(feeds, self.inputs, {})

    def check_outputs(self, feeds: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Raise `DataError` unless `outputs` are what this graph owes for `feeds`."""
        sizes: dict[str, int] = {}
        self._check(feeds, self.inputs, sizes)
        self._check(outputs, self.outputs, sizes)

    def _check(
        self, arrays: Mapping[str, np.ndarray], specs: tuple[TensorSpec, ...], sizes: dict[str, int]
    ) -> None:
        names = [s.name for s in specs]
        if sorted(arrays) != sorted(names):
            raise DataError(f"graph {self.name!r} got tensors {sorted(arrays)}", f"exactly {sorted(names)}")
        for spec in specs:
            spec.check(arrays[spec.name], sizes)


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
# The initializer that holds the unit text rows [C, D]; exchanging it exchanges the vocabulary.
TEXT_INITIALIZER = "text"

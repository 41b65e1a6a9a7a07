"""What is known of a TensorRT engine: the JSON file beside its plan, and the sizes that it was built for.

A plan runs on one kind of GPU and in one version of its library, and says neither in a way that can be read. So each
lies beside a side-car of the same name that does, and that is read before the plan is touched.

Legend: B images, V views, H x W canvas pixels.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cliplet.contract import GraphContract, TensorSpec
from cliplet.errors import ArtifactError, UsageError, explained_os_errors
from cliplet.views import CANVAS_STEP, Preprocessing, Views

SIDECAR_SCHEMA = 1
# Minimum, optimum and maximum of a size; engines are fastest at the optimum.
Bounds = tuple[int, int, int]
# TensorRT indexes the elements of a tensor with 32 bits.
MOST_ELEMENTS = 2**31 - 1
REBUILD = "cliplet export MODEL --runtime {library} --out BUNDLE"
# Where nothing says which library it was.
REBUILD_EITHER = f"{REBUILD.format(library='tensorrt')}, or --runtime tensorrt_rtx if that built it"


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine takes; each (minimum, optimum, maximum).

    Attributes:
        batch: images B.
        views: views V of an image.
        canvas: sides H and W of the canvas, in pixels; by default what suits an encoder of 224 pixels.

    Raises:
        UsageError: bounds that contradict each other, or more than an engine can index.
    """

    batch: Bounds = (1, 8, 32)
    views: Bounds = (1, 10, 30)
    canvas: Bounds = (32, 640, 2048)

    def __post_init__(self) -> None:
        for name, bounds in asdict(self).items():
            low, best, high = bounds
            if not 1 <= low <= best <= high:
                raise UsageError(
                    f"--{name} {shown_bounds(bounds)} contradicts itself: {_contradiction(bounds)}",
                    "minimum, optimum and maximum, none below 1, each at least the one before",
                    f"--{name} {shown_bounds(sorted(max(1, size) for size in bounds))}",
                )
        largest = self.batch[2] * self.canvas[2] ** 2 * 3
        if largest > MOST_ELEMENTS:
            raise UsageError(
                f"--batch {shown_bounds(self.batch)} of --canvas {shown_bounds(self.canvas)} is up to {largest:,} values a tensor",
                f"at most {MOST_ELEMENTS:,}, which is what TensorRT can index",
                "a smaller maximum in --batch or --canvas",
            )

    @classmethod
    def parse(cls, batch: str | None = None, views: str | None = None, canvas: str | None = None) -> Profile:
        """A profile from the values of `--batch`, `--views` and `--canvas`, such as "1,4,32"; "8" is "8,8,8".

        None stands for the default.

        Raises:
            UsageError: something else, or bounds that contradict each other.
        """
        flags = {"batch": batch, "views": views, "canvas": canvas}
        bounds = {name: _bounds(name, text) for name, text in flags.items() if text is not None}
        return cls(**bounds)

    def for_preprocessing(self, preprocessing: Preprocessing) -> Profile:
        """The same with a canvas for all images that cliplet decodes and feeds, of any size and shape.

        Raises:
            UsageError: that canvas is too large for so many images in a batch.
        """
        return replace(self, canvas=_fed_canvas(preprocessing))

    def bounds(self, tensor: TensorSpec) -> list[Bounds]:
        """Minimum, optimum and maximum of each axis of an input."""
        symbols = {"B": self.batch, "V": self.views, "H": self.canvas, "W": self.canvas}
        return [(axis,) * 3 if isinstance(axis, int) else symbols[axis] for axis in tensor.axes]

    def shapes(self, tensor: TensorSpec) -> list[tuple[int, ...]]:
        """The smallest, the optimal and the largest shape of an input."""
        return [tuple(sizes) for sizes in zip(*self.bounds(tensor), strict=True)]

    def check(self, contract: GraphContract, feeds: Mapping[str, np.ndarray], library: str) -> None:
        """Raise `UsageError` if feeds lie outside of these bounds, with the flag that takes them in."""
        flags = {"B": ("batch", "images"), "V": ("views", "views of an image")}
        for tensor in contract.inputs:
            for axis, size, bounds in zip(
                tensor.axes, feeds[tensor.name].shape, self.bounds(tensor), strict=True
            ):
                if not bounds[0] <= size <= bounds[2]:
                    flag, what = flags.get(str(axis), ("canvas", "pixels a side of the canvas"))
                    wider = (min(bounds[0], size), bounds[1], max(bounds[2], size))
                    raise UsageError(
                        f"tensor {tensor.name!r} is {list(feeds[tensor.name].shape)}: {size} {what}",
                        f"{bounds[0]} to {bounds[2]}, for which the engine was built (--{flag} {shown_bounds(bounds)})",
                        f"{REBUILD.format(library=library)} --{flag} {shown_bounds(wider)}",
                    )


def _fed_canvas(preprocessing: Preprocessing) -> Bounds:
    """Least, usual and largest side of a canvas, over all images that cliplet decodes and feeds.

    Usual are photographs of 4:3, upright and across in one batch, in the views `1+3x3`. The largest is the longer side
    of a panorama, or what that is padded to in resize mode `longest`.
    """
    # Only who builds needs what decodes.
    from cliplet.images import LONGEST_SIDE

    room = Views((3,)).room(preprocessing)
    most = max(room["fit"], LONGEST_SIDE)
    usual = min(most, max(room["fit"], room["short"] * 4 // 3))
    if preprocessing.resize_mode == "longest":
        # The square around a strip is S w / round(S w / most) wide: nearly half more than `most` where 1.49 is rounded
        # to 1. Half a pixel more of w, from decoding, is S / 2 more; begin and end are whole pixels.
        most += most // 2 + preprocessing.size // 2 + 3
    return CANVAS_STEP, _whole_steps(usual), _whole_steps(most)


def _whole_steps(side: int) -> int:
    return -(-side // CANVAS_STEP) * CANVAS_STEP


def _bounds(name: str, text: str) -> Bounds:
    try:
        sizes = [int(part) for part in text.split(",")]
        low, best, high = sizes * 3 if len(sizes) == 1 else sizes
    except ValueError:
        raise UsageError(
            f"--{name} {text!r}",
            "one whole number, or three: minimum,optimum,maximum",
            f"--{name} {shown_bounds(getattr(Profile, name))}",
        ) from None
    return low, best, high


def _contradiction(bounds: Bounds) -> str:
    low, best, high = bounds
    if low < 1:
        return f"its minimum {low} is below 1"
    if low > best:
        return f"its minimum {low} is above its optimum {best}"
    return f"its optimum {best} is above its maximum {high}"


def shown_bounds(bounds: Bounds | list[int]) -> str:
    """Bounds as they are written on a command line, such as "1,8,32"."""
    return ",".join(map(str, bounds))


@dataclass(frozen=True)
class SideCar:
    """All that is known of one engine.

    Attributes:
        library, version: what built it, and alone can load it.
        target: the GPU's compute capability, such as `sm89`.
        gpu: name of the GPU that it was built on, or "" if it was built ahead of time.
        driver, cuda: versions on the machine that built it; "" without a driver.
        graph: name of its contract; `outputs` are the names of all that it gives.
        source_sha256, plan_sha256: of the ONNX graph with its weights, and of the plan.
        precision: what was asked for; `precision_read` is what its encoder was found to compute in, `read_from`
            where that was seen: `engine` (the inspector, on a GPU), `builder` (the builder's list of the finished
            engine's layers) or `network` (the typed network, where the engine shows none of its products).
        products: how many of the encoder's convolutions and matrix products were seen in each type; `nodes` are the
            names of all of them in the graph.
        layers: of the finished engine, or of the network if it shows none.
    """

    library: str
    version: str
    target: str
    gpu: str
    driver: str
    cuda: str
    graph: str
    outputs: tuple[str, ...]
    source_sha256: str
    plan_sha256: str
    precision: str
    precision_read: str
    read_from: Literal["engine", "builder", "network"]
    products: Mapping[str, int]
    nodes: tuple[str, ...]
    layers: int
    profile: Profile
    build_seconds: float

    def write(self, path: Path) -> None:
        path.write_text(
            json.dumps({"schema": SIDECAR_SCHEMA, **asdict(self)}, indent=2) + "\n", encoding="utf-8"
        )

    @classmethod
    def of(cls, plan: Path) -> SideCar:
        """The side-car of an engine.

        Raises:
            ArtifactError: it is missing, unreadable or of another schema.
        """
        path = sidecar_path(plan)
        fix = REBUILD_EITHER
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            schema, profile = data.pop("schema"), data.pop("profile")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(
                f"cannot read {path}: {error}", f"the side-car that tells what {plan.name} is", fix
            ) from error
        if schema != SIDECAR_SCHEMA:
            raise ArtifactError(f"{path} has schema {schema}", f"schema {SIDECAR_SCHEMA}", fix)
        try:
            fix = REBUILD.format(library=data["library"])
            sizes = Profile(**{size.name: tuple(profile[size.name]) for size in fields(Profile)})
            return cls(**{**data, "profile": sizes, **_tuples(data)})
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise ArtifactError(f"{path} is incomplete: {error}", "all fields of a side-car", fix) from error


def _tuples(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(data[name]) for name in ("outputs", "nodes")}


def place_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file that appears as `target` once it is whole.

    Raises:
        EnvironmentError_: it cannot be written, or the disk is full.
    """
    with explained_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        os.close(handle)
        try:
            write(Path(name))
            # Readable as any other file is, which a temporary one is not.
            os.chmod(name, 0o644)
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)


def sidecar_path(plan: Path) -> Path:
    """Where the side-car of an engine lies."""
    return plan.with_suffix(".json")

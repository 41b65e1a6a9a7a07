"""What can be said of serving, and what is known of a bundle that will be served.

Legend: B images, V views, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cliplet.contract import GraphContract, TensorSpec
from cliplet.engine_sidecar import Profile
from cliplet.errors import ClipletError, UsageError
from cliplet.plan import Plan, TaggerSettings
from cliplet.serving import ModelCard

Target = Literal["embedded", "container"]
TARGETS: tuple[Target, ...] = ("embedded", "container")
# Half of what an image may have elsewhere: a server decodes several at once, and they come from anywhere.
SERVED_PIXELS = 89_478_485


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How bundles are served; what is not said here follows from the bundle.

    Attributes:
        views, threshold, runtime, precision, device, threads: as in `cliplet.plan.TaggerSettings`.
        max_batch_size: most images in one batch; 0 for what the engine was built for, or about 32 views.
        queue_delay_us: how long an image waits for others to share its batch with, in microseconds.
        max_queue: requests that may wait for one model; more are refused at once.
        timeout_us: longest wait in a queue, in microseconds; 0 for any.
        instances: engines of each graph at work at the same time.
        cache: whether the same image is answered from memory the second time.
        max_pixels: larger images are refused before they are decoded.
        target: the server on this machine, or NVIDIA's container with the backends that it has.
    """

    views: str | None = None
    threshold: float | None = None
    runtime: str = "auto"
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 0
    max_batch_size: int = 0
    queue_delay_us: int = 1000
    max_queue: int = 256
    timeout_us: int = 60_000_000
    instances: int = 1
    cache: bool = False
    max_pixels: int = SERVED_PIXELS
    target: Target = "embedded"

    def __post_init__(self) -> None:
        least = {"max_batch_size": 0, "queue_delay_us": 0, "max_queue": 1, "timeout_us": 0}
        for name, low in {**least, "instances": 1, "max_pixels": 1}.items():
            if getattr(self, name) < low:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {getattr(self, name)}", f"a whole number from {low} on")
        if self.target not in TARGETS:
            raise UsageError(f"--target {self.target}", f"one of {', '.join(TARGETS)}")

    def tagger(self, bundle: Path, runtime: str) -> TaggerSettings:
        """The same as settings of a local tagger."""
        shared = {
            name: getattr(self, name) for name in ("views", "threshold", "precision", "device", "threads")
        }
        return TaggerSettings(model=str(bundle), runtime=runtime, **shared)


@dataclass(frozen=True, kw_only=True)
class ServedGraph:
    """One graph of a bundle as a model of Triton's.

    Attributes:
        name: of the Triton model.
        axes: for each tensor its axes in the engine, the batch among them; -1 where any size goes.
        backend: of Triton.
        files: what has to lie in the model's version folder, by the name that it has there; the first is its main file.
        parameters: for the backend, as its configuration carries them.
        profile: sizes that it takes, or at least will meet.
        is_built: whether the engine was built for the profile, and takes no others.
        on_gpu: whether Triton itself runs it on a GPU.
    """

    name: str
    contract: GraphContract
    axes: Mapping[str, tuple[int, ...]]
    backend: str
    files: Mapping[str, Path]
    parameters: Mapping[str, str]
    profile: Profile
    is_built: bool
    on_gpu: bool

    def shapes(self, tensor: TensorSpec) -> list[tuple[int, ...]]:
        """The shapes of an input that it is warmed up with, smallest first.

        An engine that was built for a profile is tried at its extremes. Any other gets its largest batch with the
        usual views and canvas, since the largest of all three would only take long; and the text tower as many
        sentences as there are classes, which is what it will meet.
        """
        least, best, most = self.profile.batch
        if tensor.axes[0] != "B":
            return [(rows, *self.axes[tensor.name][1:]) for rows in (least, best)]
        shapes = self.profile.shapes(tensor)
        return shapes if self.is_built else [*shapes[:2], (most, *shapes[1][1:])]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A bundle that will be served, and all that follows from it.

    Attributes:
        name: what clients call it.
        graphs: its models beside the tagger; the first is the one that the tagger asks.
    """

    name: str
    plan: Plan
    card: ModelCard
    graphs: tuple[ServedGraph, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all its Triton models, the tagger's first."""
        return (self.name, *(graph.name for graph in self.graphs))

    @property
    def batches(self) -> tuple[int, ...]:
        """The sizes of a batch that are worth waiting for."""
        _, best, most = self.graphs[0].profile.batch
        return tuple(sorted({best, most}))


@dataclass(frozen=True)
class Refused:
    """A bundle that cannot be served, and why."""

    name: str
    folder: Path
    error: ClipletError

"""What is served, decided and refused before a file is written: names, engines, sizes of batches, memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cliplet.engine_sidecar import Profile
from cliplet.errors import ClipletError, UsageError
from cliplet.plan import make_plan
from cliplet.serving import ModelCard

from .repository_graphs import BACKENDS, container_runtime, served_graphs, served_profile
from .repository_types import Refused, Served, ServeSettings

# A file of the usual size; larger ones come seldom, and fewer at once.
ENCODED_BYTES = 8 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def plan_served(
    bundles: Sequence[tuple[str | None, Path]], settings: ServeSettings, *, skip_broken: bool = False
) -> tuple[list[Served], list[Refused]]:
    """What will be served for the bundles, and what cannot be.

    Args:
        bundles: the name to serve each as, or None for that of its folder.
        skip_broken: leave out those that are no good, as long as one is left, instead of raising.

    Raises:
        UsageError: no bundle, a name that cannot be one, two models of the same name, or settings that a bundle
            cannot follow.
        ArtifactError: a bundle is incomplete or changed.
    """
    if not bundles:
        raise UsageError("no bundle to serve", "at least one", "cliplet serve BUNDLE")
    named = [(_name(name, folder), folder) for name, folder in bundles]
    served, refused = [], []
    for name, folder in named:
        try:
            served.append(_served(name, folder, settings))
        except ClipletError as error:
            refused.append(Refused(name, folder, error))
    if refused and (not skip_broken or not served):
        first = refused[0].error
        raise type(first)(
            f"cannot serve {refused[0].name}: {first.happened}", first.expected, first.fix
        ) from first
    _hold_distinct(served)
    return served, refused


def shared_memory_bytes(served: Sequence[Served], settings: ServeSettings) -> int:
    """Bytes of /dev/shm that the Python models of these bundles need when every instance holds its largest batch."""
    total = 0
    for one in served:
        graph = one.graphs[0]
        python = settings.instances if graph.backend == "python" else 0
        total += batch_memory(one.card, graph.profile, settings.instances + 1, python)
    return total


def batch_memory(card: ModelCard, profile: Profile, taggers: int, graphs: int) -> int:
    """Bytes of shared memory for the largest batch in so many instances of a tagger and of its graph."""
    canvases = card.max_batch_size * profile.canvas[2] ** 2 * 3
    return taggers * (canvases + card.max_batch_size * ENCODED_BYTES) + graphs * canvases


def safe_name(text: str, usual: str) -> str:
    """What is left of a text in a name that addresses can hold; `usual` where that is nothing."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._") or usual


def _name(name: str | None, folder: Path) -> str:
    """The name that was given, or that of the folder made safe."""
    if name is None:
        return safe_name(folder.resolve().name, "bundle")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"the name {name!r} for {folder}",
            "letters, digits, _, - and ., and a letter or a digit first: it is part of addresses",
            f"pets={folder}",
        )
    return name


def _hold_distinct(served: Sequence[Served]) -> None:
    owners: dict[str, Served] = {}
    for one in served:
        for model in one.models:
            other = owners.setdefault(model, one)
            if other is not one:
                raise UsageError(
                    f"{other.plan.spec} and {one.plan.spec} would both be served as {model}",
                    "a name of its own for each bundle",
                    f"cliplet serve {other.name}={other.plan.spec} {one.name}-2={one.plan.spec}",
                )


def _served(name: str, folder: Path, settings: ServeSettings) -> Served:
    runtime = settings.runtime
    if runtime == "auto" and settings.target == "container":
        runtime = container_runtime(folder, settings)
    plan = make_plan(settings.tagger(folder, runtime), features=True)
    bundle, engine = plan.bundle, plan.engine
    if bundle is None or engine is None:
        raise UsageError(
            f"{folder} with --runtime {plan.runtime}: nothing was exported that a server could run",
            "a bundle and one of its engines",
            f"cliplet export {plan.spec} --out BUNDLE, then cliplet serve BUNDLE",
        )
    if settings.target == "container" and engine.runtime not in BACKENDS:
        raise UsageError(
            f"{engine.name} in a container: Triton's TensorRT backend cannot load engines of TensorRT for RTX",
            f"an engine of {', '.join(BACKENDS)}",
            f"cliplet export {bundle.manifest.model} --runtime tensorrt --out NEW, or --runtime onnx here",
        )
    profile = served_profile(plan, bundle, engine, settings)
    card = ModelCard(
        name=name,
        manifest=bundle.manifest,
        views=str(plan.views),
        thresholds=plan.thresholds,
        threshold_source=plan.threshold_source,
        runtime=engine.runtime,
        precision=engine.precision_read,
        device=engine.device,
        max_batch_size=profile.batch[2],
        max_pixels=settings.max_pixels,
    )
    return Served(
        name=name, plan=plan, card=card, graphs=tuple(served_graphs(name, bundle, engine, profile, settings))
    )

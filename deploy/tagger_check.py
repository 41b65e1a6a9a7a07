"""What can be wrong with a tagger or an embedder in a repository: its outputs, its class names, its limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cliplet.serving import SCORES, ModelCard, tagger_extras

from .engine_check import REWRITE, check_types


def check_tagger(folder: Path, config: Any, card: ModelCard) -> Iterator[tuple[str, str]]:
    """Each problem and what mends it.

    Args:
        config: its `ModelConfig`.
    """
    yield from _tensors(config, card)
    yield from _labels(folder, config, card)
    if card.name != folder.name:
        yield f"its card is that of {card.name}", REWRITE
    if config.max_batch_size != card.max_batch_size:
        yield (
            f"its card promises batches of {card.max_batch_size}, max_batch_size is {config.max_batch_size}",
            REWRITE,
        )
    if any(group.rate_limiter.resources for group in config.instance_group):
        yield (
            "a rate limit: it would hold what its graph waits for, and both would wait forever",
            "limit the graph, not the tagger",
        )


def _tensors(config: Any, card: ModelCard) -> Iterator[tuple[str, str]]:
    offered = {tensor.name for tensor in config.output}
    extras = tagger_extras(card.manifest.kind)
    yield from check_types(config.input, card.front.inputs)
    yield from check_types(config.output, [*card.front.outputs, *(e for e in extras if e.name in offered)])
    cached = config.response_cache.enable
    for extra in extras:
        if cached and extra.name in offered:
            yield (
                f"a response cache and the output {extra.name}: who asks for it would get an answer without it, "
                "kept for others",
                REWRITE,
            )
        if not cached and extra.name not in offered:
            yield f"it lacks the output {extra.name}", REWRITE


def _labels(folder: Path, config: Any, card: ModelCard) -> Iterator[tuple[str, str]]:
    names = card.manifest.vocabulary.names
    if len(card.thresholds) != len(names):
        yield f"its card has {len(card.thresholds)} thresholds for {len(names)} classes", REWRITE
    for tensor in config.output:
        if tensor.name != SCORES:
            continue
        if list(tensor.dims) != [len(names)]:
            yield f"scores of {list(tensor.dims)} classes, and the bundle has {len(names)}", REWRITE
        file = folder / (tensor.label_filename or "labels.txt")
        if not file.is_file():
            yield f"{file.name} with the names of its classes is missing", REWRITE
        elif tuple(file.read_text(encoding="utf-8", errors="replace").splitlines()) != names:
            listed = len(file.read_text(encoding="utf-8", errors="replace").splitlines())
            yield f"{file.name} has {listed} names, which are not the {len(names)} of the bundle", REWRITE

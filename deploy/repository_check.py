"""Finds out before the start what Triton would say much later, or not at all: `cliplet serve check REPOSITORY`.

Only files are read, and nothing but the standard library and Triton's own description of its configurations is needed:
no engine is loaded, and no server is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from cliplet.contract import TEXT, GraphContract
from cliplet.engine_sidecar import Profile
from cliplet.errors import ArtifactError, ClipletError
from cliplet.serving import CARD_KEY, ModelCard, graph_model

from .engine_check import REWRITE, check_engine, check_tensors
from .repository import CONFIG_FILE, VERSION
from .repository_config import MODEL_PY, PATHS_PY
from .repository_graphs import expected_profile
from .repository_plan import batch_memory
from .tagger_check import check_tagger


@dataclass(frozen=True)
class Problem:
    """Something in a repository that would not work.

    Attributes:
        model: the model, or "" where it concerns all of them.
        happened: what is wrong.
        fix: what mends it.
    """

    model: str
    happened: str
    fix: str = REWRITE

    def __str__(self) -> str:
        return f"{self.model or 'repository'}: {self.happened}\n  fix: {self.fix}"


@dataclass(frozen=True)
class Model:
    """A model of a repository and its configuration, a `ModelConfig` of Triton's."""

    folder: Path
    config: Any

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> Path:
        return self.folder / VERSION

    @property
    def main_file(self) -> Path:
        """The file that its backend loads."""
        return self.version / (self.config.default_model_filename or MODEL_PY)

    @property
    def parameters(self) -> dict[str, str]:
        return {key: value.string_value for key, value in self.config.parameters.items()}

    @property
    def instances(self) -> int:
        return sum(max(1, group.count) for group in self.config.instance_group)

    def card(self) -> ModelCard | None:
        """What a tagger says of its bundle; None of any other model.

        Raises:
            ArtifactError: it cannot be read.
        """
        text = self.parameters.get(CARD_KEY)
        return None if text is None else ModelCard.from_json(text, f"{self.name}/{CONFIG_FILE}")


Found = Iterator[tuple[str, str]]


def check_repository(
    folder: Path,
    *,
    backends: Collection[str] | None = None,
    shm_bytes: int | None = None,
    gpu: bool | None = None,
) -> list[Problem]:
    """All that would not work when a server is started with the repository in `folder`; empty if all is well.

    Args:
        backends: those that the server has; None if that is not known.
        shm_bytes: size of its /dev/shm; None likewise.
        gpu: whether it has a GPU; None likewise.
    """
    models, problems = _read(folder)
    for model in models.values():
        problems += [
            Problem(model.name, happened, fix) for happened, fix in _model_problems(model, backends, gpu)
        ]
        problems += _bundle_problems(model, models)
    if shm_bytes is not None:
        problems += _memory_problems(models, shm_bytes)
    return problems


def _read(folder: Path) -> tuple[dict[str, Model], list[Problem]]:
    """The models whose configurations can be read, and what is wrong with the others."""
    folders = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not folders:
        return {}, [Problem("", f"{folder} holds no model")]
    models, problems = {}, []
    for place in folders:
        try:
            text = (place / CONFIG_FILE).read_text(encoding="utf-8")
            models[place.name] = Model(place, text_format.Parse(text, model_config_pb2.ModelConfig()))
        except FileNotFoundError:
            problems.append(Problem(place.name, f"{CONFIG_FILE} is missing"))
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            problems.append(Problem(place.name, f"{CONFIG_FILE} cannot be read: line {error}"))
    return models, problems


def _model_problems(model: Model, backends: Collection[str] | None, gpu: bool | None) -> Found:
    """What is wrong with a model by itself."""
    checks: Sequence[Callable[[Model], Found]] = (_files, _batching, _warm_up)
    for check in checks:
        yield from check(model)
    config = model.config
    if config.name and config.name != model.name:
        yield f"{CONFIG_FILE} calls it {config.name}, its folder {model.name}", "rename the folder"
    if backends is not None and config.backend not in backends:
        known = ", ".join(sorted(backends)) or "none"
        yield (
            f"the server has no backend {config.backend!r}, only {known}",
            "serve it in NVIDIA's container, or write it for the embedded server: cliplet serve BUNDLE",
        )
    kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
    if gpu is False and any(group.kind == kind for group in config.instance_group):
        yield "its instances are for a GPU, and there is none here", "serve with --device cpu"


def _files(model: Model) -> Found:
    if not model.version.is_dir():
        yield f"the folder of its version, {VERSION}/, is missing", REWRITE
    elif not model.main_file.is_file():
        yield f"{VERSION}/{model.main_file.name}, which its backend loads, is missing", REWRITE
    elif model.main_file.suffix == ".xml" and not model.main_file.with_suffix(".bin").is_file():
        yield f"{VERSION}/{model.main_file.stem}.bin, the weights of its IR, is missing", REWRITE
    elif model.main_file.name == MODEL_PY and not (model.version / PATHS_PY).is_file():
        yield f"{VERSION}/{PATHS_PY}, which {MODEL_PY} imports, is missing", REWRITE


def _batching(model: Model) -> Found:
    most = model.config.max_batch_size
    if most < 1:
        yield f"max_batch_size is {most}, but its tensors have an axis for the batch", "--max-batch-size 1"
    preferred = model.config.dynamic_batching.preferred_batch_size
    if any(not 1 <= size <= max(1, most) for size in preferred):
        yield f"preferred batches of {list(preferred)} images with max_batch_size {most}", REWRITE


def _warm_up(model: Model) -> Found:
    inputs = {tensor.name: tensor for tensor in model.config.input}
    for sample in model.config.model_warmup:
        if sorted(sample.inputs) != sorted(inputs):
            yield f"its warm-up {sample.name} feeds {sorted(sample.inputs)} of {sorted(inputs)}", REWRITE
            continue
        if sample.batch_size > model.config.max_batch_size:
            yield (
                f"its warm-up {sample.name} is a batch of {sample.batch_size}, max_batch_size {model.config.max_batch_size}",
                REWRITE,
            )
        for name, value in sample.inputs.items():
            wanted = inputs[name].dims
            fits = len(value.dims) == len(wanted) and all(
                w in (-1, d) for w, d in zip(wanted, value.dims, strict=True)
            )
            if value.data_type != inputs[name].data_type or not fits:
                yield f"its warm-up {sample.name} does not fit the input {name}", REWRITE
            file = value.input_data_file
            if file and not (model.folder / "warmup" / file).is_file():
                yield f"warmup/{file}, which its warm-up {sample.name} reads, is missing", REWRITE


def _bundle_problems(model: Model, models: dict[str, Model]) -> Iterator[Problem]:
    """What is wrong between a tagger and what belongs to it."""
    try:
        card = model.card()
    except ClipletError as error:
        yield Problem(model.name, error.happened, error.fix)
        return
    if card is None:
        return
    for happened, fix in check_tagger(model.folder, model.config, card):
        yield Problem(model.name, happened, fix)
    graph = models.get(card.graph)
    if graph is None:
        yield Problem(model.name, f"it asks {card.graph}, which is not in the repository")
    else:
        if graph.config.max_batch_size < card.max_batch_size:
            yield Problem(
                model.name,
                f"it sends up to {card.max_batch_size} images to {graph.name}, which takes {graph.config.max_batch_size}",
            )
        yield from _graph_problems(graph, card, card.manifest.contract)
    text = models.get(graph_model(card.name, TEXT.name))
    if text is not None:
        yield from _graph_problems(text, card, TEXT)


def _graph_problems(model: Model, card: ModelCard, contract: GraphContract) -> Iterator[Problem]:
    for found in (
        check_tensors(model.config, contract),
        check_engine(model.main_file, model.config, model.parameters, card, contract),
    ):
        for happened, fix in found:
            yield Problem(model.name, happened, fix)


def _memory_problems(models: dict[str, Model], shm_bytes: int) -> list[Problem]:
    """Whether the Python models' largest batches fit into shared memory, all at the same time."""
    needed = 0
    for model in models.values():
        try:
            card = model.card()
        except ArtifactError:
            continue
        graph = models.get(card.graph) if card else None
        if card is not None and graph is not None:
            python = graph.instances if graph.config.backend == "python" else 0
            needed += batch_memory(card, _profile_of(card), model.instances, python)
    if needed <= shm_bytes:
        return []
    return [
        Problem(
            "",
            f"its largest batches take {_mib(needed)} of shared memory, and /dev/shm has {_mib(shm_bytes)}",
            f"a container with --shm-size {_mib(needed).replace(' MiB', 'm')}, or a smaller --max-batch-size",
        )
    ]


def _profile_of(card: ModelCard) -> Profile:
    return expected_profile(card.manifest, 1, (1, 1, card.max_batch_size))


def _mib(count: int) -> str:
    return f"{-(-count // 2**20)} MiB"

"""What can be wrong between a graph's configuration, its contract and the file of its engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from cliplet.artifact import TEXT_FILE, Engine, Manifest
from cliplet.contract import TEXT, GraphContract, TensorSpec
from cliplet.engine_sidecar import Profile, SideCar, shown_bounds
from cliplet.errors import ClipletError
from cliplet.model_spec import file_sha256
from cliplet.serving import ModelCard
from cliplet.views import Views

from .engine_tensors import engine_tensors
from .repository_config import config_type

Found = Iterator[tuple[str, str]]
REWRITE = "write the repository again: cliplet serve BUNDLE"


def check_tensors(config: Any, contract: GraphContract) -> Found:
    """Each difference between the tensors of a configuration and those of a contract, and what mends it."""
    yield from check_types(config.input, contract.inputs)
    yield from check_types(config.output, contract.outputs)


def check_types(configured: Sequence[Any], specs: Sequence[TensorSpec]) -> Found:
    """Names, types and numbers of axes."""
    wanted = {spec.name: spec for spec in specs}
    names = [tensor.name for tensor in configured]
    if sorted(names) != sorted(wanted):
        yield f"it has the tensors {names}, and its contract {list(wanted)}", REWRITE
    for tensor in configured:
        spec = wanted.get(tensor.name)
        if spec is None:
            continue
        found = model_config_pb2.DataType.Name(tensor.data_type)
        if found != config_type(spec):
            yield f"the tensor {tensor.name} is {found}, and in its contract {config_type(spec)}", REWRITE
        # The axis of the batch is left out of configurations.
        axes = spec.axes[1:]
        dims = list(tensor.dims)
        fits = len(dims) == len(axes) and all(
            not isinstance(a, int) or a == d for a, d in zip(axes, dims, strict=True)
        )
        if not fits:
            yield f"the tensor {tensor.name} has dims {dims}, and in its contract {list(axes)}", REWRITE


def check_engine(
    main_file: Path, config: Any, parameters: Mapping[str, str], card: ModelCard, contract: GraphContract
) -> Found:
    """Each way in which a graph's engine is not what its configuration and its bundle say, and what mends it.

    Args:
        main_file: what its backend loads.
        parameters: of its configuration; those of a Python model say where the engine is.
    """
    file, is_python = main_file, config.backend == "python"
    if is_python:
        file = Path(parameters.get("bundle", "")) / parameters.get("file", "")
        if not file.is_file():
            yield f"its engine {file} is missing", "put the bundle back where it was, or serve it again"
            return
    if not file.is_file():
        return  # told with the other files
    yield from _hashes(file, card.manifest, _engine(card, contract))
    if file.suffix in (".onnx", ".xml"):
        yield from _sizes(file, config)
    elif file.suffix == ".plan":
        yield from _profile(file, config, card)


def _engine(card: ModelCard, contract: GraphContract) -> Engine | None:
    """The engine of the bundle that the card tells of."""
    if contract is TEXT:
        return Engine("onnx", "fp32", TEXT_FILE, "fp32", "cpu", {})
    told = (card.runtime, card.precision, card.device)
    return next((e for e in card.manifest.engines if (e.runtime, e.precision_read, e.device) == told), None)


def _hashes(file: Path, manifest: Manifest, engine: Engine | None) -> Found:
    if engine is None:
        yield "its card tells of an engine that its bundle does not hold", REWRITE
        return
    for name, sha256 in manifest.files_of(engine).items():
        # An IR is renamed in a repository; what else belongs to an engine keeps its name.
        place = (
            file.with_suffix(Path(name).suffix) if file.suffix == ".xml" else file.with_name(Path(name).name)
        )
        if not place.is_file():
            yield f"{place} is missing", REWRITE
        elif file_sha256(place) != sha256:
            yield f"{place} has changed since it was exported", "export the bundle again, then serve it"


def _sizes(file: Path, config: Any) -> Found:
    """Triton compares a configuration with an engine axis by axis; what is fixed in the engine has to be fixed here."""
    try:
        tensors = engine_tensors(file)
    except ClipletError as error:
        yield error.happened, "export the bundle again, then serve it"
        return
    for tensor in [*config.input, *config.output]:
        found = tensors.get(tensor.name)
        if found is None:
            yield f"its engine has no tensor {tensor.name}, only {', '.join(tensors)}", REWRITE
        elif (
            any(engine not in (-1, dim) for engine, dim in zip(found.axes[1:], tensor.dims, strict=False))
            or len(found.axes) != len(tensor.dims) + 1
        ):
            yield (
                f"the tensor {tensor.name} has dims {list(tensor.dims)}, and in its engine {list(found.axes[1:])}",
                REWRITE,
            )


def _profile(plan: Path, config: Any, card: ModelCard) -> Found:
    try:
        sidecar = SideCar.of(plan)
    except ClipletError as error:
        yield error.happened, error.fix
        return
    built: Profile = sidecar.profile
    least, _, most = built.batch
    if config.max_batch_size > most or least > 1:
        yield (
            f"batches of 1 to {config.max_batch_size}, and its engine was built for {least} to {most} images",
            f"--max-batch-size {most}"
            if least == 1
            else f"export with --batch {shown_bounds((1, *built.batch[1:]))}",
        )
    views = Views.parse(card.views).count
    if card.manifest.contract.takes_views and not built.views[0] <= views <= built.views[2]:
        yield (
            f"views {card.views}, {views} of an image, and its engine was built for {built.views[0]} to {built.views[2]}",
            f"export with --views {shown_bounds((1, views, max(views, built.views[2])))}",
        )
    if sidecar.plan_sha256 != file_sha256(plan):
        yield (
            f"{plan.name} is not the plan that its side-car tells of",
            "export the bundle again, then serve it",
        )

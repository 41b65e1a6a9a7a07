"""Facts about a bundle, damaged or not, and about a TensorRT engine with its side-car."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cliplet.artifact import Engine, Manifest
from cliplet.contract import GraphContract, TensorSpec
from cliplet.engine_sidecar import REBUILD, REBUILD_EITHER, SideCar, sidecar_path
from cliplet.model_spec import MANIFEST_NAME, file_sha256
from cliplet.plan import usable_runtimes

from .facts import Facts, class_facts, read_json, shown_shape, threshold_facts, understood


def bundle_facts(folder: Path) -> Facts:
    """All that its manifest says, and what of it still holds. Files that are missing or changed are `damage`.

    Raises:
        ArtifactError: the manifest cannot be read, or is of another schema.
    """
    file = folder / MANIFEST_NAME
    expected, fix = "the manifest of a bundle", "export again"
    data = read_json(file, expected, fix)
    with understood(file, expected, fix):
        manifest = Manifest.from_json(data, str(file))
        files = _files(folder, manifest.files)
        damage = [
            f"{name} {facts['state']}" for name, facts in files.items() if facts["state"] != "unchanged"
        ]
        damage += [
            f"{engine.file} of {engine.name} is not among the files"
            for engine in manifest.engines
            if engine.file not in manifest.files
        ]
        return {
            "intact": not damage,
            "damage": damage,
            "graph": manifest.kind,
            "model": manifest.model,
            "identity": manifest.identity,
            "bytes": sum(facts.get("bytes", 0) for facts in files.values()),
            **_tensors(manifest.contract),
            **(class_facts(manifest.vocabulary) if manifest.vocabulary.names else {}),
            "thresholds": {
                views: threshold_facts(entry, manifest.vocabulary.names, f"{file}, views {views},")
                for views, entry in manifest.thresholds.items()
            },
            "preprocessing": manifest.preprocessing.to_json(),
            "aggregation": dict(manifest.aggregation),
            "scale": manifest.scale,
            "bias": manifest.bias,
            "engines": {engine.name: _engine(engine, folder) for engine in manifest.engines},
            "dropped": list(manifest.dropped),
            "files": files,
            "unlisted_files": _unlisted(folder, manifest.files),
            "versions": _versions(manifest.versions),
            "installed_runtimes": {device: usable_runtimes(device) for device in ("cpu", "cuda")},
            "trained": dict(manifest.trained),
        }


def plan_facts(plan: Path) -> Facts:
    """What the side-car of a TensorRT engine says, and whether it is of this very plan.

    Raises:
        ArtifactError: there is no side-car, or it cannot be read; a plan says nothing about itself.
    """
    beside = sidecar_path(plan)
    expected = f"the side-car that tells what {plan.name} is"
    with understood(beside, expected, REBUILD_EITHER):
        sidecar = SideCar.of(plan)
    with understood(beside, expected, REBUILD.format(library=sidecar.library)):
        matches = file_sha256(plan) == sidecar.plan_sha256
        return {
            "intact": matches,
            "damage": [] if matches else [f"{plan.name} is not the plan that {beside.name} is about"],
            "bytes": plan.stat().st_size,
            "sidecar": beside.name,
            "plan_matches_sha256": matches,
            "library_installed": sidecar.library in usable_runtimes("cuda"),
            **asdict(sidecar),
        }


def _files(folder: Path, recorded: Mapping[str, str]) -> dict[str, Facts]:
    found: dict[str, Facts] = {}
    for name, sha256 in sorted(recorded.items()):
        path = folder / name
        if not path.is_file():
            found[name] = {"state": "is missing", "sha256": sha256}
            continue
        try:
            now = file_sha256(path)
            state = "unchanged" if now == sha256 else "has changed since it was written"
        except OSError as error:
            state = f"cannot be read: {error.strerror}"
        found[name] = {"state": state, "bytes": path.stat().st_size, "sha256": sha256}
    return found


def _unlisted(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name not in recorded and name != MANIFEST_NAME)


def _engine(engine: Engine, folder: Path) -> Facts:
    main = folder / engine.file
    parts = [
        main,
        main.with_name(f"{main.name}.data"),
        *([main.with_suffix(".bin")] if main.suffix == ".xml" else []),
    ]
    return {
        "runtime": engine.runtime,
        # A graph for onnxruntime runs on both; others on what they were made for.
        "runtime_installed": engine.runtime in usable_runtimes("cpu" if engine.device == "cpu" else "cuda"),
        "device": engine.device,
        "precision": engine.precision,
        "precision_read": engine.precision_read,
        "file": engine.file,
        "bytes": sum(part.stat().st_size for part in parts if part.is_file()),
        "parity": dict(engine.parity),
        "details": dict(engine.details),
    }


def _tensors(contract: GraphContract) -> Facts:
    def shown(specs: tuple[TensorSpec, ...]) -> Facts:
        return {spec.name: {"type": spec.dtype, "shape": shown_shape(spec.axes)} for spec in specs}

    return {"inputs": shown(contract.inputs), "outputs": shown(contract.outputs)}


def _versions(recorded: Mapping[str, str]) -> Facts:
    """Versions of the libraries that wrote the bundle, and those of them that are others here."""
    here: dict[str, Any] = {name: _installed(name) for name in recorded}
    return {
        "recorded": dict(recorded),
        "differing": {
            name: {"recorded": then, "installed": here[name]}
            for name, then in recorded.items()
            if here[name] != then
        },
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

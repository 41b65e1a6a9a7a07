"""A finished bundle compared with its original again, wherever both are: `cliplet verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cliplet.artifact import Bundle, BundleJob, Engine
from cliplet.contract import FEATURES
from cliplet.engine_sidecar import Profile
from cliplet.errors import (
    ArtifactError,
    DataError,
    EnvironmentError_,
    ForeignEngine,
    ParityError,
    UsageError,
    explained_os_errors,
)
from cliplet.model_spec import ModelSpec, parse_model_spec
from cliplet.plan import DEFAULT_VIEWS
from cliplet.runners import open_runner
from cliplet.views import Aggregation

from .bundle import BuildOptions, open_gate
from .originals import load_original
from .parity import Gate, verdict


@dataclass(frozen=True)
class Verified:
    """What became of one engine.

    Attributes:
        parity: the verdict, as in a manifest; empty if it could not be run here.
        speed: views a second and so on; empty likewise.
        not_run: why not.
    """

    engine: Engine
    precision_read: str
    parity: Mapping[str, Any]
    speed: Mapping[str, Any]
    not_run: str = ""


def verify(bundle: Bundle, options: BuildOptions, model: str | None = None) -> list[Verified]:
    """Every engine of a bundle against the eager float32 original.

    Args:
        model: the original, where it lies elsewhere than the manifest says.

    Raises:
        ArtifactError: `model` is not what the bundle was made from.
        ParityError: not one engine could be run here.
        EnvironmentError_: the original cannot be loaded.
    """
    manifest = bundle.manifest
    spec = find_original(bundle, model)
    job = BundleJob(spec, manifest.vocabulary, Aggregation(**manifest.aggregation), manifest.thresholds)
    gate = open_gate(load_original(job), job, replace(options, profile=_common_profile(manifest.engines)))
    rows = [_verified(bundle, engine, gate, options.threads) for engine in manifest.engines]
    if not any(row.parity for row in rows):
        reasons = "; ".join(f"{row.engine.name}: {row.not_run}" for row in rows)
        raise ParityError(
            f"nothing was compared: {reasons or 'the bundle holds no engine'}", "at least one engine"
        )
    return rows


def find_original(bundle: Bundle, model: str | None = None) -> ModelSpec:
    """The model that a bundle was made from, which may lie elsewhere now.

    Raises:
        ArtifactError: it is not there, or has other weights.
    """
    manifest = bundle.manifest
    fix = "name the original with --model"
    try:
        spec = parse_model_spec(model or manifest.model)
        identity = spec.identity()
    except (UsageError, DataError) as error:
        raise ArtifactError(
            f"the original of {bundle.folder} cannot be found: {error.happened}", manifest.model, fix
        ) from error
    if identity != manifest.identity:
        raise ArtifactError(
            f"{spec} is not what {bundle.folder} was made from: its weights have another hash",
            f"identity {manifest.identity}, of {manifest.model}",
            fix,
        )
    return spec


def _common_profile(engines: Sequence[Engine]) -> Profile:
    """Sizes that every TensorRT engine of a bundle takes."""
    built = [engine.details["profile"] for engine in engines if "profile" in engine.details]
    if not built:
        return Profile()
    bounds = {
        axis: (max(p[axis][0] for p in built), built[0][axis][1], min(p[axis][2] for p in built))
        for axis in ("batch", "views")
    }
    return Profile(batch=bounds["batch"], views=bounds["views"])


def _verified(bundle: Bundle, engine: Engine, gate: Gate, threads: int) -> Verified:
    try:
        runner = open_runner(
            engine.runtime,
            bundle.folder / engine.file,
            bundle.manifest.contract,
            precision=engine.precision,
            device="cpu" if engine.device == "cpu" else "cuda",
            threads=threads,
            observe=(FEATURES,),
        )
    except (EnvironmentError_, ForeignEngine) as error:
        return Verified(engine, "", {}, {}, error.happened)
    except ModuleNotFoundError as error:
        return Verified(engine, "", {}, {}, f"{error.name} is not installed")
    with runner:
        found = verdict(gate.compare(runner), engine.precision, gate.samples)
        return Verified(engine, runner.precision, found, gate.speed(runner))


def hold(rows: list[Verified]) -> None:
    """Raise `ParityError` if an engine that was run differs by more than its precision allows."""
    bad = [row for row in rows if row.parity and not row.parity["passed"]]
    if bad:
        said = "; ".join(f"{row.engine.name}: {', '.join(row.parity['breaches'])}" for row in bad)
        raise ParityError(
            f"{len(bad)} of {len(rows)} engines differ from the original: {said}",
            "each within the tolerance of its precision",
            "export again; `cliplet inspect BUNDLE` shows what it was made with",
        )


REPRODUCTION = '''"""Repeats one comparison: {engine} of a bundle against the eager float32 model; exit code 3 if they differ."""

import sys
from pathlib import Path

import numpy as np

from cliplet.artifact import Bundle, BundleJob
from cliplet.contract import FEATURES
from cliplet.export.bundle import BuildOptions, open_gate
from cliplet.export.originals import load_original
from cliplet.export.parity import verdict
from cliplet.export.verification import find_original
from cliplet.runners import open_runner
from cliplet.runners.torch_runner import TorchRunner
from cliplet.views import Aggregation, Views

BUNDLE = Path({bundle!r})
MODEL = {model!r}
ENGINE = {engine!r}
OPTIONS = BuildOptions(images={images!r}, count={count!r}, threads={threads!r})
VIEWS = {views!r}

bundle = Bundle.load(BUNDLE)
manifest = bundle.manifest
engine = next(e for e in manifest.engines if e.name == ENGINE)
job = BundleJob(
    find_original(bundle, MODEL), manifest.vocabulary, Aggregation(**manifest.aggregation), manifest.thresholds
)
original = load_original(job)
gate = open_gate(original, job, OPTIONS)
eager = TorchRunner(original.eager, manifest.contract, observe=(FEATURES,))
other = open_runner(
    engine.runtime,
    BUNDLE / engine.file,
    manifest.contract,
    precision=engine.precision,
    device="cpu" if engine.device == "cpu" else "cuda",
    threads=OPTIONS.threads,
    observe=(FEATURES,),
)
feeds_of_images = gate.samples.batches(1, Views.parse(VIEWS), manifest.preprocessing, manifest.contract)
for number, feeds in enumerate(feeds_of_images):
    wanted, found = eager.infer(feeds), other.infer(feeds)
    line = [f"{{name}} {{np.abs(found[name] - wanted[name]).max():.3g}}" for name in wanted]
    print(f"image {{number}}: largest difference of", ", ".join(line))
result = verdict(gate.compare(other), engine.precision, gate.samples)
print(result)
sys.exit(0 if result["passed"] else 3)
'''


def write_reproduction(
    file: Path, bundle: Bundle, row: Verified, options: BuildOptions, model: str | None
) -> None:
    """Write a script that repeats the comparison of one engine and prints the differences of every image."""
    facts = {
        "bundle": str(bundle.folder.resolve()),
        "model": model or bundle.manifest.model,
        "engine": row.engine.name,
        "images": tuple(str(Path(source).resolve()) for source in options.images),
        "count": options.count,
        "threads": options.threads,
        "views": DEFAULT_VIEWS if bundle.manifest.contract.takes_views else "1",
    }
    with explained_os_errors(file, "choose another file for --reproduce"):
        file.write_text(REPRODUCTION.format(**facts), encoding="utf-8")


def as_json(rows: list[Verified]) -> str:
    """The rows for machines."""
    return json.dumps(
        [
            {
                "engine": row.engine.name,
                "precision": row.engine.precision,
                "precision_read": row.precision_read,
                "parity": row.parity,
                "speed": row.speed,
                "not_run": row.not_run,
            }
            for row in rows
        ],
        indent=2,
        default=dict,
    )

"""A finished bundle compared with its original again, wherever both are: `cliplet verify`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cliplet.artifact import TEXT_FILE, Bundle, BundleJob, Engine, Manifest
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
from cliplet.remote_files import is_remote
from cliplet.runners import open_runner
from cliplet.teacher import Teacher
from cliplet.views import Aggregation

from .bundle import BuildOptions, open_gate
from .originals import load_original
from .parity import Gate, verdict
from .text_tower import compare_text


@dataclass(frozen=True)
class Verified:
    """What became of one engine, or of the text tower.

    Attributes:
        engine: None for the text tower.
        parity: the verdict, as in a manifest; empty if it could not be run here.
        speed: views a second and so on; empty likewise.
        not_run: why not.
    """

    engine: Engine | None
    precision_read: str
    parity: Mapping[str, Any]
    speed: Mapping[str, Any]
    not_run: str = ""

    @property
    def name(self) -> str:
        """The engine's, or the file of the text tower."""
        return self.engine.name if self.engine else TEXT_FILE


def verify(bundle: Bundle, options: BuildOptions, model: str | None = None) -> list[Verified]:
    """Every engine of a bundle, and its text tower if it holds one, against the eager float32 original.

    Args:
        model: the original, where it lies elsewhere than the manifest says.

    Raises:
        ArtifactError: `model` is not what the bundle was made from.
        ParityError: not one engine could be run here.
        EnvironmentError_: the original cannot be loaded.
    """
    manifest = bundle.manifest
    spec = find_original(bundle, model)
    job = job_of(manifest, spec)
    original = load_original(job)
    gate = open_gate(original, job, replace(options, profile=common_profile(manifest.engines)))
    rows = [_verified(bundle, engine, gate, options.threads) for engine in manifest.engines]
    if not any(row.parity for row in rows):
        reasons = "; ".join(f"{row.name}: {row.not_run}" for row in rows)
        raise ParityError(
            f"nothing was compared: {reasons or 'the bundle holds no engine'}", "at least one engine"
        )
    if original.teacher is not None and (bundle.folder / TEXT_FILE).is_file():
        rows.append(_verified_text(bundle, original.teacher))
    return rows


def job_of(manifest: Manifest, spec: ModelSpec) -> BundleJob:
    """What a bundle with this manifest was made of, where `spec` is its original."""
    engines = tuple((engine.runtime, engine.precision) for engine in manifest.engines)
    aggregation = Aggregation(**manifest.aggregation)
    return BundleJob(spec, manifest.vocabulary, aggregation, manifest.thresholds, engines)


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


def common_profile(engines: Sequence[Engine]) -> Profile:
    """Sizes that every TensorRT engine of a bundle takes; the usual ones where it holds none."""
    built = [profile for engine in engines if (profile := _profile_of(engine))]
    if not built:
        return Profile()
    bounds = {
        axis: (
            max(getattr(p, axis)[0] for p in built),
            getattr(built[0], axis)[1],
            min(getattr(p, axis)[2] for p in built),
        )
        for axis in ("batch", "views", "canvas")
    }
    return Profile(**bounds)


def _profile_of(engine: Engine) -> Profile | None:
    """The sizes that an engine was built for; None for one that takes any."""
    if "profile" not in engine.details:
        return None
    return Profile(**{axis: tuple(sizes) for axis, sizes in engine.details["profile"].items()})


def _verified_text(bundle: Bundle, teacher: Teacher) -> Verified:
    try:
        found = compare_text(bundle.folder / TEXT_FILE, teacher, bundle.manifest.vocabulary)
    except EnvironmentError_ as error:
        return Verified(None, "", {}, {}, error.happened)
    return Verified(None, "fp32", found, {})


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
        found = verdict(gate.compare(runner, _profile_of(engine)), engine.precision, gate.samples)
        return Verified(engine, runner.precision, found, gate.speed(runner))


def hold(rows: list[Verified]) -> None:
    """Raise `ParityError` if an engine that was run differs by more than its precision allows."""
    bad = [row for row in rows if row.parity and not row.parity["passed"]]
    if bad:
        said = "; ".join(f"{row.name}: {', '.join(row.parity['breaches'])}" for row in bad)
        raise ParityError(
            f"{len(bad)} of {len(rows)} engines differ from the original: {said}",
            "each within the tolerance of its precision",
            "export again; `cliplet inspect BUNDLE` shows what it was made with",
        )


REPRODUCTION = '''"""Repeats one comparison: {engine} of a bundle against the eager float32 model; exit code 3 if they differ."""

import sys
from dataclasses import replace
from pathlib import Path

from cliplet.artifact import Bundle
from cliplet.contract import FEATURES
from cliplet.export.bundle import BuildOptions, open_gate
from cliplet.export.originals import load_original
from cliplet.export.parity import verdict
from cliplet.export.verification import common_profile, find_original, job_of
from cliplet.runners import open_runner

BUNDLE = Path({bundle!r})
MODEL = {model!r}
ENGINE = {engine!r}
OPTIONS = BuildOptions(images={images!r}, count={count!r}, threads={threads!r})

bundle = Bundle.load(BUNDLE)
manifest = bundle.manifest
engine = next(e for e in manifest.engines if e.name == ENGINE)
job = job_of(manifest, find_original(bundle, MODEL))
# The sizes that TensorRT engines of the bundle were built for, if it holds any.
profile = common_profile(manifest.engines)
gate = open_gate(load_original(job), job, replace(OPTIONS, profile=profile))
other = open_runner(
    engine.runtime,
    BUNDLE / engine.file,
    manifest.contract,
    precision=engine.precision,
    device="cpu" if engine.device == "cpu" else "cuda",
    threads=OPTIONS.threads,
    observe=(FEATURES,),
)
for number, differences in enumerate(gate.differences(other)):
    line = [f"{{name}} {{largest:.3g}}" for name, largest in differences.items()]
    print(f"image {{number}}: largest difference of", ", ".join(line))
sizes = profile if engine.runtime.startswith("tensorrt") else None
result = verdict(gate.compare(other, sizes), engine.precision, gate.samples)
print(result)
sys.exit(0 if result["passed"] else 3)
'''


def write_reproduction(
    file: Path, bundle: Bundle, engine: Engine, options: BuildOptions, model: str | None
) -> None:
    """Write a script that repeats the comparison of one engine and prints the differences of every image.

    It runs from any folder: what lies on this machine is named in full, and URLs and public names as they are.
    """
    facts = {
        "bundle": str(bundle.folder.resolve()),
        "model": parse_model_spec(model or bundle.manifest.model).absolute(),
        "engine": engine.name,
        "images": tuple(
            source if is_remote(source) else os.path.abspath(source) for source in options.images
        ),
        "count": options.count,
        "threads": options.threads,
    }
    with explained_os_errors(file, "choose another file for --reproduce"):
        file.write_text(REPRODUCTION.format(**facts), encoding="utf-8")


def as_json(rows: list[Verified]) -> str:
    """The rows for machines."""
    return json.dumps(
        [
            {
                "engine": row.name,
                "precision": row.engine.precision if row.engine else row.precision_read,
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

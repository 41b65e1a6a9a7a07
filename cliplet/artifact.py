"""A bundle on disk: a folder with `cliplet.json`, what it was made of, and the files that it vouches for.

    BUNDLE/cliplet.json              schema, model, vocabulary, preprocessing, thresholds, engines, files, versions
    BUNDLE/model.onnx                the graph in float32; model.fp16.onnx and so on beside it
    BUNDLE/openvino/model.xml        the same for OpenVINO
    BUNDLE/engines/*.plan            TensorRT engines, each with a side-car
    BUNDLE/text.onnx                 the text tower, to exchange the vocabulary

Every file is listed with its sha256, every engine with its precision (asked and read back) and its parity
verdict. Loading checks the hashes. Bundles that cliplet makes for itself live in the cache folder, under a name
derived from all that went into them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cliplet.contract import CLASSIFIER, GRAPHS, SNIPPETS, TRUNK, GraphContract
from cliplet.errors import ArtifactError, DataError, UsageError, explained_os_errors
from cliplet.model_spec import MANIFEST_NAME, ModelSpec, file_sha256
from cliplet.views import Aggregation, Preprocessing
from cliplet.vocabulary import NO_CLASSES, Vocabulary

MANIFEST_SCHEMA = 2
MODEL_FILE = "model.onnx"
TEXT_FILE = "text.onnx"
# Any change to what is traced (`cliplet.snippets`, `cliplet.export.graphs`) must change this: it is part of the
# names in the cache.
GRAPH_VERSION = 5
WRITABLE_CACHE = "set CLIPLET_CACHE to a folder that can be written"
# What a manifest and its engines hold, as JSON.
_NUMBER = (int, float)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("kind", "model", "identity"), str),
    "scale": _NUMBER,
    "bias": (*_NUMBER, type(None)),
    **dict.fromkeys(("aggregation", "thresholds", "trained", "files", "versions"), dict),
}
_PARTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("vocabulary", "preprocessing"), dict),
    **dict.fromkeys(("engines", "dropped"), list),
}
_ENGINE_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("runtime", "precision", "file", "precision_read", "device"), str),
    **dict.fromkeys(("parity", "details"), dict),
}
# Libraries whose version may change a graph or its results.
LIBRARIES = (
    "cliplet",
    "torch",
    "open_clip_torch",
    "timm",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt_rtx_cu13",
)


@dataclass(frozen=True)
class Engine:
    """One file of a bundle that a runtime runs, and the proof that it may be trusted.

    Attributes:
        runtime: `onnx`, `openvino`, `tensorrt` or `tensorrt_rtx`.
        precision: what was asked for; `precision_read` is what the finished engine was found to compute in.
        file: its main file, relative to the bundle.
        device: `cpu`, or the GPU that it was built for, such as `sm89`.
        parity: how it was compared with the original, the differences, the tolerances, the verdict.
        details: what else is known: images of the calibration, profile, size of a batch.
    """

    runtime: str
    precision: str
    file: str
    precision_read: str
    device: str
    parity: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as `openvino-bf16`; for a GPU also which, as in `tensorrt_rtx-fp16-sm89`."""
        return "-".join([self.runtime, self.precision, *([self.device] if self.device != "cpu" else [])])


@dataclass(frozen=True)
class Manifest:
    """All that is known about a bundle.

    Attributes:
        kind: the graph's name in `cliplet.contract`.
        model: the model it was made from, as a user would name it; `identity` is the hash of its weights.
        thresholds: for each way to look (`1`, `1+3x3`, …) the score from which on a class is a label, and
            how and on what that was found.
        scale, bias: of the logits; see `cliplet.snippets.Snippets`.
        engines: what may run it.
        files: sha256 of every file.
        dropped: engines that were asked for and not kept: name, reason, and what was measured.
        vocabulary: `NO_CLASSES` for a trunk, which gives features.
        trained: how a classifier or a trunk was trained, as its folder says.
    """

    kind: str
    model: str
    identity: str
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    aggregation: Mapping[str, Any]
    scale: float
    bias: float | None
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    engines: tuple[Engine, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[Mapping[str, Any], ...] = ()
    trained: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def contract(self) -> GraphContract:
        return GRAPHS[self.kind]

    def files_of(self, engine: Engine) -> dict[str, str]:
        """The sha256 of each file that an engine is loaded from: its main file, and its weights beside it."""
        weights = {engine.file, f"{engine.file}.data", str(Path(engine.file).with_suffix(".bin"))}
        return {name: sha256 for name, sha256 in self.files.items() if name in weights}

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": MANIFEST_SCHEMA,
            **{k: getattr(self, k) for k in ("kind", "model", "identity", "scale", "bias")},
            "vocabulary": self.vocabulary.to_json(),
            "preprocessing": self.preprocessing.to_json(),
            **{
                k: dict(getattr(self, k))
                for k in ("aggregation", "thresholds", "trained", "files", "versions")
            },
            "engines": [vars(engine) for engine in self.engines],
            "dropped": [dict(row) for row in self.dropped],
        }

    @classmethod
    def from_json(cls, data: object, source: str, fix: str = "export again") -> Manifest:
        """The manifest that `to_json` wrote.

        Args:
            fix: the step that mends one that is no good.

        Raises:
            ArtifactError: another schema, or a field is missing or holds what it cannot hold.
        """
        if not isinstance(data, dict):
            raise ArtifactError(f"{source} holds a {type(data).__name__}", "a manifest: a JSON object", fix)
        if data.get("schema") != MANIFEST_SCHEMA:
            raise ArtifactError(f"{source} has schema {data.get('schema')}", f"schema {MANIFEST_SCHEMA}", fix)
        try:
            _hold_types(data, {**_FIELDS, **_PARTS})
            _hold_types(data["files"], dict.fromkeys(data["files"], str))
            for engine in data["engines"]:
                _hold_types(engine, _ENGINE_FIELDS)
            if data["kind"] not in GRAPHS:
                raise TypeError(f"kind is {data['kind']!r}, which is none of {', '.join(GRAPHS)}")
            Aggregation(**data["aggregation"])
            return cls(
                **{k: data[k] for k in _FIELDS},
                vocabulary=_vocabulary(data, source),
                preprocessing=Preprocessing.from_json(data["preprocessing"]),
                engines=tuple(Engine(**engine) for engine in data["engines"]),
                dropped=tuple(data["dropped"]),
            )
        except KeyError as error:
            raise ArtifactError(
                f"{source} is incomplete: {error}", "all fields of a manifest", fix
            ) from error
        except (TypeError, AttributeError, UsageError, DataError, ArtifactError) as error:
            reason = getattr(error, "happened", error)
            raise ArtifactError(
                f"{source} is damaged: {reason}", "a manifest as it was written", fix
            ) from error


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are all there and unchanged."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """The bundle in `folder`, every file checked against its hash.

        Raises:
            ArtifactError: no manifest, another schema, or a file that is missing or changed.
        """
        mend = _mend(folder, "MODEL")
        file = folder / MANIFEST_NAME
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot read {file}: {error}", "a bundle's manifest", mend) from error
        manifest = Manifest.from_json(data, str(file), mend)
        for name, sha256 in manifest.files.items():
            path = folder / name
            if not path.is_file() or file_sha256(path) != sha256:
                state = "has changed since it was written" if path.is_file() else "is missing"
                raise ArtifactError(f"{path} {state}", f"sha256 {sha256}", _mend(folder, manifest.model))
        for engine in manifest.engines:
            if engine.file not in manifest.files:
                raise ArtifactError(
                    f"{file} lists no sha256 of {engine.file}",
                    f"one, since it is the engine {engine.name}",
                    _mend(folder, manifest.model),
                )
        return cls(folder, manifest)

    @classmethod
    def write(cls, folder: Path, manifest: Manifest, staged: Path) -> Bundle:
        """Move the files staged in a folder into place as a bundle, all at once, with the hash of each.

        A reader finds no bundle or a whole one. If another process was faster, its bundle stays.

        Raises:
            EnvironmentError_: the folder cannot be written, or the disk is full.
        """
        with explained_os_errors(folder, WRITABLE_CACHE if _is_cached(folder) else "choose another --out"):
            found = sorted(path for path in staged.rglob("*") if path.is_file())
            files = {path.relative_to(staged).as_posix(): file_sha256(path) for path in found}
            manifest = replace(manifest, files=files, versions=library_versions())
            (staged / MANIFEST_NAME).write_text(json.dumps(manifest.to_json(), indent=2), encoding="utf-8")
            # Temporary folders are for their maker alone; a bundle is for a server, too.
            staged.chmod(0o755)
            move_whole(staged, folder)
        return cls.load(folder)


@dataclass(frozen=True)
class BundleJob:
    """What a bundle is made of.

    Attributes:
        thresholds: carried into the manifest as they are.
        engines: the (runtime, precision) pairs that it shall hold.
    """

    spec: ModelSpec
    vocabulary: Vocabulary
    aggregation: Aggregation
    thresholds: Mapping[str, Any]
    engines: tuple[tuple[str, str], ...] = (("onnx", "fp32"),)

    @property
    def contract(self) -> GraphContract:
        if self.spec.trunk:
            return TRUNK
        return CLASSIFIER if self.spec.classifier else SNIPPETS

    def graph_key(self) -> str:
        """Name of the traced graph: all that shapes it, but not the vocabulary."""
        return _digest([GRAPH_VERSION, self.spec.identity(), self.aggregation.to_json(), library_versions()])

    def cached_folder(self) -> Path:
        """Where the finished bundle lies in the cache, or will lie."""
        parts = [self.graph_key(), self.vocabulary.to_json(), dict(self.thresholds), self.engines]
        return cache_folder() / "bundles" / _digest(parts)


def cache_folder() -> Path:
    """Where graphs that cliplet builds for itself are kept: $CLIPLET_CACHE, or `cliplet` in the user's cache."""
    chosen = os.environ.get("CLIPLET_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cliplet"


@contextmanager
def staging_folder(target: Path, fix: str = WRITABLE_CACHE) -> Iterator[Path]:
    """Context with an empty folder beside `target`, removed at the end unless it was moved into place.

    Errors of what is done inside pass as they are: they may be of other files.

    Args:
        fix: what to do where it cannot be made.

    Raises:
        EnvironmentError_: it cannot be made.
    """
    with explained_os_errors(target, fix):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
    finally:
        # What cannot be removed must not hide why the work inside failed.
        shutil.rmtree(folder, ignore_errors=True)


def move_whole(staged: Path, target: Path) -> None:
    """Give a finished folder its name; if another process was faster, its folder stays, which is as good.

    Raises:
        OSError: it cannot be moved for another reason.
    """
    try:
        os.replace(staged, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape a graph, of those that are installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _vocabulary(data: Mapping[str, Any], source: str) -> Vocabulary:
    return NO_CLASSES if data["kind"] == TRUNK.name else Vocabulary.from_json(data["vocabulary"], source)


def _hold_types(data: Any, wanted: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise `KeyError` or `TypeError` unless each field is there and is of its type."""
    for name, kind in wanted.items():
        value = data[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is {json.dumps(value)[:80]}")


def _is_cached(folder: Path) -> bool:
    """Whether a folder is one that cliplet made for itself and will make again."""
    return folder.resolve().is_relative_to(cache_folder().resolve())


def _mend(folder: Path, model: str) -> str:
    """What mends the damaged bundle of a model."""
    place = shlex.quote(str(folder))
    if _is_cached(folder):
        return f"rm -r {place}, then the same command again"
    return f"export it again: cliplet export {shlex.quote(model)} --out {place} --overwrite"


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

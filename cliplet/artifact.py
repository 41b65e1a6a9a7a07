"""A bundle on disk: a folder with `cliplet.json`, what it was made of, and the files that it vouches for.

    BUNDLE/cliplet.json     schema, model, vocabulary, preprocessing, aggregation, thresholds, files, versions
    BUNDLE/model.onnx       the `snippets` graph

Every file is listed with its sha256, its precision (asked and read back) and its parity verdict. Loading
checks the hashes. Bundles that cliplet makes for itself live in the cache folder, under a name derived from
all that went into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cliplet.errors import ArtifactError, explained_os_errors
from cliplet.model_spec import MANIFEST_NAME, ModelSpec, file_sha256
from cliplet.views import Aggregation, Preprocessing
from cliplet.vocabulary import Vocabulary

MANIFEST_SCHEMA = 1
MODEL_FILE = "model.onnx"
# Any change to what is traced (`cliplet.snippets`, `cliplet.export.onnx_graph`) must change this: it is part of
# the names in the cache.
GRAPH_VERSION = 2
# Libraries whose version may change a graph or its results.
LIBRARIES = ("cliplet", "torch", "open_clip_torch", "timm", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle, and the proof that it may be trusted.

    Attributes:
        precision: what was asked for; `precision_read` is what the finished file was found to hold.
        parity: how it was compared with the original, the largest difference, the tolerance, the verdict.
    """

    sha256: str
    precision: str
    precision_read: str
    parity: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """All that is known about a bundle.

    Attributes:
        kind: the graph's name in `cliplet.contract`.
        model: the model it was made from, as a user would name it; `identity` is the hash of its weights.
        thresholds: for each way to look (`1`, `1+3x3`, …) the score from which on a class is a label, and
            how and on what that was found.
        scale, bias: of the logits; see `cliplet.snippets.Snippets`.
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
    files: Mapping[str, BundleFile] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": MANIFEST_SCHEMA,
            **{k: getattr(self, k) for k in ("kind", "model", "identity", "scale", "bias")},
            "vocabulary": self.vocabulary.to_json(),
            "preprocessing": self.preprocessing.to_json(),
            "aggregation": dict(self.aggregation),
            "thresholds": dict(self.thresholds),
            "files": {name: vars(file) for name, file in self.files.items()},
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            ArtifactError: another schema, or a field is missing.
        """
        if data.get("schema") != MANIFEST_SCHEMA:
            raise ArtifactError(
                f"{source} has schema {data.get('schema')}", f"schema {MANIFEST_SCHEMA}", "export again"
            )
        try:
            return cls(
                **{
                    k: data[k]
                    for k in ("kind", "model", "identity", "scale", "bias", "aggregation", "thresholds")
                },
                vocabulary=Vocabulary.from_json(data["vocabulary"], source),
                preprocessing=Preprocessing.from_json(data["preprocessing"]),
                files={name: BundleFile(**file) for name, file in data["files"].items()},
                versions=data["versions"],
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{source} is incomplete: {error}", "all fields of a manifest", "export again"
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
        file = folder / MANIFEST_NAME
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"cannot read {file}: {error}",
                "a bundle's manifest",
                f"rm -r {folder}, then the same command again",
            ) from error
        manifest = Manifest.from_json(data, str(file))
        for name, listed in manifest.files.items():
            path = folder / name
            if not path.is_file() or file_sha256(path) != listed.sha256:
                state = "has changed since it was written" if path.is_file() else "is missing"
                raise ArtifactError(
                    f"{path} {state}",
                    f"sha256 {listed.sha256}",
                    f"rm -r {folder}, then the same command again",
                )
        return cls(folder, manifest)

    @classmethod
    def write(cls, folder: Path, manifest: Manifest, staged: Path) -> Bundle:
        """Move the files staged in a folder into place as a bundle, all at once.

        A reader finds no bundle or a whole one. If another process was faster, its bundle stays.
        """
        (staged / MANIFEST_NAME).write_text(json.dumps(manifest.to_json(), indent=2), encoding="utf-8")
        with suppress(OSError):
            os.replace(staged, folder)
        return cls.load(folder)


@dataclass(frozen=True)
class SnippetsJob:
    """What a `snippets` bundle is made of.

    Attributes:
        thresholds: carried into the manifest as they are.
    """

    spec: ModelSpec
    vocabulary: Vocabulary
    aggregation: Aggregation
    thresholds: Mapping[str, Any]

    def graph_key(self) -> str:
        """Name of the traced graph: all that shapes it, but not the vocabulary."""
        return _digest([GRAPH_VERSION, self.spec.identity(), self.aggregation.to_json(), library_versions()])

    def cached_folder(self) -> Path:
        """Where the finished bundle lies in the cache, or will lie."""
        key = _digest([self.graph_key(), self.vocabulary.to_json(), dict(self.thresholds)])
        return cache_folder() / "bundles" / key


def cache_folder() -> Path:
    """Where graphs that cliplet builds for itself are kept: $CLIPLET_CACHE, or `cliplet` in the user's cache."""
    chosen = os.environ.get("CLIPLET_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cliplet"


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Context with an empty folder beside `target`, removed at the end unless it was moved into place.

    Raises:
        EnvironmentError_: it cannot be made, or the disk is full.
    """
    with explained_os_errors(target, "set CLIPLET_CACHE to a folder that can be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape a graph, of those that are installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

"""What a `--model` may be, read without loading anything.

tiny                            the embedded CLIP
open_clip:ARCH/PRETRAINED       an open_clip architecture and a pretrained tag (downloaded when needed)
open_clip:ARCH/PATH             the same with a checkpoint on this machine
open_clip:local-dir:FOLDER      a folder in open_clip's hub layout
open_clip:hf-hub:OWNER/NAME     a model on the hub
mlcd:FOLDER                     a vision tower that transformers saved, or a trunk that cliplet trained: features alone
FOLDER                          a bundle that cliplet wrote, or a classifier or a trunk that it trained
triton://HOST:PORT/NAME         a bundle that a server serves; see `cliplet.server_address`
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliplet.errors import DataError, UsageError
from cliplet.server_address import ServerAddress

TINY_FOLDER = Path(__file__).parent / "assets" / "tiny"
MANIFEST_NAME = "cliplet.json"
# A classifier's folder holds `classifier.json` and its weights; `cliplet.classifier` reads them.
CLASSIFIER_STEM = "classifier"
# A trunk's likewise; `cliplet.trunk_files` reads them.
TRUNK_STEM = "trunk"
TRUNK_PREFIX = "mlcd:"
_PREFIX = "open_clip:"
_LOCAL_FOLDER = "local-dir:"
# What a folder of transformers' holds beside its weights.
_TOWER_FILES = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class ModelSpec:
    """A model by name.

    Attributes:
        text: as the user wrote it.
        bundle, classifier, trunk: its folder, if it is one of these; the other fields are then empty.
        server: where it is served, if it is; likewise.
        open_clip_name: first argument of `open_clip.create_model`.
        pretrained: second argument: a tag or the path of a file.
        weights_file: the weights, if they lie on this machine.
    """

    text: str
    bundle: Path | None = None
    classifier: Path | None = None
    trunk: Path | None = None
    open_clip_name: str = ""
    pretrained: str | None = None
    weights_file: Path | None = None
    server: ServerAddress | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def is_folder(self) -> bool:
        """Whether architecture and weights come together, from a folder or from the hub."""
        return ":" in self.open_clip_name

    @property
    def folder(self) -> Path | None:
        """The folder on this machine that holds the model, with what else may lie beside its weights."""
        return self.weights_file.parent if self.is_folder and self.weights_file else None

    def absolute(self) -> str:
        """`text`, with the path in it, if there is one, from the root on: it names the model from any folder."""
        if self.bundle or self.classifier:
            return os.path.abspath(self.text)
        if self.trunk:
            prefix = TRUNK_PREFIX if self.text.startswith(TRUNK_PREFIX) else ""
            return prefix + os.path.abspath(self.trunk)
        if self.text.startswith(_PREFIX + _LOCAL_FOLDER):
            return _PREFIX + _LOCAL_FOLDER + os.path.abspath(self.open_clip_name.removeprefix(_LOCAL_FOLDER))
        if self.weights_file and not self.is_folder:
            return f"{_PREFIX}{self.open_clip_name}/{os.path.abspath(self.weights_file)}"
        return self.text

    def identity(self) -> str:
        """What tells these weights from all others: a hash where they lie here, their public name otherwise.

        Raises:
            UsageError: they lie on a server, which does not give them away.
        """
        if self.server is not None:
            raise UsageError(
                f"{self} is a server: its model can be asked, but not taken",
                "a model on this machine",
                "name the bundle that it serves, or the original of that",
            )
        if self.classifier is not None:
            details = self.classifier_details()
            own = [details[part] for part in ("sha256", "config", "vocabulary")]
            return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        if self.trunk is not None:
            return self._trunk_identity(self.trunk)
        if self.weights_file is None:
            return self.text
        config = self.weights_file.with_name("open_clip_config.json")
        parts = [self.open_clip_name if not self.is_folder else "", file_sha256(self.weights_file)]
        if self.is_folder and config.exists():
            parts.append(file_sha256(config))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def classifier_details(self) -> dict[str, Any]:
        """What a classifier's folder says about it: `vocabulary`, `config`, `sha256` of its weights, and more.

        Raises:
            ArtifactError: it cannot be read.
        """
        from cliplet.checkpoint import load_details

        assert self.classifier is not None
        return load_details(self.classifier, CLASSIFIER_STEM)

    def trunk_details(self) -> dict[str, Any]:
        """What the folder of a trunk that cliplet trained says about it; empty for a tower of transformers'.

        Raises:
            ArtifactError: it cannot be read.
        """
        from cliplet.checkpoint import load_details

        assert self.trunk is not None
        return load_details(self.trunk, TRUNK_STEM) if _is_own_trunk(self.trunk) else {}

    def _trunk_identity(self, folder: Path) -> str:
        if _is_own_trunk(folder):
            details = self.trunk_details()
            own = [details["sha256"], details["config"]]
        else:
            files = [folder / name for name in _TOWER_FILES]
            files += sorted(folder.glob("*.safetensors"))
            own = [[file.name, file_sha256(file)] for file in files if file.is_file()]
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def closest(word: str, known: Sequence[str]) -> str | None:
        """The known word that looks most like `word`."""
        close = difflib.get_close_matches(word, known, 1, cutoff=0.4)
        return close[0] if close else None


def parse_model_spec(text: str) -> ModelSpec:
    """The model that `text` names.

    Raises:
        UsageError: it is none of the forms above.
        DataError: a folder or file that it names does not hold a model.
    """
    if text == "tiny":
        return _open_clip(text, f"local-dir:{TINY_FOLDER}", None, _weights_in(TINY_FOLDER))
    if text.startswith(_PREFIX):
        return _parse_open_clip(text, text.removeprefix(_PREFIX))
    if ServerAddress.is_meant(text):
        return ModelSpec(text, server=ServerAddress.parse(text))
    if text.startswith(TRUNK_PREFIX):
        return _parse_trunk(text, Path(text.removeprefix(TRUNK_PREFIX)))
    if Path(text).is_dir():
        folder = Path(text)
        if (folder / MANIFEST_NAME).is_file():
            return ModelSpec(text, bundle=folder)
        if (folder / f"{CLASSIFIER_STEM}.json").is_file():
            return ModelSpec(text, classifier=folder)
        if _is_own_trunk(folder):
            return ModelSpec(text, trunk=folder)
        raise DataError(
            f"{text} is neither a bundle nor a classifier nor a trunk: it has no {MANIFEST_NAME}, no "
            f"{CLASSIFIER_STEM}.json and no {TRUNK_STEM}.json",
            f"a folder that `cliplet export` or `cliplet train` wrote, or {TRUNK_PREFIX}FOLDER for a vision tower",
            "check the path",
        )
    raise UsageError(
        f"unknown model {text!r}",
        "tiny, open_clip:ARCH/PRETRAINED, open_clip:ARCH/PATH, the folder of a bundle, a classifier or a trunk, "
        f"{TRUNK_PREFIX}FOLDER, or triton://HOST:PORT/NAME",
        "--model tiny",
    )


def _is_own_trunk(folder: Path) -> bool:
    return (folder / f"{TRUNK_STEM}.json").is_file()


def _parse_trunk(text: str, folder: Path) -> ModelSpec:
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}",
            f"{TRUNK_PREFIX}FOLDER, where FOLDER holds a vision tower of transformers' or a trunk that cliplet "
            "trained; nothing is downloaded",
            f"hf download DeepGlint-AI/mlcd-vit-base-patch32-224 --local-dir {folder}",
        )
    return ModelSpec(text, trunk=folder)


def _parse_open_clip(text: str, rest: str) -> ModelSpec:
    if rest.startswith(_LOCAL_FOLDER):
        folder = Path(rest.removeprefix(_LOCAL_FOLDER))
        if not (folder / "open_clip_config.json").is_file():
            raise DataError(
                f"{folder} holds no open_clip_config.json",
                "a folder in open_clip's hub layout: open_clip_config.json and open_clip_model.safetensors",
                "name the architecture and the file: --model open_clip:ARCH/PATH",
            )
        return _open_clip(text, rest, None, _weights_in(folder))
    if rest.startswith("hf-hub:"):
        return _open_clip(text, rest, None, None)
    name, _, pretrained = rest.partition("/")
    if not pretrained:
        raise UsageError(
            f"model {text!r} names no weights",
            "open_clip:ARCH/PRETRAINED or open_clip:ARCH/PATH/TO/WEIGHTS",
            f"--model open_clip:{name or 'ViT-B-32'}/laion2b_s34b_b79k",
        )
    file = Path(pretrained)
    return _open_clip(text, name, pretrained, file if file.is_file() else None)


def _open_clip(text: str, name: str, pretrained: str | None, weights: Path | None) -> ModelSpec:
    return ModelSpec(text, open_clip_name=name, pretrained=pretrained, weights_file=weights)


def _weights_in(folder: Path) -> Path | None:
    for pattern in ("open_clip_model.safetensors", "open_clip_pytorch_model.*", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise DataError(f"{folder} holds no weights", "open_clip_model.safetensors beside open_clip_config.json")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; read once for as long as its size and time of change stay."""
    state = path.stat()
    return _file_sha256(str(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _file_sha256(path: str, _size: int, _changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

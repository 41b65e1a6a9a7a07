"""What a `--model` may be, read without loading anything.

tiny                            the embedded CLIP
open_clip:ARCH/PRETRAINED       an open_clip architecture and a pretrained tag (downloaded when needed)
open_clip:ARCH/PATH             the same with a checkpoint on this machine
open_clip:local-dir:FOLDER      a folder in open_clip's hub layout
open_clip:hf-hub:OWNER/NAME     a model on the hub
FOLDER                          a bundle that cliplet wrote
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cliplet.errors import DataError, UsageError

TINY_FOLDER = Path(__file__).parent / "assets" / "tiny"
MANIFEST_NAME = "cliplet.json"
_PREFIX = "open_clip:"


@dataclass(frozen=True)
class ModelSpec:
    """A model by name.

    Attributes:
        text: as the user wrote it.
        bundle: the bundle's folder, if it is one; the other fields are then empty.
        open_clip_name: first argument of `open_clip.create_model`.
        pretrained: second argument: a tag or the path of a file.
        weights_file: the weights, if they lie on this machine.
    """

    text: str
    bundle: Path | None = None
    open_clip_name: str = ""
    pretrained: str | None = None
    weights_file: Path | None = None

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

    def identity(self) -> str:
        """What tells these weights from all others: a hash where they lie here, their public name otherwise."""
        if self.weights_file is None:
            return self.text
        config = self.weights_file.with_name("open_clip_config.json")
        parts = [self.open_clip_name if not self.is_folder else "", file_sha256(self.weights_file)]
        if self.is_folder and config.exists():
            parts.append(file_sha256(config))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

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
        return ModelSpec(text, None, f"local-dir:{TINY_FOLDER}", None, _weights_in(TINY_FOLDER))
    if text.startswith(_PREFIX):
        return _parse_open_clip(text, text.removeprefix(_PREFIX))
    if Path(text).is_dir():
        if not (Path(text) / MANIFEST_NAME).is_file():
            raise DataError(f"{text} is no bundle: it has no {MANIFEST_NAME}", "a folder that cliplet wrote")
        return ModelSpec(text, bundle=Path(text))
    raise UsageError(
        f"unknown model {text!r}",
        "tiny, open_clip:ARCH/PRETRAINED, open_clip:ARCH/PATH or a bundle's folder",
        "--model tiny",
    )


def _parse_open_clip(text: str, rest: str) -> ModelSpec:
    if rest.startswith("local-dir:"):
        folder = Path(rest.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise DataError(
                f"{folder} holds no open_clip_config.json",
                "a folder in open_clip's hub layout: open_clip_config.json and open_clip_model.safetensors",
                "name the architecture and the file: --model open_clip:ARCH/PATH",
            )
        return ModelSpec(text, None, rest, None, _weights_in(folder))
    if rest.startswith("hf-hub:"):
        return ModelSpec(text, None, rest)
    name, _, pretrained = rest.partition("/")
    if not pretrained:
        raise UsageError(
            f"model {text!r} names no weights",
            "open_clip:ARCH/PRETRAINED or open_clip:ARCH/PATH/TO/WEIGHTS",
            f"--model open_clip:{name or 'ViT-B-32'}/laion2b_s34b_b79k",
        )
    file = Path(pretrained)
    return ModelSpec(text, None, name, pretrained, file if file.is_file() else None)


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

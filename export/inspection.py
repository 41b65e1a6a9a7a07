"""What lies at a path: a bundle, a graph, an engine, a classifier, a trunk or labels, in facts for people and for scripts.

facts = inspect(Path("bundle"))
facts["intact"], facts["engines"]["onnx-fp32"]["parity"]["passed"]
print(*lines(facts), sep="\\n")
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cliplet.errors import DataError, UsageError
from cliplet.model_spec import CLASSIFIER_STEM, MANIFEST_NAME, TRUNK_STEM

from .facts import Facts, understood

CLASSIFIER_FILE = f"{CLASSIFIER_STEM}.json"
TRUNK_FILE = f"{TRUNK_STEM}.json"
RUN_FILE = "run.json"
# What a folder is known by, in the order of search.
MARKS = (MANIFEST_NAME, CLASSIFIER_FILE, TRUNK_FILE, RUN_FILE)
LOOKED_FOR = (
    f"a folder with {MANIFEST_NAME} (a bundle), {CLASSIFIER_FILE} (a classifier), {TRUNK_FILE} (a trunk) or {RUN_FILE} "
    "(labels), "
    "or a file .onnx, .xml (OpenVINO) or .plan (TensorRT)"
)
# Parts of keys that stand as they are in a line; others are quoted, as in TOML.
_BARE = re.compile(r"[\w+/@-]+")


def inspect(path: Path) -> dict[str, Any]:
    """All that is known about what lies at `path`, ready for JSON.

    Always there: `kind` (`bundle`, `onnx`, `openvino`, `tensorrt`, `classifier`, `trunk`, `labels`), `path`, and `intact`:
    whether all that belongs to it is there and, where a hash is known, unchanged; `damage` says what is not. The
    rest depends on the kind.

    Raises:
        UsageError: nothing is there.
        DataError: something else is there, such as a label bank.
        ArtifactError: it cannot be read: cut short, not what its name says, or of another version.
    """
    with understood(path, LOOKED_FOR, "check the path"):
        is_there = path.exists()
    if not is_there:
        raise UsageError(f"there is nothing at {path}", LOOKED_FOR, "check the path")
    with understood(path, LOOKED_FOR, "check the path"):
        if path.is_file() and path.name in MARKS:
            path = path.parent
        kind, read = _kind(path)
        facts = {"kind": kind, "path": str(path), **read(path)}
        plain: dict[str, Any] = _plain(facts)
        return plain


def lines(facts: Mapping[str, Any]) -> list[str]:
    """One line a fact: its key, parts joined by dots, a space, its value. The same facts give the same lines.

    Items of a list are numbered, lists of numbers stand in one line. Parts of keys with other signs than letters,
    digits and `_+-/@` are in quotes; so are values that could not stand in a line as they are. Of what is empty
    there is no line.
    """
    return [f"{key} {value}" for key, value in _flat(facts, ())]


def _kind(path: Path) -> tuple[str, Callable[[Path], Facts]]:
    """What lies there, and what reads it. Imported when used: labels need no onnx, and graphs no pyarrow."""
    if path.is_dir():
        return _folder_kind(path)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        from .onnx_facts import onnx_facts

        return "onnx", onnx_facts
    if suffix == ".xml":
        from .ir_facts import ir_facts

        return "openvino", ir_facts
    if suffix == ".plan":
        from .bundle_facts import plan_facts

        return "tensorrt", plan_facts
    beside = [file for file in (path.with_suffix(".xml"), path.with_suffix(".plan")) if file.is_file()]
    fix = f"cliplet inspect {beside[0]}" if beside else "check the path"
    raise DataError(f"{path} is nothing that cliplet knows by its name", LOOKED_FOR, fix)


def _folder_kind(folder: Path) -> tuple[str, Callable[[Path], Facts]]:
    found = next((name for name in MARKS if (folder / name).is_file()), None)
    if found == MANIFEST_NAME:
        from .bundle_facts import bundle_facts

        return "bundle", bundle_facts
    if found == CLASSIFIER_FILE:
        from .classifier_facts import classifier_facts

        return "classifier", classifier_facts
    if found == TRUNK_FILE:
        from .classifier_facts import trunk_facts

        return "trunk", trunk_facts
    if found == RUN_FILE:
        from .label_facts import label_facts

        return "labels", label_facts
    if (folder / "bank.json").is_file():
        raise DataError(
            f"{folder} is a label bank: what a teacher said while a classifier was trained",
            LOOKED_FOR,
            "inspect the classifier that was trained from it",
        )
    raise DataError(f"{folder} holds no {', '.join(MARKS)}", LOOKED_FOR, "check the path")


def _plain(value: Any) -> Any:
    """The same for JSON, which has neither tuples nor numbers that are not finite."""
    if isinstance(value, bytes):
        # What protocol buffers give for text that is no UTF-8.
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _flat(value: Any, parts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, (*parts, _key_part(key)))
    elif isinstance(value, list) and value and all(_is_number(item) for item in value):
        yield ".".join(parts), ", ".join(map(_shown, value))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _flat(item, (*parts, str(number)))
    else:
        yield ".".join(parts), _shown(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key_part(key: str) -> str:
    return key if _BARE.fullmatch(key) else _quoted(key)


def _shown(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    stands = value.isprintable() and value == value.strip() and value and not value.startswith('"')
    return value if stands else _quoted(value)


def _quoted(text: str) -> str:
    """In quotes; all that could end a line is escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())

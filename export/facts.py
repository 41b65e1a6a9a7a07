"""What the facts about files of several kinds have in common.

Facts are nested dictionaries, lists and plain values, ready for JSON. Units are in their names (`bytes`, `_bytes`,
`_s`). Shapes are text such as `[B, V, 4]`.

Legend: C classes.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cliplet.errors import ArtifactError, ClipletError, UsageError
from cliplet.thresholds import thresholds_from_json
from cliplet.vocabulary import Vocabulary

Facts = dict[str, Any]
LARGEST_CONSTANTS = 8
# What parsers and what reads their results raise of files that hold something else than they should.
_OF_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@contextmanager
def understood(path: Path, expected: str, fix: str) -> Iterator[None]:
    """Context in which whatever goes wrong over the contents of `path` is an `ArtifactError` about it."""
    try:
        yield
    except UsageError as error:
        # Words of the file, not of the user.
        raise ArtifactError(
            f"cannot read {path}: {error.happened}", error.expected or expected, fix
        ) from error
    except ClipletError:
        raise
    except _OF_DAMAGE as error:
        reason = " ".join(str(error).split()) or "nothing more is known"
        raise ArtifactError(
            f"cannot read {path}: {reason} ({type(error).__name__})", expected, fix
        ) from error


def read_json(file: Path, expected: str, fix: str) -> Facts:
    """The object in a JSON file. `ArtifactError` if it holds none."""
    with understood(file, expected, fix):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} holds a JSON {type(found).__name__}", expected, fix)
    return found


def class_facts(vocabulary: Vocabulary) -> Facts:
    """Classes, with those that have synonyms, and prompts."""
    prompts = vocabulary.prompts
    return {
        "classes": {
            "count": len(vocabulary.names),
            "names": list(vocabulary.names),
            "synonyms": {c.name: list(c.synonyms) for c in vocabulary.classes if c.synonyms},
        },
        "prompts": {"set": prompts.name, "version": prompts.version, "templates": list(prompts.templates)},
    }


def threshold_facts(entry: Mapping[str, Any], names: Sequence[str], where: str) -> Facts:
    """Range of the classes' thresholds, and what else their entry says, such as how they were found.

    Raises:
        ArtifactError: it is no entry for these classes.
    """
    values = thresholds_from_json(entry, names, where).values
    said = {key: value for key, value in entry.items() if key not in ("value", "values")}
    return {"least": min(values), "most": max(values), "by_class": "values" in entry, **said}


def constant_facts(constants: Iterable[tuple[str, str, Sequence[int], int]]) -> Facts:
    """Numbers and bytes by type, and the largest, of constants given as name, type, shape and bytes."""
    types: dict[str, Facts] = defaultdict(lambda: {"tensors": 0, "count": 0, "bytes": 0})
    found = list(constants)
    for _, kind, shape, size in found:
        total = types[kind]
        total["tensors"] += 1
        total["count"] += math.prod(shape)
        total["bytes"] += size
    largest = sorted(found, key=lambda row: (-row[3], row[0]))[:LARGEST_CONSTANTS]
    return {
        "parameters": {
            "count": sum(total["count"] for total in types.values()),
            "bytes": sum(total["bytes"] for total in types.values()),
            "by_type": {kind: types[kind] for kind in sorted(types)},
        },
        "largest_constants": [
            {"name": name, "type": kind, "shape": shown_shape(shape), "bytes": size}
            for name, kind, shape, size in largest
        ],
    }


def shown_shape(axes: Iterable[object]) -> str:
    """A shape as text."""
    return f"[{', '.join(map(str, axes))}]"


def by_count(counts: Counter[str]) -> dict[str, int]:
    """Counts in a stable order, most first."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def weights_file_facts(file: Path, needed: int) -> Facts:
    """A file of weights that another names: how many bytes it has and has to have; `present` says if it is there.

    Raises:
        ArtifactError: it is cut short.
    """
    if not file.is_file():
        return {"present": False, "needed_bytes": needed}
    size = file.stat().st_size
    if size < needed:
        raise ArtifactError(
            f"{file} is cut short: {size:,} bytes", f"at least {needed:,} bytes of weights", "export again"
        )
    return {"present": True, "bytes": size, "needed_bytes": needed}

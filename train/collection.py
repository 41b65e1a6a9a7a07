"""Whether a collection of images is still the one that was looked at: names, sizes and times of change.

Contents are not read. An archive's members have the archive's time of change; of what lies on another machine only
the name is known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cliplet.listing import ImageRef
from cliplet.remote_files import is_remote, local_path

NAMED = 3  # files of each kind of change


def collection_table(images: Sequence[ImageRef]) -> pa.Table:
    """The columns `path`, `size` in bytes and `changed` in ns since 1970; -1 where that is not known."""
    archives: dict[str, tuple[int, int]] = {}
    states = []
    for ref in images:
        if ref.member is None:
            states.append(_state(ref.file))
        else:
            if ref.file not in archives:
                archives[ref.file] = _state(ref.file)
            states.append((ref.size, archives[ref.file][1]))
    columns = {
        "path": pa.array([ref.path for ref in images], pa.string()),
        "size": pa.array([size for size, _ in states], pa.int64()),
        "changed": pa.array([changed for _, changed in states], pa.int64()),
    }
    return pa.table(columns)


def facts_of(table: pa.Table) -> dict[str, Any]:
    """What tells a collection from others, ready for JSON: `count` of images, and `sha256` of its table."""
    return {"count": len(table), "sha256": digest_of(table)}


def digest_of(table: pa.Table) -> str:
    """Hex SHA-256 of a collection's table."""
    digest = hashlib.sha256()
    for path, *state in zip(*table.to_pydict().values(), strict=True):
        digest.update(f"{path}\0{state}\n".encode())
    return digest.hexdigest()


def differences(before: pa.Table, now: pa.Table) -> list[str]:
    """How a collection has changed, in words: what has changed, is gone, is new; none if it has not."""
    then, today = _by_path(before), _by_path(now)
    kinds = {
        "changed in size or time": [p for p in today if p in then and today[p] != then[p]],
        "gone": [p for p in then if p not in today],
        "new": [p for p in today if p not in then],
    }
    told = [
        f"{len(paths)} file{'s' if len(paths) != 1 else ''} {kind} ({', '.join(paths[:NAMED])}"
        f"{', …' if len(paths) > NAMED else ''})"
        for kind, paths in kinds.items()
        if paths
    ]
    if not told and before.column("path").to_pylist() != now.column("path").to_pylist():
        told = ["the same files in another order"]
    return told


def _by_path(table: pa.Table) -> dict[str, tuple[int, int]]:
    columns = [table.column(name).to_pylist() for name in ("path", "size", "changed")]
    return {path: (size, changed) for path, size, changed in zip(*columns, strict=True)}


def _state(file: str) -> tuple[int, int]:
    place = (local_path(file) if is_remote(file) else file) or file
    try:
        found = os.stat(place)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns

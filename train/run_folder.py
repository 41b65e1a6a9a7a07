"""What a run's folder says of it: which run it is, so that another is refused, and whether it has ended."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cliplet.datasets import Dataset
from cliplet.errors import UsageError
from cliplet.labels import write_atomically

RUN_SCHEMA = 1


class Recipe(Protocol):
    """All settings of a run."""

    def to_json(self) -> dict[str, Any]: ...


def clear_run(out: Path, folders: Sequence[str] = ("checkpoint", "classifier", "tensorboard")) -> None:
    """Remove what earlier runs left in `out`; what else is there stays: scenes and label banks fit any recipe."""
    for name in folders:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("run.json", "report.json"):
        (out / name).unlink(missing_ok=True)


def begin_run(
    recipe: Recipe, data: Sequence[Mapping[str, Any]], out: Path, writes: bool, trunk: str | None = None
) -> dict[str, Any] | None:
    """The report of this very run if it has ended; else None, its settings being kept in run.json.

    Args:
        data: what tells the images from others, ready for JSON: that of each data set.
        writes: whether this process is the one that writes.
        trunk: sha256 of the weights it starts from, where they lie in a folder of the user's.

    Raises:
        UsageError: the folder holds another run.
    """
    run = {"schema": RUN_SCHEMA, "recipe": recipe.to_json(), "data": list(data)}
    run = json.loads(json.dumps(run if trunk is None else {**run, "trunk": trunk}))
    file = out / "run.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = _differences(before, run)
        if changed:
            raise UsageError(
                f"{out} holds another run, which differs in {', '.join(changed[:6])}",
                "the same recipe and data, which would continue it",
                "choose another --out, or start anew with --overwrite",
            )
    elif writes:
        write_atomically(file, json.dumps(run, indent=2).encode())
    report = out / "report.json"
    if not report.exists():
        return None
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    then, recipe = before.get("recipe", {}), now["recipe"]
    changed = [
        f"{name} ({then.get(name)} then, {recipe.get(name)} now)"
        for name in sorted(then.keys() | recipe.keys())
        if then.get(name) != recipe.get(name)
    ]
    told = {"data": "the images", "trunk": "the weights of the trunk's folder"}
    return changed + [what for key, what in told.items() if before.get(key) != now.get(key)]


def described(data: Dataset) -> dict[str, Any]:
    """What tells one data set from another."""
    paths = hashlib.sha256("\n".join(data.paths).encode()).hexdigest()
    truth = None if data.truth_NC is None else hashlib.sha256(data.truth_NC.tobytes()).hexdigest()
    return {
        "name": data.name,
        "split": data.split,
        "images": len(data.images),
        "classes": list(data.vocabulary.names),
        "paths_sha256": paths,
        "truth_sha256": truth,
        "notes": list(data.notes),
    }

"""Where the parts of a divided labelling job lie until all are done and joined.

    OUT/partitions/job.json                   what all of them share
    OUT/partitions/00003-of-00016/            a folder of labels of its own: run.json, labels/, errors.parquet
    OUT/partitions/00003-of-00016/done.json   there once each of its inputs has a row or an error

The folder `partitions` is there until the parts are joined; then OUT is like that of an undivided job.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from cliplet.errors import ArtifactError, DataError, UsageError

DIVISION_SCHEMA = 1
# Partitions that a message names.
_MOST_NAMED = 20


def partitions_folder(out: Path) -> Path:
    return out / "partitions"


def partition_folder(out: Path, index: int, of: int) -> Path:
    """The folder of one partition, counted from 0."""
    return partitions_folder(out) / f"{index:05d}-of-{of:05d}"


def job_file(out: Path) -> Path:
    return partitions_folder(out) / "job.json"


def done_file(partition: Path) -> Path:
    return partition / "done.json"


def is_divided(out: Path) -> bool:
    """Whether a folder holds parts that wait to be joined."""
    # run.json comes last, so what lies beside it is a rest that a killed join left.
    return job_file(out).exists() and not (out / "run.json").exists()


def read_division(out: Path) -> dict[str, Any]:
    """What the partitions of a divided folder share.

    Raises:
        ArtifactError: it was written by a version with another layout.
    """
    division: dict[str, Any] = json.loads(job_file(out).read_text(encoding="utf-8"))
    if division.get("schema") != DIVISION_SCHEMA:
        raise ArtifactError(
            f"{job_file(out)} has schema {division.get('schema')}",
            f"schema {DIVISION_SCHEMA}",
            f"label again: rm -r {shlex.quote(str(out))}, then the same commands",
        )
    return division


def unfinished(out: Path) -> list[int]:
    """The partitions of a divided folder that are not done, counted from 0."""
    of = read_division(out)["partitions"]
    return [i for i in range(of) if not done_file(partition_folder(out, i, of)).exists()]


def named(indices: list[int]) -> str:
    """Numbers of partitions for a message."""
    more = f" and {len(indices) - _MOST_NAMED:,} more" if len(indices) > _MOST_NAMED else ""
    return ", ".join(map(str, indices[:_MOST_NAMED])) + more


def not_joined(out: Path) -> DataError:
    """Why a divided folder cannot be read yet."""
    of = read_division(out)["partitions"]
    missing = unfinished(out)
    again = f"cliplet label … --out {shlex.quote(str(out))} --partitions {of}"
    if missing:
        return DataError(
            f"{out} is divided: {len(missing):,} of {of:,} partitions are not finished: {named(missing)}",
            "all of them",
            f"run the missing ones: {again} --partition I; the last one joins them",
        )
    return DataError(
        f"{out} is divided into {of:,} partitions that are not joined", "one table", f"{again} joins them"
    )


def refuse_divided(out: Path) -> None:
    """Raise `UsageError` if a folder holds parts that wait to be joined."""
    if is_divided(out):
        of = read_division(out)["partitions"]
        raise UsageError(
            f"{out} holds a job that is divided into {of:,} partitions",
            f"--partitions {of} --partition I, which continues one of them, or --partitions {of} alone, which joins them",
            "choose another --out, or remove that folder",
        )

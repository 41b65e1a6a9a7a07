"""The files of a label bank: one writer at a time, arrays that grow in place, nothing half written that counts.

Who writes follows one order, so that a kill at any moment leaves a bank that can be read and continued: arrays
are made long enough first, then paths.parquet says how many images there are, and bank.json comes last.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliplet.artifact import library_versions
from cliplet.errors import ArtifactError, DataError, UsageError, explained_os_errors
from cliplet.labels import write_atomically

BANK_SCHEMA_VERSION = 1
DESCRIPTION, PATHS, PROBS, STATE, FAILURES = (
    "bank.json",
    "paths.parquet",
    "probs.npy",
    "state.npy",
    "errors.jsonl",
)


def clear(folder: Path) -> None:
    """Forget a bank, or what a kill left of one that was being begun; others' files stay."""
    with explained_os_errors(folder):
        for name in (DESCRIPTION, PATHS, PROBS, STATE, FAILURES):
            (folder / name).unlink(missing_ok=True)


def lay_out(folder: Path, paths: Sequence[str], description: Mapping[str, Any]) -> None:
    """Make a bank's files, or make those of a bank that is continued long enough."""
    shape = (len(paths), description["views"], len(description["classes"]))
    begun = (folder / DESCRIPTION).exists()
    with explained_os_errors(folder):
        _set_length(folder / PROBS, shape, np.dtype("<f4"))
        _set_length(folder / STATE, shape[:1], np.dtype("|u1"))
        _end_last_line(folder / FAILURES)
    if not begun or len(read_paths(folder)) != len(paths):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"path": pa.array(paths, pa.string())}), sink, compression="zstd")
        write_atomically(folder / PATHS, sink.getvalue())
    if not begun:
        whole = {
            "schema": BANK_SCHEMA_VERSION,
            **description,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
        }
        write_atomically(folder / DESCRIPTION, json.dumps(whole, indent=2).encode())


def refuse_other_bank(folder: Path, paths: Sequence[str], wanted: Mapping[str, Any]) -> None:
    """Raise `UsageError` unless the bank in `folder` can be continued with these paths and description."""
    old = read_description(folder)
    changed = [key for key in ("classes", "views") if old[key] != wanted[key]]
    then, now = old["provenance"], wanted["provenance"]
    changed += [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    old_paths = read_paths(folder)
    if list(paths[: len(old_paths)]) != old_paths:
        changed.append("images")
    if changed:
        raise UsageError(
            f"{folder} holds a label bank that differs in {', '.join(changed)}",
            "the same images (more may follow them), classes, views and provenance, which would continue it",
            "choose another folder, or replace what is there with overwrite",
        )


def read_description(folder: Path) -> dict[str, Any]:
    """The bank.json of a folder.

    Raises:
        DataError: there is none, or it cannot be read.
        ArtifactError: a version with another layout wrote it.
    """
    file = folder / DESCRIPTION
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"no label bank in {folder}: {error}",
            "a folder that a label pass wrote",
            "run the label pass again",
        ) from error
    if description.get("schema") != BANK_SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} has schema {description.get('schema')}",
            f"schema {BANK_SCHEMA_VERSION}",
            "run the label pass again with overwrite",
        )
    return description


def read_paths(folder: Path) -> list[str]:
    """The images of a bank, in order. `DataError` if they cannot be read."""
    file = folder / PATHS
    try:
        paths: list[str] = pq.read_table(file, partitioning=None).column("path").to_pylist()
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise _broken(file, str(error)) from error
    return paths


def read_failures(folder: Path) -> Iterator[dict[str, Any]]:
    """The failures that were recorded; what a kill left half written was never vouched for and is passed over."""
    file = folder / FAILURES
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def append_failures(folder: Path, failures: Sequence[Mapping[str, Any]]) -> None:
    """Add failures to those that were recorded."""
    with explained_os_errors(folder), open(folder / FAILURES, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(failure) + "\n" for failure in failures)


def mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The first rows of a .npy file, read-only; it may have more while another process makes it grow.

    Raises:
        DataError: it is missing, cut off, or of another shape.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise _broken(path, str(error)) from error
    if len(array) < shape[0] or array.shape[1:] != shape[1:]:
        raise _broken(path, f"it is {list(array.shape)}, not {list(shape)}")
    return array[: shape[0]]


def write_rows(path: Path, indices: np.ndarray, rows: np.ndarray) -> None:
    """Write rows [n, ...] of a .npy file at their places.

    Not through a mapping: on a full disk that ends the process with a signal, and this with an error.
    """
    if not len(indices):
        return
    order = np.argsort(indices, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(indices[order]) != 1) + 1)
    begin = len(_header((1, *rows.shape[1:]), rows.dtype))
    with explained_os_errors(path), open(path, "r+b", buffering=0) as file:
        for run in runs:
            file.seek(begin + int(indices[run[0]]) * rows[:1].nbytes)
            rest = memoryview(rows[run].tobytes())
            # A write may stop short, where the disk ends or after 2 GiB.
            while rest:
                rest = rest[file.write(rest) or 0 :]


def sync(path: Path) -> None:
    """Bring a file's data to the disk, whoever wrote it."""
    with explained_os_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _set_length(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Make a .npy file as long as its first axis wants; what is new is 0 and takes no space until written."""
    header = _header(shape, dtype)
    size = len(header) + int(np.prod(shape)) * dtype.itemsize
    with open(path, "r+b" if path.exists() else "w+b") as file:
        # At no moment does the header promise more than there is.
        file.truncate(max(size, os.fstat(file.fileno()).st_size))
        file.write(header)
        file.flush()
        file.truncate(size)
        os.fsync(file.fileno())


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The first bytes of a .npy file, equally many for any first axis: numpy leaves room for it to grow."""
    file = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def _end_last_line(path: Path) -> None:
    """Begin a new line after what a kill left half written."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _broken(path: Path, why: str) -> DataError:
    return DataError(f"cannot read {path}: {why}", "a whole label bank", "run the label pass with overwrite")

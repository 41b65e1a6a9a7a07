"""The files of a bank: one writer at a time, arrays that grow in place, nothing half written that counts.

A bank holds one row of numbers for each image of a list: a label bank what a teacher says of it, an embedding file
where it lies.

Who writes follows one order, so that a kill at any moment leaves a bank that can be read and continued: arrays
are made long enough first, then paths.parquet says how many images there are, and the description comes last.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliplet.artifact import library_versions
from cliplet.errors import ArtifactError, DataError, explained_os_errors
from cliplet.labels import write_atomically

BANK_SCHEMA_VERSION = 1
PATHS, STATE, FAILURES = ("paths.parquet", "state.npy", "errors.jsonl")


@dataclass(frozen=True)
class BankKind:
    """Which kind of bank: how it and its maker are called, and how two of its files are.

    Attributes:
        noun, maker: as in "no label bank in DIR" and "run the label pass again".
        description, rows: file names.
    """

    noun: str
    maker: str
    description: str
    rows: str


LABELS = BankKind("label bank", "label pass", "bank.json", "probs.npy")


def clear(folder: Path, kind: BankKind) -> None:
    """Forget a bank, or what a kill left of one that was being begun; others' files stay."""
    with explained_os_errors(folder):
        for name in (kind.description, PATHS, kind.rows, STATE, FAILURES):
            (folder / name).unlink(missing_ok=True)


def lay_out(
    folder: Path,
    kind: BankKind,
    images: pa.Table,
    row: tuple[int, ...],
    dtype: np.dtype,
    description: Mapping[str, Any],
) -> None:
    """Make a bank's files, or make those of a bank that is continued long enough.

    Args:
        images: the column `path`, and what else is to be kept of each image.
        row, dtype: shape and type of an image's row.

    Raises:
        DataError: a bank that is continued has fewer rows or states than images: zeros would pass for what was lost.
        EnvironmentError_: the folder cannot be written.
    """
    begun = (folder / kind.description).exists()
    if begun:
        promised = len(read_images(folder, kind))
        mapped(folder / kind.rows, kind, (promised, *row))
        mapped(folder / STATE, kind, (promised,))
    with explained_os_errors(folder):
        _set_length(folder / kind.rows, (len(images), *row), dtype)
        _set_length(folder / STATE, (len(images),), np.dtype("|u1"))
        _end_last_line(folder / FAILURES)
    if not begun or len(read_images(folder, kind)) != len(images):
        sink = pa.BufferOutputStream()
        pq.write_table(images, sink, compression="zstd")
        write_atomically(folder / PATHS, sink.getvalue())
    if not begun:
        whole = {
            "schema": BANK_SCHEMA_VERSION,
            **description,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
        }
        write_atomically(folder / kind.description, json.dumps(whole, indent=2).encode())


def read_description(folder: Path, kind: BankKind) -> dict[str, Any]:
    """What a bank says of itself.

    Raises:
        DataError: there is none, or it cannot be read.
        ArtifactError: a version with another layout wrote it.
    """
    file = folder / kind.description
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"no {kind.noun} in {folder}: {error}",
            f"a folder that the {kind.maker} wrote",
            f"run the {kind.maker} again",
        ) from error
    if description.get("schema") != BANK_SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} has schema {description.get('schema')}",
            f"schema {BANK_SCHEMA_VERSION}",
            f"run the {kind.maker} again with overwrite",
        )
    return description


def read_images(folder: Path, kind: BankKind) -> pa.Table:
    """The images of a bank, in order: `path`, and what else is kept of each. `DataError` if they cannot be read."""
    file = folder / PATHS
    try:
        images: pa.Table = pq.read_table(file, partitioning=None)
        images.column("path")
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise _broken(file, kind, str(error)) from error
    return images


def read_paths(folder: Path, kind: BankKind) -> list[str]:
    """The paths of a bank's images, in order. `DataError` if they cannot be read."""
    paths: list[str] = read_images(folder, kind).column("path").to_pylist()
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


def mapped(path: Path, kind: BankKind, shape: tuple[int, ...]) -> np.ndarray:
    """The first rows of a .npy file, read-only; it may have more while another process makes it grow.

    Raises:
        DataError: it is missing, cut off, or of another shape.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise _broken(path, kind, str(error)) from error
    if len(array) < shape[0] or array.shape[1:] != shape[1:]:
        raise _broken(path, kind, f"it is {list(array.shape)}, not {list(shape)}")
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


def _broken(path: Path, kind: BankKind, why: str) -> DataError:
    return DataError(
        f"cannot read {path}: {why}", f"a whole {kind.noun}", f"run the {kind.maker} again with overwrite"
    )

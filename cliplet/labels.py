"""The labels of a collection on disk: one row for every image, or one error.

    OUT/run.json                  what the job was: its fingerprint, classes, thresholds, versions
    OUT/labels/part-000000.parquet   path, width, height, labels, scores, model, seconds
    OUT/errors.parquet            path, stage, reason

A file is written under a temporary name, flushed to the disk and renamed, so a reader never sees half of
one. Parts are written before the errors that belong to the same batches; after a kill between the two, the
inputs whose error was lost are simply tried again. A path that stands in both tables (a retry that
succeeded just before a kill) counts as labelled.

Legend: C classes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cliplet.errors import ArtifactError, DataError, UsageError, explained_os_errors
from cliplet.label_records import ErrorRecord as ErrorRecord
from cliplet.label_records import LabelRecord as LabelRecord
from cliplet.lock import lock_folder
from cliplet.partition_folders import is_divided, not_joined

LABELS_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("labels", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("model", pa.string()),
        ("seconds", pa.float32()),
    ]
)
ERRORS_SCHEMA = pa.schema([("path", pa.string()), ("stage", pa.string()), ("reason", pa.string())])
RUN_SCHEMA_VERSION = 1


class LabelStore:
    """The folder that one labelling job writes; a context manager that lets one writer in at a time.

    Raises:
        UsageError: the folder belongs to a job with another fingerprint, or another run is writing it.
        EnvironmentError_: the folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    @property
    def parts_folder(self) -> Path:
        return self.folder / "labels"

    @property
    def errors_file(self) -> Path:
        return self.folder / "errors.parquet"

    @property
    def run_file(self) -> Path:
        return self.folder / "run.json"

    def __enter__(self) -> LabelStore:
        self._lock = lock_folder(self.folder)
        with explained_os_errors(self.folder):
            self.parts_folder.mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, run: dict[str, Any], *, overwrite: bool = False) -> None:
        """Start the job `run`, or continue it if the folder holds rows of one with the same fingerprint."""
        for leftover in self._leftovers():
            leftover.unlink()
        if overwrite:
            self._clear()
        elif self.has_rows():
            self.refuse_other_job(run["fingerprint"])
            return
        write_atomically(self.run_file, json.dumps(run, indent=2).encode())

    def has_rows(self) -> bool:
        """Whether an earlier run wrote anything here."""
        return self.errors_file.exists() or any(self.parts_folder.glob("part-*.parquet"))

    def _leftovers(self) -> list[Path]:
        """Files that a killed run had not finished; others' files are left alone."""
        whole = (self.run_file, self.errors_file)
        half = [path.with_name(path.name + ".tmp") for path in whole]
        return [path for path in half if path.exists()] + list(self.parts_folder.glob("part-*.parquet.tmp"))

    def _clear(self) -> None:
        for part in self.parts_folder.glob("part-*"):
            part.unlink()
        self.errors_file.unlink(missing_ok=True)
        self.run_file.unlink(missing_ok=True)

    def refuse_other_job(self, fingerprint: dict[str, Any]) -> None:
        """Raise `UsageError` unless the rows here are of the job with this fingerprint."""
        before = read_run(self.folder)["fingerprint"]
        changed = sorted(k for k in fingerprint.keys() | before.keys() if fingerprint.get(k) != before.get(k))
        if changed:
            what = "; ".join(
                f"{k}: {_short(before.get(k))} then, {_short(fingerprint.get(k))} now" for k in changed
            )
            raise UsageError(
                f"{self.folder} holds the labels of another job ({what})",
                "the same inputs, model, classes and options, which would continue that job",
                "choose another --out, or replace what is there with --overwrite",
            )

    def write_part(self, records: Sequence[LabelRecord]) -> Path:
        """Write the rows of one part; returns its path."""
        columns = [
            [r.path for r in records],
            [r.width for r in records],
            [r.height for r in records],
            [list(r.labels) for r in records],
            [np.asarray(r.scores, np.float32) for r in records],
            [r.model for r in records],
            [r.seconds for r in records],
        ]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, LABELS_SCHEMA, strict=True)]
        existing = sorted(self.parts_folder.glob("part-*.parquet"))
        number = int(existing[-1].stem.split("-")[1]) + 1 if existing else 0
        path = self.parts_folder / f"part-{number:06d}.parquet"
        _write_table(path, pa.Table.from_arrays(arrays, schema=LABELS_SCHEMA))
        return path

    def write_errors(self, errors: Sequence[ErrorRecord]) -> None:
        """Replace the table of errors."""
        columns = [[e.path for e in errors], [e.stage for e in errors], [e.reason for e in errors]]
        arrays = [pa.array(c, pa.string()) for c in columns]
        _write_table(self.errors_file, pa.Table.from_arrays(arrays, schema=ERRORS_SCHEMA))

    def labelled_paths(self) -> set[str]:
        """Paths of all rows written so far."""
        return set(read_labelled_paths(self.folder))

    def errors(self, labelled: set[str]) -> list[ErrorRecord]:
        """Errors written so far, without those of paths that were `labelled` since."""
        return [e for e in read_errors(self.folder) if e.path not in labelled]


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a folder of labels.

    Raises:
        DataError: the folder holds no labels, or those of a divided job that is not joined.
        ArtifactError: they were written by a version with another layout.
    """
    file = folder / "run.json"
    if not file.exists() and is_divided(folder):
        raise not_joined(folder)
    if not file.exists():
        raise DataError(
            f"no labels in {folder}: {file.name} is missing",
            "a folder that `cliplet label` wrote",
            f"cliplet label IMAGES --out {folder}",
        )
    run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if run.get("schema") != RUN_SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} has schema {run.get('schema')}",
            f"schema {RUN_SCHEMA_VERSION}",
            "label again with --overwrite",
        )
    return run


def read_labels(folder: Path) -> Iterator[LabelRecord]:
    """All rows of a folder of labels, part by part, so that memory does not grow with the collection."""
    for part in sorted((folder / "labels").glob("part-*.parquet")):
        for batch in _read_table(part).to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                scores = np.asarray(row.pop("scores"), np.float32)
                yield LabelRecord(**{**row, "labels": tuple(row["labels"]), "scores": scores})


def read_labelled_paths(folder: Path) -> Iterator[str]:
    """The path of each row of a folder of labels, in order."""
    for part in sorted((folder / "labels").glob("part-*.parquet")):
        yield from _read_table(part, columns=["path"]).column("path").to_pylist()


def read_errors(folder: Path) -> list[ErrorRecord]:
    """All rows of a folder's errors.parquet; none if there is no such file."""
    file = folder / "errors.parquet"
    if not file.exists():
        return []
    return [ErrorRecord(**row) for row in _read_table(file).to_pylist()]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, finds the old one or the new one whole."""
    with explained_os_errors(path), _replaced(path) as file:
        file.write(data)


@contextmanager
def replaced_text(path: Path, *, encoding: str = "utf-8", newline: str | None = None) -> Iterator[TextIO]:
    """Context with a text stream that becomes the file `path` at the end, whole or not at all."""
    with explained_os_errors(path), _replaced(path) as file:
        stream = io.TextIOWrapper(file, encoding=encoding, newline=newline)
        yield stream
        stream.flush()
        stream.detach()


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    # A dictionary of scores, nearly all of which differ, would be larger than they are.
    pq.write_table(table, sink, compression="zstd", use_dictionary=["labels.list.element", "model", "stage"])
    write_atomically(path, sink.getvalue())


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"cannot read {path}: {error}",
            "a whole Parquet file",
            "remove that file and run the same `cliplet label` again: its images are labelled anew",
        ) from error


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"

"""Labels on disk: what is written is read back, whole or not at all, by one writer at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cliplet.errors import ArtifactError, DataError, EnvironmentError_, UsageError
from cliplet.labels import (
    ErrorRecord,
    LabelRecord,
    LabelStore,
    read_errors,
    read_labels,
    read_run,
    write_atomically,
)

RUN = {"schema": 1, "fingerprint": {"model": "a", "views": "1"}, "classes": ["cat", "dog"]}


def record(path: str) -> LabelRecord:
    return LabelRecord(path, 4, 3, ("dog",), np.array([0.25, 0.75], np.float32), "tiny", 0.5)


def test_rows_and_errors_come_back(tmp_path: Path) -> None:
    with LabelStore(tmp_path / "out") as store:
        store.begin(RUN)
        store.write_part([record("a.jpg"), record("ü n.jpg")])
        store.write_part([record("c.jpg")])
        store.write_errors([ErrorRecord("d.jpg", "decode", "zero bytes")])
        assert store.labelled_paths() == {"a.jpg", "ü n.jpg", "c.jpg"}
    rows = list(read_labels(tmp_path / "out"))
    assert [r.path for r in rows] == ["a.jpg", "ü n.jpg", "c.jpg"]
    assert rows[0].labels == ("dog",)
    assert rows[0].scores.tolist() == [0.25, 0.75]
    assert read_errors(tmp_path / "out") == [ErrorRecord("d.jpg", "decode", "zero bytes")]


def test_a_path_that_is_labelled_is_no_error_any_more(tmp_path: Path) -> None:
    with LabelStore(tmp_path) as store:
        store.write_errors([ErrorRecord("a.jpg", "read", "busy"), ErrorRecord("b.jpg", "read", "busy")])
        assert [e.path for e in store.errors({"a.jpg"})] == ["b.jpg"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    with LabelStore(tmp_path) as store:
        store.write_part([record("a.jpg")])
        (store.parts_folder / "part-000001.parquet.tmp").write_bytes(b"half")
    with LabelStore(tmp_path) as store:
        store.begin(RUN, overwrite=True)
        assert list(store.parts_folder.iterdir()) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with LabelStore(tmp_path):
        with pytest.raises(UsageError, match="another run is writing"), LabelStore(tmp_path):
            pass
    with LabelStore(tmp_path):
        pass


def test_another_job_is_refused_and_told_apart(tmp_path: Path) -> None:
    other = {**RUN, "fingerprint": {"model": "b", "views": "1"}}
    with LabelStore(tmp_path) as store:
        store.begin(RUN)
        store.begin(RUN)
        store.write_part([record("a.jpg")])
        with pytest.raises(UsageError, match='model: "a" then, "b" now'):
            store.begin(other)
        store.begin(other, overwrite=True)
        assert store.labelled_paths() == set()
    assert read_run(tmp_path)["fingerprint"]["model"] == "b"


def test_rows_without_their_job_are_not_adopted(tmp_path: Path) -> None:
    with LabelStore(tmp_path) as store:
        store.write_part([record("a.jpg")])
        with pytest.raises(DataError, match="run.json is missing"):
            store.begin(RUN)


def test_a_job_that_never_wrote_a_row_is_no_obstacle(tmp_path: Path) -> None:
    with LabelStore(tmp_path) as store:
        store.begin({**RUN, "fingerprint": {"model": "with a typing error"}})
        store.begin(RUN)
    assert read_run(tmp_path) == RUN


def test_a_folder_without_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labels in"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        read_run(tmp_path)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    with LabelStore(tmp_path) as store:
        part = store.write_part([record("a.jpg")])
        part.write_bytes(part.read_bytes()[:-20])
        with pytest.raises(DataError, match="part-000000.parquet"):
            store.labelled_paths()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="cannot write"), LabelStore(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_error_that_says_so_and_leaves_no_half_file(tmp_path: Path) -> None:
    target = tmp_path / "table"
    target.with_name("table.tmp").symlink_to("/dev/full")
    with pytest.raises(EnvironmentError_, match="no space left"):
        write_atomically(target, b"x" * 10_000)
    assert list(tmp_path.iterdir()) == []

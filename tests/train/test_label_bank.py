"""The label bank: what comes back, what is continued, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cliplet.errors import ArtifactError, ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.labels import ErrorRecord
from cliplet.train.label_bank import LabelBank

PATHS = [f"{i}.jpg" for i in range(7)]
SETTINGS: dict[str, Any] = {
    "classes": ["cat", "dog"],
    "views": 3,
    "provenance": {"model": "m", "size": (1, 2)},
}


def opened(folder: Path, paths: list[str] = PATHS, **changed: Any) -> LabelBank:
    return LabelBank.open(folder, paths=paths, **{**SETTINGS, **changed})


def rows(*indices: int, views: int = 3, classes: int = 2) -> np.ndarray:
    return np.stack([np.arange(views * classes).reshape(views, classes) + 100.0 * i for i in indices])


def test_rows_come_back_where_they_were_put(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        assert bank.pending().tolist() == list(range(7)) and len(bank) == 7
        bank.write(np.array([5, 1, 2]), rows(5, 1, 2))
        bank.fail(4, "decode", "not an image: \n\u00fc")
        assert bank.done.tolist() == [False, True, True, False, False, True, False]
    with opened(tmp_path) as writer:
        pass
    for again in (LabelBank.read(tmp_path), writer):
        assert again.pending().tolist() == [0, 3, 6]
        assert again.probs.dtype == np.float32 and again.probs.shape == (7, 3, 2)
        np.testing.assert_array_equal(again.probs[[5, 1, 2]], rows(5, 1, 2))
        assert not again.probs[[0, 3, 4, 6]].any()
        assert again.errors == [ErrorRecord("4.jpg", "decode", "not an image: \n\u00fc")]
        assert (again.paths, again.classes, again.views) == (PATHS, ("cat", "dog"), 3)
        assert again.provenance == {"model": "m", "size": [1, 2]}
    described = json.loads((tmp_path / "bank.json").read_text())
    assert described["created"] and described["versions"]["torch"]


def test_the_arrays_are_plain_numpy_files(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.write(np.array([3]), rows(3))
    np.testing.assert_array_equal(np.load(tmp_path / "probs.npy")[3], rows(3)[0])
    assert np.load(tmp_path / "state.npy").tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_failures_can_be_tried_again(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        for index in (1, 2):
            bank.fail(index, "read", "not now")
    with opened(tmp_path) as bank:
        bank.retry_failed()
        assert bank.pending().tolist() == list(range(7)) and bank.errors == []
        bank.write(np.array([1]), rows(1))
        bank.fail(2, "read", "not ever")
    assert LabelBank.read(tmp_path).errors == [ErrorRecord("2.jpg", "read", "not ever")]


def test_more_images_after_the_old_ones_let_the_bank_grow_in_place(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.write(np.arange(7), rows(*range(7)))
    before = (tmp_path / "probs.npy").stat().st_ino
    many = [*PATHS, *(f"more/{i}" for i in range(100_000))]
    with opened(tmp_path, many) as bank:
        assert bank.pending().tolist() == list(range(7, len(many)))
        np.testing.assert_array_equal(bank.probs[:7], rows(*range(7)))
        bank.write(np.array([100_006]), rows(9))
    state = (tmp_path / "probs.npy").stat()
    assert state.st_ino == before
    assert state.st_size > 2_400_000 > 1_000_000 > 512 * state.st_blocks, "what is not written takes no space"
    again = LabelBank.read(tmp_path)
    assert again.paths == many
    np.testing.assert_array_equal(again.probs[[0, 100_006]], rows(0, 9))
    np.testing.assert_array_equal(np.load(tmp_path / "probs.npy", mmap_mode="r")[100_006], rows(9)[0])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"classes": ["dog", "cat"]}, "classes"),
        ({"views": 2}, "views"),
        ({"provenance": {"model": "n", "size": (1, 2)}}, "in model"),
        ({"provenance": {"model": "m"}}, "size"),
        ({"paths": PATHS[:6]}, "images"),
        ({"paths": [*PATHS[:6], "x.jpg"]}, "images"),
        ({"paths": [PATHS[1], PATHS[0], *PATHS[2:]]}, "images"),
    ],
)
def test_another_bank_is_refused_unless_it_is_to_be_replaced(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    with opened(tmp_path) as bank:
        bank.write(np.array([0]), rows(0))
        bank.fail(1, "read", "no")
    with pytest.raises(UsageError, match=f"differs.*{named}"):
        opened(tmp_path, **changed)
    assert LabelBank.read(tmp_path).done[0]
    with opened(tmp_path, overwrite=True, **changed) as bank:
        assert len(bank.pending()) == len(bank) and not bank.probs.any() and bank.errors == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(UsageError, match="another run is writing"):
            opened(tmp_path)
        assert len(LabelBank.read(tmp_path)) == 7
    with opened(tmp_path) as bank:
        bank.write(np.array([0]), rows(0))
    with pytest.raises(UsageError, match="differs"):
        opened(tmp_path, views=1)
    opened(tmp_path).__exit__(None, None, None)
    with pytest.raises(AssertionError):
        LabelBank.read(tmp_path).fail(0, "read", "no")


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda f: (f / "bank.json").unlink(), DataError, "no label bank"),
        (lambda f: (f / "bank.json").write_text("{"), DataError, "no label bank"),
        (lambda f: (f / "bank.json").write_text('{"schema": 0}'), ArtifactError, "schema 0"),
        (lambda f: (f / "paths.parquet").write_bytes(b"PAR1"), DataError, "paths.parquet"),
        (
            lambda f: (f / "probs.npy").write_bytes((f / "probs.npy").read_bytes()[:200]),
            DataError,
            "probs.npy",
        ),
        (lambda f: np.save(f / "probs.npy", np.zeros((7, 3, 4), np.float32)), DataError, r"\[7, 3, 4\]"),
        (lambda f: np.save(f / "state.npy", np.zeros(6, np.uint8)), DataError, "state.npy"),
    ],
)
def test_a_broken_bank_is_said_to_be_broken(
    tmp_path: Path, harm: Callable[[Path], object], error: type[ClipletError], message: str
) -> None:
    with opened(tmp_path):
        pass
    harm(tmp_path)
    with pytest.raises(error, match=message):
        LabelBank.read(tmp_path)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (rows(0, 1)[:, :2], r"\[2, 2, 2\]"),
        (rows(0), r"\[1, 3, 2\]"),
        (rows(0, 1) * np.nan, "not finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, probs: np.ndarray, message: str) -> None:
    with opened(tmp_path) as bank:
        with pytest.raises(DataError, match=message):
            bank.write(np.array([0, 1]), probs)
        bank.write(np.zeros(0, int), np.zeros((0, 3, 2), np.float32))
        assert not bank.done.any()


@pytest.mark.parametrize("nothing", [{"paths": []}, {"classes": []}, {"views": 0}])
def test_an_empty_bank_is_refused(tmp_path: Path, nothing: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="one of each"):
        opened(tmp_path, **nothing)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="cannot write"):
        opened(tmp_path / "file" / "bank")


def test_what_a_kill_half_wrote_is_mended(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.write(np.array([0]), rows(0))
    # A failure that was half written, and arrays that had grown before the list of images did.
    with open(tmp_path / "errors.jsonl", "a") as file:
        file.write('{"index": 5, "pa')
    for name, shape in (("probs.npy", (9, 3, 2)), ("state.npy", (9,))):
        old = np.load(tmp_path / name)
        grown = np.zeros(shape, old.dtype)
        grown[:7] = old
        np.save(tmp_path / name, grown)
    assert len(LabelBank.read(tmp_path).probs) == 7
    with opened(tmp_path) as bank:
        bank.fail(5, "read", "no")
    assert LabelBank.read(tmp_path).errors == [ErrorRecord("5.jpg", "read", "no")]
    assert len(np.load(tmp_path / "probs.npy")) == 7
    # A bank that was begun and never had its bank.json is begun again.
    (tmp_path / "bank.json").unlink()
    with opened(tmp_path, views=2) as bank:
        assert len(bank.pending()) == 7


# Row i is full of i + 1. It flushes after each stretch, so that a kill meets every state of the files.
WRITER = """
import sys, time, numpy as np
from pathlib import Path
from cliplet.train.label_bank import LabelBank
paths = [str(i) for i in range(int(sys.argv[2]))]
with LabelBank.open(Path(sys.argv[1]), paths=paths, classes=["a"] * 50, views=20, provenance={}) as bank:
    print("open", flush=True)
    for some in np.array_split(bank.pending(), 400):
        failing = some[some % 11 == 5]
        done = some[some % 11 != 5]
        bank.write(done, np.ones((1, 20, 50), np.float32) * (done + 1)[:, None, None])
        for index in failing:
            bank.fail(index, "read", f"no {index}")
        bank.flush()
        print("kept", flush=True)
        time.sleep(0.01)
"""


def test_a_killed_writer_leaves_no_done_row_without_its_data(tmp_path: Path) -> None:
    settled = 0
    chance = random.Random(5)
    for images, stretches in ((4000, 3), (4000, 40), (6000, 20), (6000, 0)):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(images)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "open\n"
            for _ in range(stretches):
                assert process.stdout.readline() == "kept\n"
            time.sleep(chance.random() * 0.02)
            process.kill()
        bank = LabelBank.read(tmp_path)
        done = np.flatnonzero(bank.done)
        assert (bank.probs[done] == (done + 1)[:, None, None]).all()
        assert [e.reason for e in bank.errors] == [f"no {e.path}" for e in bank.errors]
        assert settled <= len(done) + len(bank.errors) == images - len(bank.pending()) < images
        settled = len(done) + len(bank.errors)
    assert settled > 0
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), "6000"], check=True, capture_output=True)
    bank = LabelBank.read(tmp_path)
    assert len(bank.pending()) == 0
    assert [e.path for e in bank.errors] == [str(i) for i in range(5, 6000, 11)]
    done = np.flatnonzero(bank.done)
    assert (bank.probs[done] == (done + 1)[:, None, None]).all()

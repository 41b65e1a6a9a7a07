"""Arrays on disk: what comes back, what a kill leaves behind, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from cliplet import checkpoint, labels
from cliplet.checkpoint import load_arrays, load_details, save_arrays
from cliplet.errors import ArtifactError, EnvironmentError_

ARRAYS: dict[str, Any] = {
    "scalar": np.array(7, np.int64),
    "step": np.float32(0.5),
    "empty": np.zeros((0, 3), np.float32),
    "counts": np.arange(5),
    "flags": np.array([True, False]),
    "small": np.array([255, 0], np.uint8),
    "half": np.array([0.1, -0.0], np.float16),
    "odd": np.array([np.nan, np.inf, -0.0, 5e-324]),
    "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "every other": np.arange(10)[::2],
}


def test_arrays_come_back_with_their_shapes_types_and_bits(tmp_path: Path) -> None:
    save_arrays(tmp_path / "new" / "folder", "state", ARRAYS, {"epoch": 3, "rows": [1, 2]})
    arrays, details = load_arrays(tmp_path / "new" / "folder", "state")
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        found = arrays[name]
        assert (found.shape, found.dtype, found.tobytes()) == (array.shape, array.dtype, array.tobytes())
    assert (details["epoch"], details["rows"]) == (3, [1, 2])
    assert load_details(tmp_path / "new" / "folder", "state") == details


def test_what_is_replaced_is_gone_and_others_stay(tmp_path: Path) -> None:
    save_arrays(tmp_path, "other", {"x": np.zeros(2)}, {})
    for value in (1.0, 2.0, 2.0):
        save_arrays(tmp_path, "state", {"x": np.array([value])}, {"value": value})
    assert load_arrays(tmp_path, "state")[0]["x"].tolist() == [2.0]
    assert load_arrays(tmp_path, "other")[0]["x"].tolist() == [0.0, 0.0]
    assert len(list(tmp_path.glob("state-*.safetensors"))) == 1
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("writes", [1, 2])
def test_a_kill_in_the_middle_leaves_the_old_pair_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Killed after the arrays (1 file), or after the details and before the old arrays are removed (2)."""
    save_arrays(tmp_path, "state", {"x": np.array([1.0])}, {"value": 1})
    write, left = labels.write_atomically, writes

    def dying(*arguments: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_atomically", dying)
    if writes == 2:
        monkeypatch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_arrays(tmp_path, "state", {"x": np.array([2.0])}, {"value": 2})
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    arrays, details = load_arrays(tmp_path, "state")
    assert (arrays["x"].tolist(), details["value"]) == (([1.0], 1) if writes == 1 else ([2.0], 2))
    save_arrays(tmp_path, "state", {"x": np.array([3.0])}, {})
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def arrays_file(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def change_details(folder: Path, **changes: object) -> None:
    file = folder / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def swap_for_text(folder: Path) -> None:
    import hashlib

    arrays_file(folder).write_bytes(b"no arrays")
    change_details(folder, sha256=hashlib.sha256(b"no arrays").hexdigest())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "state.json").unlink(), "cannot read .*state.json"),
        (lambda f: (f / "state.json").write_text('{"schema"'), "cannot read .*state.json"),
        (lambda f: (f / "state.json").write_bytes(b"\xff\xfe"), "cannot read .*state.json"),
        (lambda f: change_details(f, schema=99), "schema 99"),
        (lambda f: change_details(f, sha256="0" * 64), "changed after it was written"),
        (lambda f: arrays_file(f).unlink(), "cannot read .*safetensors"),
        (lambda f: arrays_file(f).write_bytes(arrays_file(f).read_bytes()[:-1]), "changed after"),
        (lambda f: arrays_file(f).write_bytes(save({"x": np.array([2.0])})), "changed after"),
        (swap_for_text, "not a safetensors file"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    save_arrays(tmp_path, "state", {"x": np.array([1.0])}, {})
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=said):
        load_arrays(tmp_path, "state")


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="cannot write"):
        save_arrays(tmp_path / "file" / "below", "state", {"x": np.zeros(1)}, {})

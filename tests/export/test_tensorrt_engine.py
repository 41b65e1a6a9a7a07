"""Engines built ahead of time for a GPU that is not here: what is written, kept, read back and refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_engine
from toy_engine import PRODUCT, TOY, toy_graph

from cliplet.contract import CLASSIFIER, FEATURES
from cliplet.cuda import Cuda
from cliplet.engine_sidecar import Profile, SideCar, sidecar_path
from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.export import tensorrt_engine
from cliplet.export.tensorrt_engine import EngineFile, build_engine
from cliplet.model_spec import file_sha256

pytest.importorskip("tensorrt_rtx")
PROFILE = Profile(batch=(1, 2, 4), canvas=(8, 8, 16))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(source: Path, folder: Path, precision: str = "fp32", **options: Any) -> EngineFile:
    chosen = {"library": "tensorrt_rtx", "target": "sm89", "profile": PROFILE, "contract": TOY, **options}
    return build_engine(source, folder, precision=precision, **chosen)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_and_its_side_car(precision: str, cache: Path, tmp_path: Path) -> None:
    source = toy_graph(tmp_path / "toy.onnx", precision)
    built = build(source, tmp_path / "bundle", precision)
    plan = tmp_path / "bundle" / built.file
    name = f"engines/sm89-{built.sidecar.version}-{precision}"
    assert files(tmp_path / "bundle") == [f"{name}.json", f"{name}.plan"]
    assert built.file == f"{name}.plan" and not built.cached
    told = SideCar.of(plan)
    assert told == built.sidecar
    assert (told.library, told.target, told.gpu, told.graph) == ("tensorrt_rtx", "sm89", "", "toy")
    assert told.outputs == ("probs", FEATURES) and told.profile == PROFILE
    assert (told.source_sha256, told.plan_sha256) == (file_sha256(source), file_sha256(plan))
    assert (told.precision, told.precision_read, told.nodes) == (precision, precision, (PRODUCT,))
    assert told.products == {precision: 1} and told.layers > 0 and told.build_seconds >= 0
    assert not plan.read_bytes().startswith(b"{"), "nothing lies in front of the engine"
    assert json.loads(json.dumps(built.facts))["read_from"] == told.read_from


def test_precision_is_read_from_the_finished_engine(cache: Path, tmp_path: Path) -> None:
    if Cuda().gpu():
        pytest.skip("a GPU here would load it instead")
    assert build(toy_graph(tmp_path / "t.onnx", "fp16"), tmp_path, "fp16").sidecar.read_from == "builder"


def test_an_engine_that_shows_nothing_is_read_in_the_network(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "_finished_layers", lambda *_: ([], "builder"))
    told = build(toy_graph(tmp_path / "t.onnx", "fp16"), tmp_path, "fp16").sidecar
    assert (told.read_from, told.precision_read, told.products) == ("network", "fp16", {"fp16": 1})


def test_an_engine_in_another_precision_is_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_engine, "engine_products", lambda *_: {PRODUCT: "fp32"})
    with pytest.raises(EnvironmentError_, match="asked for fp16, but the engine .* computes in fp32"):
        build(toy_graph(tmp_path / "t.onnx", "fp16"), tmp_path / "bundle", "fp16")
    assert files(cache) == [] and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("held, asked", [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "bf16")])
def test_a_graph_in_another_precision(held: str, asked: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"asked for {asked}, but the encoder of .* computes in {held}"):
        build(toy_graph(tmp_path / "t.onnx", held), tmp_path, asked)


def test_a_second_build_is_a_copy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_graph(tmp_path / "toy.onnx")
    first = build(source, tmp_path / "one")
    monkeypatch.setattr(tensorrt_engine, "_build", lambda *_: pytest.fail("built again"))
    second = build(source, tmp_path / "two")
    assert second.cached and second.sidecar == first.sidecar
    assert (tmp_path / "two" / second.file).read_bytes() == (tmp_path / "one" / first.file).read_bytes()


@pytest.mark.parametrize(
    "change", ["graph", {"target": "sm86"}, {"profile": Profile()}, {"observe": ()}], ids=str
)
def test_what_shapes_an_engine_is_part_of_its_name(change: Any, cache: Path, tmp_path: Path) -> None:
    source = toy_graph(tmp_path / "toy.onnx")
    first = build(source, tmp_path)
    if change == "graph":
        toy_graph(source, operator="Tanh")
        change = {}
    second = build(source, tmp_path, **change)
    assert not second.cached and second.sidecar != first.sidecar


def test_weights_beside_the_graph_are_part_of_its_hash(cache: Path, tmp_path: Path) -> None:
    source = toy_graph(tmp_path / "toy.onnx")
    hashes = {build(source, tmp_path).sidecar.source_sha256}
    for content in ("some weights", "others!!"):
        Path(f"{source}.data").write_text(content)
        hashes.add(build(source, tmp_path).sidecar.source_sha256)
    assert len(hashes) == 3


def test_a_damaged_engine_in_the_cache_is_built_again(cache: Path, tmp_path: Path) -> None:
    source = toy_graph(tmp_path / "toy.onnx")
    build(source, tmp_path / "bundle")
    (kept,) = cache.rglob("*.plan")
    for damage in (lambda: kept.write_bytes(b"half"), lambda: sidecar_path(kept).unlink()):
        damage()
        again = build(source, tmp_path / "bundle")
        assert not again.cached
        assert file_sha256(tmp_path / "bundle" / again.file) == again.sidecar.plan_sha256


@pytest.mark.parametrize(
    "operator, words",
    [
        ("DeformConv", r"has no operator DeformConv \(node 'last'\)\nexpected: .*nearest by name: Conv"),
        ("Nonsense", r"has no operator Nonsense"),
        ("Unique", r"has no operator Unique"),
        ("Expand", r"refuses operator Expand of node 'last'"),
    ],
)
def test_an_operator_that_is_refused(operator: str, words: str, cache: Path, tmp_path: Path) -> None:
    source = toy_graph(tmp_path / "toy.onnx", operator=operator)
    with pytest.raises(DataError, match=words):
        build(source, tmp_path / "bundle")
    assert files(cache) == [] and not (tmp_path / "bundle").exists()


def test_what_is_no_graph_of_the_contract(cache: Path, tmp_path: Path) -> None:
    source = toy_graph(tmp_path / "toy.onnx")
    with pytest.raises(DataError, match="those of graph 'classifier'"):
        build(source, tmp_path, contract=CLASSIFIER)
    with pytest.raises(DataError, match="no inner tensor 'logits'"):
        build(source, tmp_path, observe=("logits",))
    source.write_bytes(source.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read"):
        build(source, tmp_path)


def test_targets_that_cannot_be(cache: Path, tmp_path: Path) -> None:
    source = toy_graph(tmp_path / "toy.onnx")
    with pytest.raises(UsageError, match="one of sm75, sm80, sm86, sm89"):
        build(source, tmp_path, target="sm90")
    if Cuda().gpu() is None:
        with pytest.raises(EnvironmentError_, match="no GPU here to build for") as caught:
            build(source, tmp_path, target=None)
        assert caught.value.fix == "--runtime tensorrt_rtx --target sm89"


# Presses Ctrl-C at the second step of a real build: in a process of its own, since a test runner has its own ideas
# of that signal.
INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from cliplet.export.tensorrt_engine import build_engine
from cliplet.engine_sidecar import Profile
from cliplet.tensorrt_library import Library
from toy_engine import TOY, toy_graph

plain, steps = Library.monitor, []

def pressed(library, keep_on):
    def step():
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return bool(keep_on())
    return plain(library, step)

Library.monitor = pressed
folder, before = Path(sys.argv[1]), signal.getsignal(signal.SIGINT)
profile = Profile(batch=(1, 2, 4), canvas=(8, 8, 16))
try:
    build_engine(toy_graph(folder / "toy.onnx"), folder / "bundle", contract=TOY, precision="fp32",
                 library="tensorrt_rtx", target="sm89", profile=profile)
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) == before
    print("interrupted after", len(steps))
"""


def test_an_interrupted_build_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(toy_engine.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    steps = int(done.stdout.removeprefix("interrupted after"))
    assert 2 <= steps < 10, "the build went on"
    assert files(cache) == [] and not (tmp_path / "bundle").exists()


def test_no_disk(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_graph(tmp_path / "toy.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="cannot write"):
        build(source, tmp_path / "file")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorrt_engine.shutil, "copyfile", full)
    with pytest.raises(EnvironmentError_, match="no space left"):
        build(source, tmp_path / "bundle")
    assert files(tmp_path / "bundle") == []
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentError_, match="CLIPLET_CACHE"):
        build(source, tmp_path / "bundle")

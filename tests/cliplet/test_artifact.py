"""Bundles: written whole, refused when anything about them changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cliplet.artifact import Bundle, BundleJob, Engine, cache_folder, staging_folder
from cliplet.errors import ArtifactError, EnvironmentError_
from cliplet.export.bundle import cached_bundle
from cliplet.model_spec import parse_model_spec
from cliplet.views import Aggregation
from cliplet.vocabulary import read_vocabulary


@pytest.fixture(scope="module")
def made(toy_clip: Path) -> Bundle:
    spec = parse_model_spec(f"open_clip:local-dir:{toy_clip}")
    thresholds = {"1": {"value": 0.4}}
    return cached_bundle(BundleJob(spec, read_vocabulary("cat,dog"), Aggregation(), thresholds))


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(made.folder, tmp_path / "bundle")


def test_a_bundle_tells_where_it_came_from(bundle: Path, toy_clip: Path) -> None:
    manifest = Bundle.load(bundle).manifest
    assert manifest.model == f"open_clip:local-dir:{toy_clip}"
    assert manifest.vocabulary.names == ("cat", "dog")
    assert manifest.preprocessing.size == 32
    assert manifest.thresholds == {"1": {"value": 0.4}}
    (engine,) = manifest.engines
    assert engine.name == "onnx-fp32"
    assert engine.precision == engine.precision_read == "fp32"
    assert engine.parity["compared"] > 0
    assert engine.parity["largest"] <= engine.parity["tolerance"]["largest"]
    assert list(manifest.files) == ["model.onnx"]
    assert "torch" in manifest.versions


def test_a_changed_file_is_refused(bundle: Path) -> None:
    graph = bundle / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="has changed"):
        Bundle.load(bundle)


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        Bundle.load(bundle)


CLASSES = [{"name": "cat", "synonyms": []}]
VOCABULARY = {"prompt_set": "p", "prompt_set_version": 1, "templates": ["a {}"], "classes": CLASSES}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "schema 9"),
        ({"vocabulary": {}}, "incomplete: 'prompt_set'"),
        ({"vocabulary": {**VOCABULARY, "classes": []}}, "damaged: .* names no class"),
        ({"vocabulary": {**VOCABULARY, "classes": ["cat"]}}, "damaged"),
        ({"vocabulary": {**VOCABULARY, "templates": ["a"]}}, "damaged"),
        ({"vocabulary": {**VOCABULARY, "templates": [1]}}, "damaged"),
        ({"preprocessing": {"size": 32}}, "incomplete: 'mean'"),
        ({"preprocessing": []}, r"preprocessing is \[\]"),
        ({"kind": "detector"}, "kind is 'detector', which is none of snippets, classifier"),
        ({"kind": ["snippets"]}, "kind is "),
        ({"scale": "100"}, 'scale is "100"'),
        ({"bias": True}, "bias is true"),
        ({"files": ["model.onnx"]}, "files is "),
        ({"files": {"model.onnx": None}}, "model.onnx is null"),
        ({"files": {}}, "no sha256 of model.onnx"),
        ({"thresholds": None}, "thresholds is null"),
        ({"aggregation": {"kind": "median"}}, "damaged: aggregation 'median'"),
        ({"aggregation": {"power": 2}}, "damaged: .*power"),
        ({"engines": {}}, r"engines is \{\}"),
        ({"engines": ["onnx"]}, "damaged"),
        ({"engines": [{"runtime": "onnx"}]}, "incomplete: 'precision'"),
    ],
)
def test_another_manifest_is_refused(bundle: Path, change: dict[str, object], message: str) -> None:
    file = bundle / "cliplet.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message) as caught:
        Bundle.load(bundle)
    assert caught.value.fix.endswith(f"--out {bundle} --overwrite")


@pytest.mark.parametrize("content", ["[]", "null", '"bundle"', "3"])
def test_a_manifest_is_an_object(bundle: Path, content: str) -> None:
    (bundle / "cliplet.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"cliplet.json holds a \w+"):
        Bundle.load(bundle)


def _without_manifest(folder: Path) -> None:
    (folder / "cliplet.json").unlink()


def _with_a_manifest_of_nothing(folder: Path) -> None:
    (folder / "cliplet.json").write_text("[]")


def _with_another_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "model"),
    [
        (_without_manifest, "MODEL"),
        (_with_a_manifest_of_nothing, "MODEL"),
        (_with_another_graph, "open_clip:local-dir:{toy}"),
    ],
)
def test_only_what_cliplet_made_for_itself_may_be_removed(
    made: Bundle, toy_clip: Path, tmp_path: Path, damage: Callable[[Path], None], model: str
) -> None:
    own = shutil.copytree(made.folder, tmp_path / "my bundle")
    cached = shutil.copytree(made.folder, cache_folder() / "bundles" / f"copy of {damage.__name__}")
    fixes = []
    for folder in (own, cached):
        damage(folder)
        with pytest.raises(ArtifactError) as caught:
            Bundle.load(folder)
        fixes.append(caught.value.fix)
    shutil.rmtree(cached)
    named = model.format(toy=toy_clip)
    assert fixes == [
        f"export it again: cliplet export {named} --out '{own}' --overwrite",
        f"rm -r '{cached}', then the same command again",
    ]


# --- writing -----------------------------------------------------------------------------------------------


def staged_copy(made: Bundle, folder: Path) -> Path:
    return shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("cliplet.json"))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("number", "happened", "fix"),
    [
        (errno.EACCES, "cannot write", {True: "set CLIPLET_CACHE", False: "choose another --out"}),
        (errno.EXDEV, "cannot write", {True: "set CLIPLET_CACHE", False: "choose another --out"}),
        (errno.ENOSPC, "no space left", {True: "free some space", False: "free some space"}),
    ],
)
def test_a_bundle_that_cannot_be_put_in_place(
    made: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
    number: int,
    happened: str,
    fix: dict[bool, str],
) -> None:
    staged = staged_copy(made, tmp_path / "staged")
    folder = cache_folder() / "bundles" / "new" if cached else tmp_path / "new"

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(EnvironmentError_, match=happened) as caught:
        Bundle.write(folder, made.manifest, staged)
    assert caught.value.fix.startswith(fix[cached])


def test_a_file_in_the_place_of_a_bundle(made: Bundle, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("mine")
    with pytest.raises(EnvironmentError_, match="cannot write .*new"):
        Bundle.write(tmp_path / "new", made.manifest, staged_copy(made, tmp_path / "staged"))
    assert (tmp_path / "new").read_text() == "mine"


def test_the_faster_one_wins(made: Bundle, tmp_path: Path) -> None:
    staged = staged_copy(made, tmp_path / "staged")
    theirs = Bundle.write(tmp_path / "new", made.manifest, staged_copy(made, tmp_path / "first"))
    ours = replace(made.manifest, identity="ours")
    assert Bundle.write(tmp_path / "new", ours, staged) == theirs


def test_an_engine_and_its_weights_have_hashes(made: Bundle) -> None:
    files = {"openvino/model.xml": "a", "openvino/model.bin": "b", "openvino/model.int8.bin": "c"}
    files |= {"model.onnx": "d", "model.onnx.data": "e", "model.fp16.onnx": "f"}
    manifest = replace(made.manifest, files=files)

    def hashes(file: str) -> str:
        engine = Engine("any", "fp32", file, "fp32", "cpu", {})
        return "".join(sorted(manifest.files_of(engine).values()))

    assert [hashes(name) for name in ("openvino/model.xml", "model.onnx", "model.fp16.onnx")] == [
        "ab",
        "de",
        "f",
    ]


def test_a_staging_folder_goes(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "deep" / "bundle") as staged:
        (staged / "file").write_text("x")
        assert staged.parent == tmp_path / "deep"
    assert not list((tmp_path / "deep").iterdir())


def test_errors_inside_a_staging_folder_are_their_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging_folder(tmp_path / "bundle"):
        (tmp_path / "photo.jpg").read_bytes()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ({}, "set CLIPLET_CACHE to a folder that can be written"),
        ({"fix": "choose another --out"}, "choose another --out"),
    ],
)
def test_where_no_staging_folder_can_be_made(tmp_path: Path, given: dict[str, str], fix: str) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(EnvironmentError_, match="cannot write") as caught,
        staging_folder(tmp_path / "file" / "bundle", **given),
    ):
        pass
    assert caught.value.fix == fix


def test_no_manifest_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        Bundle.load(tmp_path)


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("CLIPLET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cliplet"

"""Bundles: written whole, refused when anything about them changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cliplet.artifact import Bundle, SnippetsJob, cache_folder
from cliplet.errors import ArtifactError
from cliplet.export.onnx_graph import export_snippets
from cliplet.model_spec import parse_model_spec
from cliplet.views import Aggregation
from cliplet.vocabulary import read_vocabulary


@pytest.fixture(scope="module")
def made(toy_clip: Path) -> Bundle:
    spec = parse_model_spec(f"open_clip:local-dir:{toy_clip}")
    return export_snippets(
        SnippetsJob(spec, read_vocabulary("cat,dog"), Aggregation(), {"1": {"value": 0.4}})
    )


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(made.folder, tmp_path / "bundle")


def test_a_bundle_tells_where_it_came_from(bundle: Path, toy_clip: Path) -> None:
    manifest = Bundle.load(bundle).manifest
    assert manifest.model == f"open_clip:local-dir:{toy_clip}"
    assert manifest.vocabulary.names == ("cat", "dog")
    assert manifest.preprocessing.size == 32
    assert manifest.thresholds == {"1": {"value": 0.4}}
    file = manifest.files["model.onnx"]
    assert file.precision == file.precision_read == "fp32"
    assert file.parity["compared"] > 0
    assert file.parity["largest_difference"] <= file.parity["tolerance"]
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


@pytest.mark.parametrize(
    ("change", "message"), [({"schema": 9}, "schema 9"), ({"vocabulary": {}}, "incomplete")]
)
def test_another_manifest_is_refused(bundle: Path, change: dict[str, object], message: str) -> None:
    file = bundle / "cliplet.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        Bundle.load(bundle)


def test_no_manifest_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        Bundle.load(tmp_path)


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("CLIPLET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cliplet"

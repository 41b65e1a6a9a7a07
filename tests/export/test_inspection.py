"""`cliplet inspect`: every kind of file in facts and in lines, whole, damaged and cut short."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cliplet.artifact import Bundle, BundleJob, Engine, Manifest, library_versions
from cliplet.classifier import Classifier, ClassifierConfig, save_classifier
from cliplet.contract import SNIPPETS
from cliplet.engine_sidecar import Profile, SideCar, sidecar_path
from cliplet.errors import ArtifactError, ClipletError, DataError, UsageError
from cliplet.export.inspection import inspect, lines
from cliplet.export.onnx_graph import set_metadata, set_vocabulary, trace
from cliplet.export.openvino_ir import write_ir
from cliplet.export.originals import load_original
from cliplet.export.precision import lower_precision
from cliplet.labels import RUN_SCHEMA_VERSION, ErrorRecord, LabelRecord, LabelStore
from cliplet.model_spec import file_sha256, parse_model_spec
from cliplet.views import Aggregation, Preprocessing
from cliplet.vocabulary import Vocabulary, read_vocabulary

CLASSES = "cat,dog,traffic light"
PREPROCESSING = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PARITY = {"largest": 0.01, "passed": True, "tolerance": {"largest": 0.05}, "breaches": []}
THRESHOLDS = {
    "1": {"value": 0.4, "how": "best F1"},
    "1+3x3": {"values": {"cat": 0.2, "dog": 0.3, "traffic light": 0.6}, "how": "class by class"},
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(CLASSES)


@pytest.fixture(scope="module")
def graphs(toy_clip: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced graph, the same in fp16, and its IR."""
    folder = tmp_path_factory.mktemp("graphs")
    spec = parse_model_spec(f"open_clip:local-dir:{toy_clip}")
    toy = load_original(BundleJob(spec, vocabulary, Aggregation(), {}))
    trace(toy.traced, SNIPPETS, toy.example, folder / "traced.onnx")
    assert toy.text_CD is not None
    set_vocabulary(folder / "traced.onnx", folder / "model.onnx", toy.text_CD.numpy())
    lower_precision(folder / "model.onnx", folder / "model.fp16.onnx", "fp16")
    write_ir(folder / "model.onnx", folder / "model.xml")
    names = {"cliplet.classes": json.dumps(vocabulary.names), "other": "as it is"}
    set_metadata(folder / "model.onnx", names)
    return folder


def _plan(folder: Path) -> Path:
    plan = folder / "sm89-1.7-fp16.plan"
    plan.write_bytes(b"plan" * 10)
    SideCar(
        library="tensorrt_rtx",
        version="1.7",
        target="sm89",
        gpu="",
        driver="",
        cuda="",
        graph="snippets",
        outputs=("view_probs", "scores"),
        source_sha256="0" * 64,
        plan_sha256=file_sha256(plan),
        precision="fp16",
        precision_read="fp16",
        read_from="builder",
        products={"fp16": 12},
        nodes=("node_conv",),
        layers=80,
        profile=Profile(batch=(1, 4, 8)),
        build_seconds=3.5,
    ).write(sidecar_path(plan))
    return plan


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return _plan(tmp_path)


def _bundle(folder: Path, graphs: Path, vocabulary: Vocabulary) -> Path:
    staged = folder / "staged"
    (staged / "openvino").mkdir(parents=True)
    for name in ("model.onnx", "model.fp16.onnx"):
        shutil.copy(graphs / name, staged)
    for name in ("model.xml", "model.bin"):
        shutil.copy(graphs / name, staged / "openvino")
    manifest = Manifest(
        kind="snippets",
        model="open_clip:toy",
        identity="abc",
        vocabulary=vocabulary,
        preprocessing=PREPROCESSING,
        aggregation=Aggregation("cdul", 0.3).to_json(),
        scale=100.0,
        bias=None,
        thresholds=THRESHOLDS,
        engines=(
            Engine("onnx", "fp32", "model.onnx", "fp32", "cpu", PARITY),
            Engine(
                "onnx", "fp16", "model.fp16.onnx", "fp16", "cpu", PARITY, {"speed": {"views_per_s": 31.5}}
            ),
            Engine("openvino", "bf16", "openvino/model.xml", "bf16", "cpu", PARITY),
        ),
        dropped=({"engine": "onnx-int8", "why": "not faster", "parity": {"largest": float("nan")}},),
    )
    return Bundle.write(folder / "bundle", manifest, staged).folder


@pytest.fixture
def bundle(tmp_path: Path, graphs: Path, vocabulary: Vocabulary) -> Path:
    return _bundle(tmp_path, graphs, vocabulary)


def _classifier(folder: Path, vocabulary: Vocabulary) -> Path:
    torch.manual_seed(0)
    config = ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=PREPROCESSING)
    details = {"recipe": {"epochs": 4}, "measured": {"held_out_map": 78.1}}
    save_classifier(folder / "classifier", Classifier(config, vocabulary), details)
    return folder / "classifier"


@pytest.fixture
def classifier(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    return _classifier(tmp_path, vocabulary)


def _labels(folder: Path, vocabulary: Vocabulary) -> Path:
    """Labels of three images of which one has none, one that failed, and one that was not come to yet."""
    images = folder / "images"
    images.mkdir(parents=True)
    paths = [images / f"{i}.jpg" for i in range(5)]
    for path in paths:
        path.touch()
    run = {
        "schema": RUN_SCHEMA_VERSION,
        "fingerprint": {
            "inputs": [str(images)],
            "cwd": None,
            "model": "abc",
            "vocabulary": vocabulary.to_json(),
            "views": "1+2x2",
            "aggregation": {"kind": "cdul", "zeta": 0.0},
            "runtime": "onnx/fp32/cpu",
        },
        "model": "tiny",
        "classes": list(vocabulary.names),
        "thresholds": [0.2, 0.3, 0.6],
        "threshold_source": "calibrated",
        "views": "1+2x2",
        "begun": "2026-01-01T00:00:00+00:00",
        "versions": library_versions(),
    }
    tags = (("cat", "traffic light"), ("traffic light",), ())
    rows = [
        LabelRecord(str(path), 4, 3, labels, np.zeros(3, np.float32), "tiny", 0.25)
        for path, labels in zip(paths, tags, strict=False)
    ]
    with LabelStore(folder / "labels") as store:
        store.begin(run)
        store.write_part(rows[:2])
        store.write_part(rows[2:])
        # The first of them was labelled later, by a retry.
        store.write_errors(
            [ErrorRecord(str(paths[0]), "read", "gone"), ErrorRecord(str(paths[3]), "decode", "cut short")]
        )
    return folder / "labels"


@pytest.fixture
def labels(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    return _labels(tmp_path, vocabulary)


def test_a_bundle(bundle: Path, graphs: Path) -> None:
    facts = inspect(bundle)
    assert (facts["kind"], facts["intact"], facts["damage"]) == ("bundle", True, [])
    assert (facts["model"], facts["identity"], facts["graph"]) == ("open_clip:toy", "abc", "snippets")
    assert facts["classes"]["names"] == ["cat", "dog", "traffic light"]
    assert facts["prompts"]["templates"] == ["a photo of a {}"]
    assert facts["thresholds"]["1"] == {"least": 0.4, "most": 0.4, "by_class": False, "how": "best F1"}
    assert facts["thresholds"]["1+3x3"]["least"] == 0.2
    assert facts["thresholds"]["1+3x3"]["most"] == 0.6
    assert facts["preprocessing"] == {**PREPROCESSING.to_json(), "mean": [0.5] * 3, "std": [0.25] * 3}
    assert facts["aggregation"] == {"kind": "cdul", "zeta": 0.3}
    assert (facts["scale"], facts["bias"]) == (100.0, None)
    assert facts["inputs"]["boxes"] == {"type": "float32", "shape": "[B, V, 4]"}
    assert list(facts["engines"]) == ["onnx-fp32", "onnx-fp16", "openvino-bf16"]
    half = facts["engines"]["onnx-fp16"]
    assert (half["runtime"], half["precision"], half["precision_read"]) == ("onnx", "fp16", "fp16")
    assert half["runtime_installed"] is True
    assert half["bytes"] == (graphs / "model.fp16.onnx").stat().st_size
    assert half["parity"]["tolerance"]["largest"] == 0.05
    assert half["details"]["speed"]["views_per_s"] == 31.5
    weights = sum((graphs / f"model.{suffix}").stat().st_size for suffix in ("xml", "bin"))
    assert facts["engines"]["openvino-bf16"]["bytes"] == weights
    assert facts["dropped"] == [
        {"engine": "onnx-int8", "why": "not faster", "parity": {"largest": "nan"}},
    ]
    assert {file["state"] for file in facts["files"].values()} == {"unchanged"}
    assert facts["versions"]["differing"] == {}
    assert "onnx" in facts["installed_runtimes"]["cpu"]


def test_a_damaged_bundle_is_told_file_by_file(bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\xff")
    (bundle / "openvino" / "model.bin").unlink()
    (bundle / "stranger.txt").touch()
    facts = inspect(bundle)
    assert facts["intact"] is False
    assert facts["damage"] == ["model.onnx has changed since it was written", "openvino/model.bin is missing"]
    assert facts["files"]["model.fp16.onnx"]["state"] == "unchanged"
    assert facts["unlisted_files"] == ["stranger.txt"]
    with pytest.raises(ArtifactError):
        Bundle.load(bundle)


def test_an_engine_that_no_hash_vouches_for_is_damage(bundle: Path) -> None:
    manifest = json.loads((bundle / "cliplet.json").read_text())
    del manifest["files"]["model.fp16.onnx"]
    (bundle / "cliplet.json").write_text(json.dumps(manifest))
    assert inspect(bundle)["damage"] == ["model.fp16.onnx of onnx-fp16 is not among the files"]


def test_versions_that_differ_from_those_here(bundle: Path) -> None:
    manifest = json.loads((bundle / "cliplet.json").read_text())
    manifest["versions"] |= {"onnx": "0.1", "tensorrt": "10.0"}
    (bundle / "cliplet.json").write_text(json.dumps(manifest))
    here = library_versions()
    assert inspect(bundle)["versions"]["differing"] == {
        "onnx": {"recorded": "0.1", "installed": here["onnx"]},
        "tensorrt": {"recorded": "10.0", "installed": here.get("tensorrt")},
    }


def test_a_manifest_may_be_named_itself(bundle: Path) -> None:
    assert inspect(bundle / "cliplet.json") == inspect(bundle)


def test_a_graph(graphs: Path) -> None:
    facts = inspect(graphs / "model.onnx")
    assert (facts["kind"], facts["graph"], facts["opset"]) == ("onnx", "snippets", {"ai.onnx": 18})
    assert facts["inputs"]["image"] == {"type": "uint8", "shape": "[B, H, W, 3]"}
    assert facts["outputs"]["scores"] == {"type": "float32", "shape": "[B, 3]"}
    assert facts["metadata"] == {"cliplet": {"classes": ["cat", "dog", "traffic light"]}, "other": "as it is"}
    assert facts["precision"]["read"] == "fp32"
    assert facts["precision"]["lowered"] == {}
    encoder, outside = facts["operators"]["encoder"], facts["operators"]["outside"]
    assert encoder["Conv"] == 1, "the patch embedding"
    assert "Conv" not in outside
    assert outside["Scan"] == 1
    # Counted another way: all nodes, those in bodies too, without constants.
    nodes = list(_all_nodes(onnx.load(graphs / "model.onnx").graph))
    assert facts["operators"]["count"] == sum(node.op_type != "Constant" for node in nodes)
    weights = [numpy_helper.to_array(t) for t in onnx.load(graphs / "model.onnx").graph.initializer]
    assert facts["largest_constants"][0]["bytes"] == max(array.nbytes for array in weights)
    # What is more are the constants of the body.
    assert 0 <= facts["parameters"]["bytes"] - sum(array.nbytes for array in weights) < 1000
    assert facts["parameters"]["by_type"]["float32"]["count"] >= sum(
        a.size for a in weights if a.dtype == "f4"
    )


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _all_nodes(attribute.g)
    return found


def test_where_precision_is_lowered(graphs: Path) -> None:
    facts = inspect(graphs / "model.fp16.onnx")
    plain = inspect(graphs / "model.onnx")
    assert facts["precision"]["read"] == facts["precision"]["noted"] == "fp16"
    # The class token's weights, repeated for each view, lie outside by the path of the pixels.
    assert facts["precision"]["lowered"].get("outside", {}).get("float16", {}).keys() <= {"Expand"}
    low = facts["precision"]["lowered"]["encoder"]["float16"]
    assert low["Conv"] == plain["operators"]["encoder"]["Conv"]
    assert "LayerNormalization" not in low
    before, after = (f["parameters"]["by_type"]["float32"]["count"] for f in (plain, facts))
    assert after + facts["parameters"]["by_type"]["float16"]["count"] == before


def test_a_graph_of_somebody_else(tmp_path: Path) -> None:
    scale = numpy_helper.from_array(np.ones(6, np.float32), "scale")
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["y"]),
        helper.make_node("Special", ["y"], ["z"], domain="their.own"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 6]) for n in ("x", "z")]
    graph = helper.make_graph(nodes, "theirs", values[:1], values[1:], [scale])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("their.own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "theirs.onnx")
    facts = inspect(tmp_path / "theirs.onnx")
    assert (facts["graph"], facts["precision"]["read"]) == (None, None)
    assert "no encoder" in facts["precision"]["unread_because"]
    assert facts["operators"]["outside"] == {"Mul": 1, "their.own:Special": 1}


def test_weights_beside_a_graph(graphs: Path, tmp_path: Path) -> None:
    file, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    onnx.save(
        onnx.load(graphs / "model.onnx"),
        file,
        save_as_external_data=True,
        location=weights.name,
        size_threshold=0,
    )
    facts = inspect(file)
    assert facts["intact"]
    assert facts["parameters"] == inspect(graphs / "model.onnx")["parameters"]
    held = facts["external_data"][weights.name]
    assert held["bytes"] == held["needed_bytes"] == weights.stat().st_size
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(ArtifactError, match="cut short"):
        inspect(file)
    weights.unlink()
    facts = inspect(file)
    assert (facts["intact"], facts["damage"]) == (False, [f"{weights.name} is missing"])


def test_an_ir_says_what_its_graph_says(graphs: Path, tmp_path: Path) -> None:
    facts, source = inspect(graphs / "model.xml"), inspect(graphs / "model.onnx")
    assert (facts["kind"], facts["graph"]) == ("openvino", "snippets")
    assert facts["inputs"]["image"] == {"type": "uint8", "shape": "[?, ?, ?, 3]"}
    assert facts["outputs"]["scores"] == {"type": "float32", "shape": "[?, 3]"}
    assert facts["precision"] == {"read": "fp32", "lowered": {}}
    assert facts["operators"]["encoder"]["Convolution"] == 1
    assert facts["operators"]["outside"]["TensorIterator"] == 1
    assert facts["parameters"]["bytes"] == pytest.approx(source["parameters"]["bytes"], rel=0.05)
    assert facts["largest_constants"][0]["bytes"] == source["largest_constants"][0]["bytes"]
    shutil.copy(graphs / "model.xml", tmp_path)
    alone = inspect(tmp_path / "model.xml")
    assert (alone["intact"], alone["damage"]) == (False, ["model.bin is missing"])
    (tmp_path / "model.bin").write_bytes((graphs / "model.bin").read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cut short"):
        inspect(tmp_path / "model.xml")


def _layer(number: int, kind: str, of: str, precision: str, name: str = "", data: str = "") -> str:
    """A layer with one output; `of` are the numbers of the layers that it reads."""
    reads = "".join(f'<port id="{i}" precision="FP32"/>' for i in range(len(of.split())))
    gives = f'<port id="9" precision="{precision}" names="{name}"><dim>-1</dim><dim>6</dim></port>'
    output = "" if kind == "Result" else f"<output>{gives}</output>"
    return f'<layer id="{number}" name="n{number}" type="{kind}">{data}<input>{reads}</input>{output}</layer>'


def test_a_quantised_ir(tmp_path: Path) -> None:
    layers: list[tuple[str, str, str, str, str]] = [
        ("Parameter", "", "FP32", "x", ""),
        ("ReLU", "0", "FP32", "pixels", ""),
        ("Const", "", "I8", "w", '<data element_type="i8" shape="6, 4" offset="0" size="24"/>'),
        ("Convert", "2", "FP32", "", ""),
        ("Const", "", "FP32", "s", '<data element_type="f32" shape="" offset="24" size="4"/>'),
        ("Multiply", "3 4", "FP32", "", ""),
        ("FakeQuantize", "1 4 4 4 4", "FP32", "", ""),
        ("MatMul", "6 5", "FP32", "features,same", ""),
        ("SoftMax", "7", "FP32", "probabilities", ""),
        ("Result", "8", "FP32", "", ""),
    ]
    written = "".join(
        _layer(number, kind, of, precision, name, data)
        for number, (kind, of, precision, name, data) in enumerate(layers)
    )
    edges = "".join(
        f'<edge from-layer="{start}" from-port="9" to-layer="{end}" to-port="{port}"/>'
        for end, (_, of, *_) in enumerate(layers)
        for port, start in enumerate(of.split())
    )
    net = f'<net name="n" version="11"><layers>{written}</layers><edges>{edges}</edges></net>'
    (tmp_path / "model.xml").write_text(net)
    (tmp_path / "model.bin").write_bytes(bytes(28))
    facts = inspect(tmp_path / "model.xml")
    assert facts["precision"]["read"] == "int8"
    assert facts["operators"] == {
        "count": 6,
        "encoder": {"FakeQuantize": 1, "MatMul": 1},
        "outside": {"ReLU": 1, "SoftMax": 1},
        "on_constants": {"Convert": 1, "Multiply": 1},
    }
    assert facts["parameters"]["by_type"] == {
        "float32": {"tensors": 1, "count": 1, "bytes": 4},
        "int8": {"tensors": 1, "count": 24, "bytes": 24},
    }
    assert facts["outputs"] == {"probabilities": {"type": "float32", "shape": "[?, 6]"}}
    assert facts["graph"] is None


def test_an_engine(plan: Path) -> None:
    facts = inspect(plan)
    assert (facts["kind"], facts["intact"], facts["plan_matches_sha256"]) == ("tensorrt", True, True)
    assert (facts["bytes"], facts["target"], facts["read_from"]) == (40, "sm89", "builder")
    assert facts["profile"]["batch"] == [1, 4, 8]
    plan.write_bytes(b"other")
    changed = inspect(plan)
    assert (changed["intact"], changed["plan_matches_sha256"]) == (False, False)


def test_an_engine_without_its_side_car(plan: Path) -> None:
    sidecar_path(plan).unlink()
    with pytest.raises(ArtifactError, match="cliplet export") as refused:
        inspect(plan)
    assert "--runtime tensorrt" in refused.value.fix


def test_a_classifier(classifier: Path) -> None:
    facts = inspect(classifier)
    assert (facts["kind"], facts["intact"], facts["trunk"]) == ("classifier", True, "test_resnet")
    assert facts["classes"]["count"] == 3
    assert (facts["recipe"], facts["measured"]) == ({"epochs": 4}, {"held_out_map": 78.1})
    vocabulary = read_vocabulary(CLASSES)
    config = ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=PREPROCESSING)
    state = Classifier(config, vocabulary).state_dict()
    assert facts["parameters"]["count"] == sum(tensor.numel() for tensor in state.values())
    assert facts["parameters"]["bytes"] == sum(t.numel() * t.element_size() for t in state.values())
    assert facts["thresholds"] == {}
    (classifier / "thresholds.json").write_text(json.dumps(THRESHOLDS["1+3x3"]))
    found = inspect(classifier)["thresholds"]
    assert found == {"least": 0.2, "most": 0.6, "by_class": True, "how": "class by class"}


def test_a_classifier_with_other_weights(classifier: Path) -> None:
    (weights,) = classifier.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    facts = inspect(classifier)
    assert (facts["intact"], facts["weights"]["matches_sha256"]) == (False, False)
    weights.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        inspect(classifier)


def test_labels(labels: Path) -> None:
    facts = inspect(labels)
    assert (facts["kind"], facts["intact"]) == ("labels", True)
    counted = {name: facts[name] for name in ("rows", "failed", "untagged", "labels", "inputs", "waiting")}
    assert counted == {"rows": 3, "failed": 1, "untagged": 1, "labels": 3, "inputs": 5, "waiting": 1}
    assert facts["finished"] is False
    assert facts["images_per_class"] == {"cat": 1, "dog": 0, "traffic light": 2}
    assert facts["errors"] == {"decode: cut short": 1}
    assert facts["thresholds"] == {"least": 0.2, "most": 0.6, "how": "calibrated"}
    assert (facts["parts"], facts["engine_seconds"]) == (2, 0.75)
    (labels.parent / "images" / "4.jpg").unlink()
    assert inspect(labels)["finished"] is True


def test_labels_whose_images_are_gone(labels: Path) -> None:
    shutil.rmtree(labels.parent / "images")
    facts = inspect(labels)
    assert facts["finished"] is None
    assert "does not exist" in facts["unfinished_because"]
    run = json.loads((labels / "run.json").read_text())
    run["fingerprint"]["cwd"] = "/elsewhere"
    (labels / "run.json").write_text(json.dumps(run))
    assert "/elsewhere" in inspect(labels)["unfinished_because"]


def test_labels_that_their_job_does_not_name(labels: Path) -> None:
    run = json.loads((labels / "run.json").read_text())
    run["classes"] = ["cat", "dog", "bus"]
    (labels / "run.json").write_text(json.dumps(run))
    facts = inspect(labels)
    assert facts["damage"] == ["rows carry 'traffic light', which run.json does not name"]


def _empty(folder: Path) -> Path:
    return folder


def _missing(folder: Path) -> Path:
    return folder / "nothing"


def _bank(folder: Path) -> Path:
    (folder / "bank.json").write_text("{}")
    return folder


def _training(folder: Path) -> Path:
    (folder / "run.json").write_text(json.dumps({"schema": 4, "recipe": {}, "data": {}}))
    return folder


def _other_file(folder: Path) -> Path:
    (folder / "photo.jpg").touch()
    return folder / "photo.jpg"


def _weights_alone(folder: Path) -> Path:
    (folder / "model.bin").touch()
    (folder / "model.xml").touch()
    return folder / "model.bin"


def _old_bundle(folder: Path) -> Path:
    (folder / "cliplet.json").write_text('{"schema": 1}')
    return folder


def _list_for_manifest(folder: Path) -> Path:
    (folder / "cliplet.json").write_text("[1]")
    return folder


def _list_for_sidecar(folder: Path) -> Path:
    plan = _plan(folder)
    sidecar_path(plan).write_text("[1]")
    return plan


def _other_xml(folder: Path) -> Path:
    (folder / "page.xml").write_text("<page><title/></page>")
    return folder / "page.xml"


def _template_without_a_place(folder: Path) -> Path:
    details = json.loads((_classifier(folder, read_vocabulary(CLASSES)) / "classifier.json").read_text())
    details["vocabulary"]["templates"] = ["a photo"]
    (folder / "classifier" / "classifier.json").write_text(json.dumps(details))
    return folder / "classifier"


def _text_for_graph(folder: Path) -> Path:
    (folder / "model.onnx").write_text("not a graph")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (_missing, UsageError, "nothing at"),
        (_empty, DataError, r"holds no cliplet\.json, classifier\.json, trunk\.json, run\.json"),
        (_bank, DataError, "label bank"),
        (_training, DataError, "training run"),
        (_other_file, DataError, r"\.onnx, \.xml"),
        (_weights_alone, DataError, r"cliplet inspect .*model\.xml"),
        (_old_bundle, ArtifactError, "schema 1"),
        (_list_for_manifest, ArtifactError, "JSON list"),
        (_list_for_sidecar, ArtifactError, "side-car"),
        (_template_without_a_place, ArtifactError, "templates"),
        (_other_xml, ArtifactError, "no layers"),
        (_text_for_graph, ArtifactError, "cannot read"),
    ],
)
def test_what_cannot_be_inspected(
    make: Callable[[Path], Path], error: type[ClipletError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says) as refused:
        inspect(make(tmp_path))
    assert refused.value.expected


# What is named, and the file of it that is damaged.
PLACES = {
    "bundle": ("bundle", "bundle/cliplet.json"),
    "graph": ("graph/model.onnx", "graph/model.onnx"),
    "half": ("graph/model.fp16.onnx", "graph/model.fp16.onnx"),
    "ir": ("graph/model.xml", "graph/model.xml"),
    "side-car": ("sm89-1.7-fp16.plan", "sm89-1.7-fp16.json"),
    "classifier": ("classifier", "classifier/classifier.json"),
    "weights": ("classifier", "classifier/*.safetensors"),
    "run": ("labels", "labels/run.json"),
    "part": ("labels", "labels/labels/part-000000.parquet"),
    "errors": ("labels", "labels/errors.parquet"),
}


@pytest.fixture(scope="module")
def zoo(graphs: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind."""
    folder = tmp_path_factory.mktemp("zoo")
    shutil.copytree(graphs, folder / "graph")
    for make in (_classifier, _labels):
        make(folder, vocabulary)
    _bundle(folder, graphs, vocabulary)
    _plan(folder)
    return folder


def _with(zoo: Path, kind: str, change: Callable[[bytes], bytes]) -> dict[str, Any]:
    """The facts while a file is another."""
    named, damaged = PLACES[kind]
    (file,) = zoo.glob(damaged)
    whole = file.read_bytes()
    try:
        file.write_bytes(change(whole))
        return inspect(zoo / named)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", PLACES)
def test_whatever_is_cut_short_is_refused(kind: str, zoo: Path) -> None:
    (file,) = zoo.glob(PLACES[kind][1])
    whole = file.read_bytes()
    end = len(whole.rstrip()) if file.suffix in (".json", ".xml") else len(whole)
    if file.suffix == ".onnx":
        # Metadata stand at the very end, and a graph without them is one.
        model = onnx.load_from_string(whole)
        del model.metadata_props[:]
        end = model.ByteSize()
    places = random.Random(0)
    for cut in [0, 1, end // 2, end - 1, *(places.randrange(end) for _ in range(12))]:
        with pytest.raises((DataError, ArtifactError)) as refused:
            _with(zoo, kind, lambda data, cut=cut: data[:cut])  # type: ignore[misc]
        assert refused.value.expected, f"cut after {cut} bytes"
    assert inspect(zoo / PLACES[kind][0])["kind"], "whole again"


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(list(PLACES)),
    where=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
    byte=st.integers(0, 255),
)
def test_damage_anywhere_is_an_error_or_a_fact(zoo: Path, kind: str, where: list[float], byte: int) -> None:
    def damaged(data: bytes) -> bytes:
        changed = bytearray(data)
        for place in where:
            changed[int(place * len(changed))] = byte
        return bytes(changed)

    try:
        facts = _with(zoo, kind, damaged)
    except (DataError, ArtifactError) as error:
        assert str(error)
    else:
        json.dumps(facts, allow_nan=False)
        assert all(len(line.splitlines()) == 1 for line in lines(facts))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(facts=st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
def test_each_fact_has_one_line_with_a_key_of_its_own(facts: dict[str, Any]) -> None:
    found = lines(facts)
    assert all(len(line.splitlines()) == 1 and line.strip() for line in found)
    assert len(set(found)) == len(found)
    assert len(found) == _leaves(facts)


def _leaves(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_leaves(item) for item in value.values())
    if isinstance(value, list):
        numbers = bool(value) and all(type(item) is int for item in value)
        return 1 if numbers else sum(_leaves(item) for item in value)
    return 1


def test_how_a_line_looks() -> None:
    facts = {
        "a": {"b-c": 1, "1+3x3": 0.25, "tv monitor": True, "model.onnx": None},
        "names": ["cat", "two\nlines", "", " spaced", "é {}"],
        "numbers": [1, 2.5],
        "rows": [{"x": 1}],
        "empty": {},
        "none": [],
    }
    assert lines(facts) == [
        "a.b-c 1",
        "a.1+3x3 0.25",
        'a."tv monitor" true',
        'a."model.onnx" null',
        "names.0 cat",
        'names.1 "two\\nlines"',
        'names.2 ""',
        'names.3 " spaced"',
        "names.4 é {}",
        "numbers 1, 2.5",
        "rows.0.x 1",
    ]


def test_labels_are_inspected_without_torch_or_onnx(labels: Path, classifier: Path, bundle: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cliplet.export.inspection import inspect\n"
        "for path in sys.argv[1:]: inspect(Path(path))\n"
        "print([name for name in ('torch', 'onnx', 'openvino') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, *map(str, (labels, classifier, bundle))]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.strip() == "[]"

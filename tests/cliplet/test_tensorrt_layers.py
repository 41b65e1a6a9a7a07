"""Precision as it is seen in a typed network and in a finished engine's list of layers."""

from __future__ import annotations

import json

from toy_engine import engine_layer

from cliplet.tensorrt_layers import (
    computes_in,
    engine_products,
    layers_of_builder,
    layers_of_inspector,
    summary,
)

# As `tensorrt_rtx` 1.7 writes it: types in a field of their own, and factors that stay in float32.
BUILDER = """Layers:
Name: a, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,3], Datatype: Half, Format: (Linear) Row major }], \
Constants: [ { Name: alpha, Dimensions: [1], Datatype: Float, Format: (Linear) Row major }], \
Outputs: [ { Name: y, Dimensions: [-1,3], Datatype: Half, Format: (Linear) Row major }], Metadata: [ONNX Layer: one]
Name: b, LayerType: gemm, Inputs: [ { Name: x, Datatype: Float }], Constants: [ { Name: w, Datatype: Int8 }], \
Outputs: [ { Name: y, Datatype: Float }], Metadata: [ONNX Layer: two][ONNX Layer: relu]
Name: c, LayerType: kgen, Inputs: [ { Name: x, Datatype: BFloat16 }], Constants: [], \
Outputs: [ { Name: y, Datatype: Float }], Metadata: [ONNX Layer: three][ONNX Layer: four]
Name: d, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
"""


def test_the_builders_list() -> None:
    layers = layers_of_builder(BUILDER)
    assert len(layers) == 4
    # Three and four are in one layer, whose inside is not seen; `relu` is no product.
    assert engine_products(layers, ["one", "two", "three", "four"]) == {"one": "fp16", "two": "fp32"}
    assert engine_products(layers, ["three"]) == {"three": "bf16"}
    assert engine_products(layers_of_builder(""), ["one"]) == {}


def test_the_inspectors_list() -> None:
    listed = [engine_layer(kind, kind) for kind in ("Half", "Float", "BFloat16", "Int8", "Int32")]
    older = {"Inputs": [{"Format/Datatype": "Row major linear FP16 format"}], "Metadata": "[ONNX Layer: old]"}
    text = json.dumps({"Layers": [*listed, older, "a layer without details"], "Bindings": []})
    nodes = ["Half", "Float", "BFloat16", "Int8", "Int32", "old"]
    assert engine_products(layers_of_inspector(text), nodes) == {
        "Half": "fp16",
        "Float": "fp32",
        "BFloat16": "bf16",
        "Int8": "int8",
        "old": "fp16",
    }


def test_a_product_is_of_its_lowest_type() -> None:
    layer = engine_layer("Float") | {"Inputs": [{"Datatype": "Int8"}]}
    text = json.dumps({"Layers": [layer]})
    assert engine_products(layers_of_inspector(text), ["product"]) == {"product": "int8"}


def test_summaries() -> None:
    assert summary({"a": "fp16", "b": "fp16"}) == ("fp16", {"fp16": 2})
    assert summary({"a": "fp32", "b": "int8", "c": "fp32"}) == ("fp32+int8", {"int8": 1, "fp32": 2})
    assert summary({}) == ("", {})


def test_float32_is_all_of_it() -> None:
    assert computes_in("fp32", "fp32") and computes_in("int8", "fp32+int8")
    assert not computes_in("fp32", "fp16+fp32")
    assert not computes_in("fp16", "bf16") and not computes_in("fp16", "")

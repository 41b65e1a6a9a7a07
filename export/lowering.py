"""The pass that moves an encoder's nodes into a low type: which of them, and the casts between them and the rest.

In float32 stay, inside of the encoder:

- normalisations, softmax, sums and means, and functions that lose or overflow when their argument is rounded;
- elementwise arithmetic on results of the last two, up to the next matrix product, and arithmetic that only
  prepares an argument of any: 1 + erf(x) of a GELU cancels, and x - mean(x) of a norm does too;
- what only moves results of any;
- operators that ONNX does not define for the low type, and those that read a constant which it cannot hold.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cliplet.contract import FEATURES, PIXELS
from cliplet.errors import ArtifactError

from .encoder import ancestors, captured, encoder_nodes, set_nodes, subgraphs, tensor_types

log = logging.getLogger("cliplet")

# A constant fits if rounding changes it by no more than this share of its norm: far above what rounding to 8 bits
# of mantissa does (0.2 %), far below what overflow and underflow do.
_FITS = 0.01

_NORMALISATIONS = frozenset(
    "BatchNormalization GroupNormalization InstanceNormalization LRN LayerNormalization LogSoftmax LpNormalization "
    "MeanVarianceNormalization RMSNormalization Softmax".split()
)
_SUMS = frozenset(
    "CumSum GlobalAveragePool GlobalLpPool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd "
    "ReduceSum ReduceSumSquare".split()
)
_SENSITIVE = frozenset("Erf Exp Gelu Log Pow Reciprocal Softplus Sqrt Tanh".split())
_ARITHMETIC = frozenset("Abs Add Clip Div Max Min Mul Neg Sub".split())
_MOVES = frozenset(
    "Concat Expand Flatten Gather Identity Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split()
)
# They read any type, and their result does not depend on it.
_TYPELESS = frozenset("Cast Shape Size".split())


class Lowering:
    """Rewrites a float32 model in place.

    Raises:
        ArtifactError: the graph has no encoder, or is not in float32.
    """

    def __init__(self, model: ModelProto, low_type: int, suffix: str) -> None:
        self._model = model
        self._low_type = low_type
        self._suffix = suffix
        self._types = tensor_types(model)
        if {TensorProto.FLOAT16, TensorProto.BFLOAT16}.intersection(self._types.values()):
            raise ArtifactError("the graph is in low precision already", "the graph in float32")
        self._constants = {t.name: t for t in model.graph.initializer}
        # Tensors that others than the main graph's nodes know by name: they stay float32.
        self._fixed = {FEATURES, *(v.name for v in model.graph.output)}
        for node in model.graph.node:
            self._fixed.update(captured(node))
        # Names under which a tensor of the source is there in float32, and in the low type.
        self._in_float: dict[str, str] = {}
        self._in_low: dict[str, str] = {}
        self._written: list[NodeProto] = []
        self._fitting: dict[str, bool] = {}

    def run(self) -> None:
        region = self._region()
        kept = self._kept(region)
        for node, inside, keep in zip(self._model.graph.node, region, kept, strict=True):
            self._write(node, low=inside and not keep)
        set_nodes(self._model, self._written)
        self._drop_unused_constants()
        del self._model.graph.value_info[:]

    def _region(self) -> list[bool]:
        """For each node whether it is of the encoder, or prepares constants for it alone."""
        graph = self._model.graph
        region = encoder_nodes(graph)
        before = ancestors(graph, PIXELS)
        users = self._users()
        for i in reversed(range(len(region))):
            node = graph.node[i]
            used_by = [user for name in node.output for user in users.get(name, ())]
            alone = not self._fixed.union(before).intersection(node.output)
            region[i] |= alone and bool(used_by) and all(region[user] for user in used_by)
        return region

    def _kept(self, region: Sequence[bool]) -> list[bool]:
        """For each node whether it stays in float32 although it may be of the region."""
        nodes = list(self._model.graph.node)
        kept = [inside and self._must_keep(node) for node, inside in zip(nodes, region, strict=True)]
        users = self._users()
        losing = _SUMS | _SENSITIVE
        island: set[str] = set()
        for i, node in enumerate(nodes):
            if region[i] and (
                node.op_type in losing or (node.op_type in _ARITHMETIC and island.intersection(node.input))
            ):
                kept[i] = True
                island.update(node.output)
        for i in reversed(range(len(nodes))):
            if region[i] and nodes[i].op_type in _ARITHMETIC:
                kept[i] |= self._only_for(nodes[i], users, kept)
        self._keep_moves(kept, region)
        return kept

    def _keep_moves(self, kept: list[bool], region: Sequence[bool]) -> None:
        """What only moves the results of kept nodes is kept too: the cast follows, if a low node needs it.

        The other order (normalise, cast, transpose, multiply) crashes onnxruntime 1.31 on a CPU without fp16.
        """
        from_kept: set[str] = set()
        for i, node in enumerate(self._model.graph.node):
            if region[i] and node.op_type in _MOVES:
                moved = [n for n in node.input if self._is_float(n) and n not in self._constants]
                kept[i] |= bool(moved) and from_kept.issuperset(moved)
            if kept[i]:
                from_kept.update(node.output)

    def _only_for(self, node: NodeProto, users: dict[str, list[int]], kept: Sequence[bool]) -> bool:
        """Whether all that depends on the values of a node's result is in `kept`."""
        nodes = self._model.graph.node
        used_by = [
            u for name in node.output for u in users.get(name, ()) if nodes[u].op_type not in _TYPELESS
        ]
        return bool(used_by) and all(kept[u] for u in used_by)

    def _must_keep(self, node: NodeProto) -> bool:
        floats = [name for name in node.input if self._is_float(name)]
        makes_floats = node.op_type == "Cast" and self._is_float(node.output[0])
        if node.op_type in _NORMALISATIONS | _SUMS | _SENSITIVE or subgraphs(node):
            return True
        return not (floats or makes_floats) or not self._defined(node) or not all(map(self._fits, floats))

    def _defined(self, node: NodeProto) -> bool:
        """Whether ONNX defines the operator with the low type in place of float32."""
        version = next(o.version for o in self._model.opset_import if o.domain == node.domain)
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        wanted = f"tensor({TensorProto.DataType.Name(self._low_type).lower()})"
        for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for i, name in enumerate(names):
                symbol = formal[min(i, len(formal) - 1)].type_str
                if self._is_float(name) and wanted not in allowed.get(symbol, [symbol]):
                    return False
        return True

    def _fits(self, name: str) -> bool:
        """Whether the low type can hold a constant; said once if not."""
        if name not in self._constants:
            return True
        if name not in self._fitting:
            values = numpy_helper.to_array(self._constants[name])
            # In float64, in which the squares of a norm do not overflow.
            values = values[np.isfinite(values)].astype(np.float64)
            with np.errstate(over="ignore"):
                rounded = values.astype(self._low_dtype()).astype(np.float64)
            self._fitting[name] = bool(np.linalg.norm(values - rounded) <= _FITS * np.linalg.norm(values))
            if not self._fitting[name]:
                log.warning("%s stays in float32: %s does not hold its values", name, self._suffix)
        return self._fitting[name]

    def _write(self, node: NodeProto, low: bool) -> None:
        written = NodeProto()
        written.CopyFrom(node)
        for i, name in enumerate(node.input):
            if self._is_float(name):
                written.input[i] = self._input(name, node, low)
        if low and node.op_type == "Cast" and self._is_float(node.output[0]):
            del written.attribute[:]
            if self._is_float(node.input[0]):
                # It did nothing in the source either.
                written.op_type = "Identity"
                written.input[0] = self._low(node.input[0])
            else:
                written.attribute.append(helper.make_attribute("to", self._low_type))
        self._written.append(written)
        for i, name in enumerate(node.output):
            if low and self._is_float(name):
                self._in_low[name] = f"{name}_{self._suffix}" if name in self._fixed else name
                written.output[i] = self._in_low[name]
                if name in self._fixed:
                    self._float(name, name)
            else:
                self._in_float[name] = name

    def _input(self, name: str, node: NodeProto, low: bool) -> str:
        if node.op_type in _TYPELESS:
            return self._in_float.get(name) or self._in_low.get(name, name)
        return self._low(name) if low else self._float(name)

    def _float(self, name: str, cast_name: str = "") -> str:
        """The name of a tensor in float32; it is cast if it is low."""
        if name not in self._in_low:
            return name
        if name not in self._in_float:
            self._in_float[name] = cast_name or f"{name}_fp32"
            self._cast(self._in_low[name], self._in_float[name], TensorProto.FLOAT)
        return self._in_float[name]

    def _low(self, name: str) -> str:
        """The name of a tensor in the low type; it is cast if it is float32."""
        if name not in self._in_low:
            self._in_low[name] = f"{name}_{self._suffix}"
            self._in_float.setdefault(name, name)
            if name in self._constants:
                values = numpy_helper.to_array(self._constants[name]).astype(self._low_dtype())
                self._model.graph.initializer.append(numpy_helper.from_array(values, self._in_low[name]))
            else:
                self._cast(name, self._in_low[name], self._low_type)
        return self._in_low[name]

    def _cast(self, source: str, target: str, to: int) -> None:
        self._written.append(helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to))

    def _drop_unused_constants(self) -> None:
        graph = self._model.graph
        used = {name for node in graph.node for name in (*node.input, *captured(node))}
        unused = {name for name in self._in_low if name in self._constants and name not in used}
        kept = [t for t in graph.initializer if t.name not in unused]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _users(self) -> dict[str, list[int]]:
        users: dict[str, list[int]] = {}
        for i, node in enumerate(self._model.graph.node):
            for name in node.input:
                users.setdefault(name, []).append(i)
        return users

    def _is_float(self, name: str) -> bool:
        return self._types.get(name) == TensorProto.FLOAT

    def _low_dtype(self) -> np.dtype:
        return helper.tensor_dtype_to_np_dtype(self._low_type)

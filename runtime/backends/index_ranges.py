"""Which integers does a program use as indices, and into how many rows?  Read from the graph, not from anybody's word.

Backends answer an index out of range with an exception, a dead process, NaN or foreign memory; so the range becomes
part of the contract where the graph tells it.  Only operators that leave values as they are lie between an input and
the lookup; where arithmetic comes first, no range is derived.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import ModelProto
from torch.export import ExportedProgram

PASSING = frozenset(
    [
        "aten._assert_tensor_metadata.default",
        "aten._to_copy.default",
        "aten._unsafe_view.default",
        "aten.alias.default",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.detach.default",
        "aten.expand.default",
        "aten.flatten.using_ints",
        "aten.permute.default",
        "aten.reshape.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.t.default",
        "aten.to.device",
        "aten.to.dtype",
        "aten.transpose.int",
        "aten.unsqueeze.default",
        "aten.view.default",
    ]
)
"""Operators whose output holds no value that their first input does not hold."""
LOOKUPS: Mapping[str, tuple[int | None, int]] = {
    "aten.embedding.default": (0, 1),
    "aten.index_select.default": (None, 2),
    "aten.gather.default": (None, 2),
}
"""Operator -> (axis of its first argument, None where the second argument says; place of the indices)."""
ONNX_PASSING = frozenset(
    {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Cast", "Expand"}
)
ONNX_LOOKUPS = frozenset({"Gather", "GatherElements"})


def index_ranges(exported: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Find inclusive index ranges of user inputs of an exported program, by name."""
    origin: dict[str, str] = {str(name): str(name) for name in exported.graph_signature.user_inputs}
    found: dict[str, tuple[int, int]] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        target = str(node.target)
        if target in PASSING and node.args:
            source = origin.get(str(node.args[0]))
            if source is not None:
                origin[node.name] = source
        elif target in LOOKUPS:
            axis, indices = LOOKUPS[target]
            rows = _rows(node, node.args[1] if axis is None else axis)
            _narrow(found, origin.get(str(node.args[indices])), rows, negative=False)
        elif target == "aten.index.Tensor":
            for place, index in enumerate(node.args[1]):
                if index is not None:
                    _narrow(found, origin.get(str(index)), _rows(node, place), negative=True)
    return found


def onnx_index_ranges(model: ModelProto) -> dict[str, tuple[int, int]]:
    """Find inclusive index ranges of an ONNX graph's inputs, by name; ONNX counts negative indices from the end."""
    origin = {value.name: value.name for value in model.graph.input}
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found: dict[str, tuple[int, int]] = {}
    for node in model.graph.node:
        if node.op_type in ONNX_PASSING and node.input and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type in ONNX_LOOKUPS and node.input[0] in shapes:
            shape = shapes[node.input[0]]
            axis = next((onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name == "axis"), 0)
            _narrow(found, origin.get(node.input[1]), shape[int(axis)] if shape else None, negative=True)
    return found


def _rows(node: Any, axis: int) -> int | None:
    size = node.args[0].meta["val"].shape[axis]
    return size if isinstance(size, int) else None


def _narrow(found: dict[str, tuple[int, int]], name: str | None, rows: int | None, *, negative: bool) -> None:
    if name is None or not rows:
        return
    low, high = (-rows if negative else 0), rows - 1
    before = found.get(name, (low, high))
    found[name] = (max(low, before[0]), min(high, before[1]))

"""How many bytes pass from one execution provider to another?  Estimated from inferred shapes, at a stated size."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from runtime.backends.lowering import unknown

STATED = {"B": 8, "T": 1, "S": 128, "P": 1024}
"""Sizes at which transfers are estimated: eight rows that decode one token each over 128 cached ones."""


def sized_edges(model: onnx.ModelProto, edges: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Add to each edge its bytes at the stated sizes; unknown with a reason where ONNX infers no shape."""
    if not edges:
        return []
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError:
        inferred = model  # what the graph itself says of its shapes is left
    values = {value.name: value for value in (*inferred.graph.value_info, *inferred.graph.input)}
    return [{**edge, "bytes": _bytes(values.get(edge["tensor"]))} for edge in edges]


def copy_estimate(edges: Sequence[Mapping[str, Any]]) -> int | dict[str, Any]:
    """Add the edges up; 0 where nothing crosses, unknown where any edge's size is."""
    if not edges:
        return 0
    sizes = [edge["bytes"] for edge in edges]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        return unknown(f"{len(sizes) - len(known)} of {len(sizes)} crossing tensors have no inferred shape")
    return {"bytes": sum(known), "at": dict(STATED)}


def _bytes(value: onnx.ValueInfoProto | None) -> int | dict[str, str]:
    if value is None or not value.type.tensor_type.HasField("shape"):
        return unknown("ONNX infers no shape for this tensor")
    kind = value.type.tensor_type.elem_type
    if kind in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return unknown("its elements have no fixed size")
    total = int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
    for dimension in value.type.tensor_type.shape.dim:
        size = dimension.dim_value if dimension.HasField("dim_value") else _size(dimension.dim_param)
        if size is None:
            return unknown(f"the size of its dimension {dimension.dim_param or '?'} is not known")
        total *= size
    return total


def _size(text: str) -> int | None:
    """Evaluate a dimension such as `B`, `2*P` or `S + T` at the stated sizes; None where it holds anything else."""
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name) if name in STATED:
            return STATED[name]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case _:
            raise ValueError("not a size")

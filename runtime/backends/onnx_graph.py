"""What does an ONNX graph say of its dimensions, and does it still say what was declared?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx
from torch.export import ExportedProgram

from runtime.backends import program as programs
from runtime.backends.contract import Bounds
from runtime.backends.errors import BuildFailed
from runtime.backends.inventory import without_schema

RANGE = "replaylab.range."
SOURCE = "replaylab.source"
EXPECTED = {
    "token_ids": ["B", "T"],
    "positions": ["B", "T"],
    "slots": ["B", "S"],
    "context_lengths": ["B"],
}


def prepare_model(exported: Any, program: ExportedProgram, *, source: str) -> onnx.ModelProto:
    """Give symbols their declared names, and write bounds and source into the metadata: ONNX itself holds no bounds."""
    model: onnx.ModelProto = exported.model_proto
    names = programs.symbol_names(program)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(
                    r"\bs\d+\b", lambda match: names.get(match.group(), "P"), dimension.dim_param
                )
    metadata = {f"{RANGE}{name}": f"{low},{high}" for name, (low, high) in programs.ranges(program).items()}
    for key, text in {**metadata, SOURCE: source}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
    return model


def check_model(model: onnx.ModelProto) -> None:
    """Run the full checker and strict shape inference; `BuildFailed` of stage 2 where either refuses."""
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    except Exception as error:  # ValidationError and InferenceError share no base
        raise BuildFailed(
            f"the ONNX graph is not valid: {str(error).splitlines()[0][:300]}",
            fix="export the model again",
            evidence={"validation_output": str(error)[:1000], "exception": type(error).__name__},
            stage="a02",
        ) from error


def dimensions(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Read the symbolic shape of every input."""
    return {
        value.name: [entry.dim_param or str(entry.dim_value) for entry in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }


def signature(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Describe inputs and outputs: element type and symbolic shape."""
    described: dict[str, dict[str, Any]] = {}
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        shape = [entry.dim_param or str(entry.dim_value) for entry in tensor.shape.dim]
        described[value.name] = {"dtype": kind, "shape": shape}
    return described


def check_dimensions(model: onnx.ModelProto, bounds: Bounds, *, stage: str) -> None:
    """Refuse a graph that lost a dynamic dimension, a relation between dimensions, or the recorded bounds."""
    found = dimensions(model)
    kept: dict[str, list[int]] = {}
    for entry in model.metadata_props:
        if entry.key.startswith(RANGE):
            low, high = entry.value.split(",")
            kept[entry.key.removeprefix(RANGE)] = [int(low), int(high)]
    lost = {name: found.get(name) for name, shape in EXPECTED.items() if found.get(name) != shape}
    if lost:
        kept = {}
    programs.check_conserved(kept, bounds, stage=stage, where=f"the ONNX graph ({lost or 'bounds'})")


def crossing_edges(model: onnx.ModelProto, owners: Mapping[str, str]) -> list[dict[str, str]]:
    """List the tensors that pass from one provider's node to another's."""
    made = {output: node.name for node in model.graph.node for output in node.output}
    edges: list[dict[str, str]] = []
    for node in model.graph.node:
        for name in node.input:
            source = owners.get(made.get(name, ""))
            sink = owners.get(node.name)
            if source and sink and source != sink:
                edges.append({"tensor": name, "from": source, "to": sink})
    return edges


def unsupported(model: onnx.ModelProto) -> list[str]:
    """Name the operators that neither ONNX nor the model's own functions define."""
    used = {(node.domain, node.op_type) for node in model.graph.node}
    return without_schema(used, functions={(one.domain, one.name) for one in model.functions})


def initializer_bytes(model: onnx.ModelProto) -> int:
    """Add up the bytes of weights and constants stored in the graph."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)

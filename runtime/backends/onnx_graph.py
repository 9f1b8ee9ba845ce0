"""What does an ONNX graph say of its dimensions, and does it still say what was declared?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from runtime.backends import program as programs
from runtime.backends.errors import BuildFailed, InputRefused
from runtime.backends.inventory import without_schema
from runtime.backends.program import CapturedProgram

RANGE = "replaylab.range."
SOURCE = "replaylab.source"


def prepare_model(exported: Any, program: CapturedProgram) -> onnx.ModelProto:
    """Give symbols their declared names, and write bounds and source into the metadata: ONNX itself holds no bounds."""
    model: onnx.ModelProto = exported.model_proto
    names, free = {text: name for text, name in program.names.items() if name in program.declared}, program.free
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(
                    r"\bs\d+\b", lambda match: names.get(match.group(), free or match.group()), dimension.dim_param
                )
    annotate(model, programs.ranges(program), source=program.digest)
    return model


def annotate(model: onnx.ModelProto, ranges: Mapping[str, Sequence[int | None]], *, source: str) -> None:
    """Write ranges of symbols and the source's digest into the metadata; an open end is written as nothing."""
    metadata = {f"{RANGE}{name}": f"{low},{'' if high is None else high}" for name, (low, high) in ranges.items()}
    for key, text in {**metadata, SOURCE: source}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text


def check_model(model: onnx.ModelProto) -> None:
    """Run the full checker and strict shape inference; `BuildFailed` of stage 2 where either refuses.

    The checker accepts any version of opset and format, so those are compared first.
    """
    _check_versions(model)
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


def _check_versions(model: onnx.ModelProto) -> None:
    newest = {"": onnx.defs.onnx_opset_version(), "ai.onnx": onnx.defs.onnx_opset_version()}
    late = [
        f"opset {entry.version} of {entry.domain or 'ai.onnx'} (known up to {newest[entry.domain]})"
        for entry in model.opset_import
        if entry.version > newest.get(entry.domain, entry.version)
    ]
    if model.ir_version > onnx.IR_VERSION:
        late.append(f"IR version {model.ir_version} (known up to {onnx.IR_VERSION})")
    if late:
        raise BuildFailed(
            f"the ONNX graph is newer than this installation: {', '.join(late)}",
            fix="export the model again with this version of ONNX, or install the one that it needs",
            evidence={"validation_output": ", ".join(late), "runtime_version": f"onnx {onnx.__version__}"},
            stage="a02",
        )


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


def check_dimensions(
    model: onnx.ModelProto,
    expected: Mapping[str, Sequence[str]],
    declared: Mapping[str, Sequence[int | None]],
    *,
    stage: str,
) -> None:
    """Refuse a graph that lost a dynamic dimension, a relation between dimensions, or the recorded bounds."""
    found = dimensions(model)
    kept: dict[str, list[int | None]] = {}
    for entry in model.metadata_props:
        if entry.key.startswith(RANGE):
            low, high = entry.value.split(",")
            kept[entry.key.removeprefix(RANGE)] = [int(low), int(high) if high else None]
    lost = {name: found.get(name) for name, shape in expected.items() if found.get(name) != list(shape)}
    programs.check_conserved(kept, declared, stage=stage, where=f"the ONNX graph ({lost or 'bounds'})")
    if lost:
        raise InputRefused(
            f"the ONNX graph has the dimensions {lost}: a stage specialized the program silently",
            fix="declare the bounds that the backend keeps, or choose another backend",
            evidence={"input_signature": str(lost), "guard": str(dict(expected)), "compile_event": "ONNX"},
            stage=stage,
        )


def expected_dimensions(program: CapturedProgram) -> dict[str, list[str]]:
    """Give the symbolic shape that every input must keep through each form of the program."""
    described = programs.signature(program)
    return {name: entry["shape"] for name, entry in described.items() if name not in program.unchecked}


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

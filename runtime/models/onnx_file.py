"""Is this ONNX file whole, inside its folder, and of a version that can be read?  Digests of graph and external data.

An ONNX file can name other files for its weights, by any path: one outside the file's own folder, or a link, would let
a model read what is none of its business, so both are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto

from runtime.models.config import ModelRefused

LARGEST = 2**31 - 1
"""Bytes of one protobuf message; a model whose weights do not fit into it cannot be packaged as one file."""


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A graph and the files that hold its weights, all digested."""

    path: Path
    graph: bytes
    """The file's bytes, as digested."""
    model: ModelProto
    """Parsed from those bytes; external data still outside."""
    files: dict[str, str]
    """Digest by file name, relative to the folder."""
    digest: str
    """sha256 over the sorted (file name, file digest) lines."""

    def whole(self) -> ModelProto:
        """Give the model with its external data inside; data that changed since the digest is refused."""
        folder = self.path.parent
        for name in self.files:
            if name != self.path.name and _file_digest(folder / name) != self.files[name]:
                raise ModelRefused(f"{name} changed while it was being loaded", fix="start again")
        model = ModelProto()
        model.CopyFrom(self.model)
        if len(self.files) > 1:
            onnx.load_external_data_for_model(model, str(folder))
        return model


def read_onnx(path: Path) -> OnnxFile:
    """Digest an ONNX file and all that it refers to, and hold it to versions that can be read.

    Errors: `ModelRefused` for a damaged file, a missing or outside reference, an unknown opset or IR version, an
    operator that the opset does not have, or more than 2 GiB of weights.
    """
    graph = path.read_bytes()
    model = ModelProto()
    try:
        model.ParseFromString(graph)
    except DecodeError as error:
        raise _refuse(path, f"is not an ONNX file: {error}", "validation_output", str(error)) from error
    if not model.opset_import or not model.graph.node:
        raise _refuse(path, "holds no graph with an opset", "validation_output", "no opset or no nodes")
    _check_versions(path, model)
    files = {path.name: "sha256:" + hashlib.sha256(graph).hexdigest()}
    total = len(graph)
    for name, end in external_files(path, model).items():
        place = _inside(path, name)
        if place.stat().st_size < end:
            raise _refuse(path, f"needs {end} bytes of {name}, which is shorter", "validation_output", name)
        files[name] = _file_digest(place)
        total += end
    if total > LARGEST:
        raise _refuse(path, "holds more than 2 GiB of weights", "validation_output", f"{total} bytes")
    lines = "".join(f"{found}  {name}\n" for name, found in sorted(files.items()))
    name = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    return OnnxFile(path=path, graph=graph, model=model, files=files, digest=name)


def external_files(path: Path, model: ModelProto) -> dict[str, int]:
    """List the files that tensors lie in, with the number of bytes that each must have."""
    found: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            name, offset, length = entries["location"], int(entries.get("offset", 0)), int(entries.get("length", 0))
        except (KeyError, ValueError) as error:
            raise _refuse(path, f"places tensor {tensor.name} nowhere", "validation_output", repr(error)) from error
        if offset < 0 or length < 0:
            raise _refuse(path, f"places tensor {tensor.name} before its file", "validation_output", name)
        found[name] = max(found.get(name, 0), offset + length)
    return found


def missing_operators(model: ModelProto) -> list[str]:
    """Name operators of the standard domain that the model's opset does not have."""
    functions = {(entry.domain, entry.name) for entry in model.functions}
    versions = {entry.domain: entry.version for entry in model.opset_import}
    absent: set[str] = set()
    for node in _nodes(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain or (node.domain, node.op_type) in functions:
            continue
        version = versions.get("", versions.get("ai.onnx", 0))
        if not onnx.defs.has(node.op_type, max_inclusive_version=version, domain=""):
            absent.add(node.op_type)
    return sorted(absent)


def _check_versions(path: Path, model: ModelProto) -> None:
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise _refuse(path, f"needs opset {version}; the newest known is {newest}", "operator_details", version)
    if model.ir_version > onnx.IR_VERSION:
        text = f"has IR version {model.ir_version}; the newest known is {int(onnx.IR_VERSION)}"
        raise _refuse(path, text, "operator_details", model.ir_version)
    absent = missing_operators(model)
    if absent:
        text = f"uses operators that opset {version} lacks: {', '.join(absent)}"
        raise _refuse(path, text, "operator_details", absent)


def _inside(path: Path, name: str) -> Path:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in name:
        raise _refuse(path, f"refers to {name!r}, outside its folder", "validation_output", name)
    place = path.parent / parts
    inside = place.parent.resolve().is_relative_to(path.parent.resolve())
    if place.is_symlink() or not inside:
        raise _refuse(path, f"refers to {name!r}, which leads outside its folder", "validation_output", name)
    if not place.is_file():
        raise _refuse(path, f"refers to external data {name!r}, which is missing", "validation_output", name)
    return place


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for entry in inner:
                yield from _graphs(entry)


def _nodes(graph: GraphProto) -> Iterator[onnx.NodeProto]:
    for entry in _graphs(graph):
        yield from entry.node


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    for entry in _graphs(graph):
        yield from entry.initializer
        for node in entry.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    yield attribute.t
                yield from attribute.tensors


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _refuse(path: Path, what: str, key: str, value: Any) -> ModelRefused:
    return ModelRefused(
        f"{path.name} {what}",
        fix="restore or export the model again, with its external data beside it",
        evidence={key: value, "artifact_digest": path.name},
    )

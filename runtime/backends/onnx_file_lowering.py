"""How is somebody's own ONNX file prepared?  Read and checked as it is; from stage 4 on as an exported graph.

Nothing is exported: the file is the captured program.  Its reference is ONNX's own evaluator in NumPy where that has
every operator, else ONNX Runtime without any optimization, and the record says which.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from manifests.canonical import digest
from runtime.backends import onnx_graph
from runtime.backends.errors import BackendRefused
from runtime.backends.index_ranges import onnx_index_ranges
from runtime.backends.lowering import index_ranges_of, target, unknown
from runtime.backends.one_shot import OneShotModel
from runtime.backends.onnxruntime import PROVIDERS, open_session_of, session_options
from runtime.backends.onnxruntime_lowering import OrtLowering
from runtime.backends.protocol import Boundary
from runtime.backends.tensor_contract import DTYPES, Arrays, TensorContract, TensorRule, bounded
from runtime.models.config import ModelRefused
from runtime.models.onnx_file import OnnxFile, read_onnx
from runtime.models.source import ModelKind, kind_of

KINDS = {"float": "float32", "double": "float64"}
"""ONNX's names of element types where NumPy has another one."""


class OnnxFileLowering(OrtLowering):
    """Stages 1 to 3 on an ONNX file; the rest is inherited."""

    _file: OnnxFile
    _contract: TensorContract

    def capture(self) -> Boundary:
        """Stage 1: digest graph and external data, then read them; bounds are written into the metadata."""
        _, path = kind_of(self.model_folder)
        self._file = read_onnx(path)
        self._model = self._file.whole()
        self._contract = contract_of(self._model, self._file, self.options.bounds)
        onnx_graph.annotate(self._model, self._declared(), source=self._file.digest)
        made = " ".join(entry for entry in (self._model.producer_name, self._model.producer_version) if entry)
        opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in self._model.opset_import)
        foreign = sorted({f"{node.domain}.{node.op_type}" for node in self._model.graph.node if node.domain})
        name = "sha256:" + hashlib.sha256(self._model.SerializeToString(deterministic=True)).hexdigest()
        record = {
            "exporter_version": made or unknown("the file names no producer"),
            "source_framework": f"onnx file, {len(self._file.files) - 1} files of external data",
            "opset_or_dialect": f"{opsets}, IR {self._model.ir_version}",
            "warnings": [f"operators outside the standard: {', '.join(foreign)}"] if foreign else [],
            "unsupported_nodes": onnx_graph.unsupported(self._model),
            "artifact_digest": name,
        }
        return Boundary({"onnx": name, "model": self._file.digest}, record)

    def represent(self) -> Boundary:
        """Stage 2: the strict ONNX checker and shape inference, and what the graph holds."""
        onnx_graph.check_model(self._model)
        graph = self._model.graph
        operators = dict(sorted(Counter(node.op_type for node in graph.node).items()))
        record = {
            "ir_version": f"onnx IR {self._model.ir_version}",
            "node_count": {"onnx": len(graph.node)},
            "parameter_count": sum(int(np.prod(tensor.dims)) for tensor in graph.initializer),
            "control_flow_inventory": [name for name in operators if name in ("If", "Loop", "Scan")],
            "validation_result": {"validator": "onnx.checker (full), strict shape inference", "valid": True},
            "model_signature": onnx_graph.signature(self._model),
        }
        return Boundary({"graph": digest(operators), "onnx_operators": operators}, record)

    def analyze(self) -> Boundary:
        """Stage 3: dimensions as the file declares them, with the bounds that calls are held to."""
        self._check_dimensions(self._model, stage="a03")
        symbols = self._declared()
        key = digest(
            {
                "program": self._file.digest,
                "backend": self.backend,
                "versions": self.versions,
                "symbols": symbols,
                "optimization": self.options.optimization,
                "flags": dict(self.options.flags),
                "threads": self.options.threads,
                "isa": target()["isa"],
            }
        )
        record = {
            "shape_profile": {"symbols": symbols, "index_ranges": index_ranges_of(self._one_shot_model)},
            "guard_count": unknown("an ONNX file carries no guards, and ONNX Runtime tells of none"),
            "dynamic_dimensions": onnx_graph.dimensions(self._model),
            "layout_decisions": {"inputs_contiguous": True},
            "specialization_cache_key": key,
        }
        emitted = {"symbols": symbols, "onnx_dimensions": onnx_graph.dimensions(self._model)}
        return Boundary(emitted, record)

    def one_shot(self) -> OneShotModel | None:
        """The file as a one-shot model; available after stage 1."""
        return self._one_shot_model

    @cached_property
    def _one_shot_model(self) -> OneShotModel:
        reference = OnnxReference(self._model, [rule.name for rule in self._contract.outputs])
        return OneShotModel(
            kind=ModelKind.ONNX,
            name=self._file.path.stem,
            digest=self._file.digest,
            contract=self._contract,
            precision=self.options.precision,
            reference=reference,
            reference_name=lambda: reference.name,
        )

    def base_compiler(self) -> dict[str, Any]:
        """Nothing was exported; the file's producer stands in its place."""
        return {
            "backend": self.backend,
            "precision": self.options.precision,
            "exporter": "none",
            "exporter_version": "none",
            "flags": {"build_threads": str(self.options.threads), **self.options.flags},
            "batch_invariant": False,
            "runtime_versions": self.versions,
        }

    def compiler(self) -> Mapping[str, Any]:
        """As for every graph, but without an exporter."""
        return {**super().compiler(), "exporter": "none", "exporter_version": "none"}

    def _declared(self) -> dict[str, list[int | None]]:
        return {name: list(found) for name, found in self._contract.symbols.items()}

    def _check_dimensions(self, model: onnx.ModelProto, *, stage: str) -> None:
        expected = {rule.name: list(rule.shape) for rule in self._contract.inputs}
        onnx_graph.check_dimensions(model, expected, self._declared(), stage=stage)


class OnnxReference:
    """Computes a call unoptimized: by ONNX's evaluator in NumPy, or by ONNX Runtime where that lacks an operator."""

    def __init__(self, model: onnx.ModelProto, outputs: Sequence[str]) -> None:
        self._model, self._outputs = model, list(outputs)
        self._run: Callable[[list[str], Arrays], Sequence[Any]] | None = None
        self.name = "onnx.reference, not run yet"

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Compute one call; the first one decides by which reference."""
        if self._run is None:
            self._run = self._choose(inputs)
        values = self._run(self._outputs, inputs)
        return {name: np.asarray(value) for name, value in zip(self._outputs, values, strict=True)}

    def _choose(self, inputs: Arrays) -> Callable[[list[str], Arrays], Sequence[Any]]:
        try:
            evaluator = ReferenceEvaluator(self._model)
            evaluator.run(self._outputs, dict(inputs))
        except Exception as error:  # an absent or partial operator raises what it likes
            options = session_options(threads=1, settings={}, level="disable")
            session = open_session_of(self._model.SerializeToString(deterministic=True), options, PROVIDERS)
            reason = type(error).__name__
            self.name = (
                f"onnxruntime {onnxruntime.__version__}, all optimizations disabled (onnx.reference raised {reason})"
            )
            return lambda outputs, values: list(session.run(outputs, dict(values)))
        self.name = f"onnx.reference {onnx.__version__}"
        return lambda outputs, values: list(evaluator.run(outputs, dict(values)))


def contract_of(model: onnx.ModelProto, file: OnnxFile, bounds: Any) -> TensorContract:
    """Derive the contract from inputs and outputs; dimensions without a name get one, so that all have bounds."""
    weights = {tensor.name for tensor in model.graph.initializer}
    ranges = onnx_index_ranges(model)
    given = [value for value in model.graph.input if value.name not in weights]
    inputs = tuple(_rule(file, value, ranges.get(value.name)) for value in given)
    outputs = tuple(_rule(file, value, None) for value in model.graph.output)
    if not inputs or not outputs:
        raise ModelRefused(f"{file.path.name} has no input or no output", fix="export a graph with both")
    return TensorContract(inputs=inputs, outputs=outputs, symbols=bounded(inputs, {}, bounds))


def _rule(file: OnnxFile, value: onnx.ValueInfoProto, index_range: tuple[int, int] | None) -> TensorRule:
    tensor = value.type.tensor_type
    kind = TensorProto.DataType.Name(tensor.elem_type).lower()
    dtype = KINDS.get(kind, kind)
    if not value.type.HasField("tensor_type") or dtype not in DTYPES or not tensor.HasField("shape"):
        raise BackendRefused(
            f"{value.name} of {file.path.name} is {kind} without a usable shape, which cannot cross the boundary",
            fix=f"tensors of known rank may be {', '.join(DTYPES)}",
            evidence={"operator_details": f"{value.name}: {kind}"},
            stage="a01",
        )
    for axis, dimension in enumerate(tensor.shape.dim):
        if not dimension.dim_param and not dimension.HasField("dim_value"):
            dimension.dim_param = f"{value.name}_{axis}"
    shape = tuple(entry.dim_param or str(entry.dim_value) for entry in tensor.shape.dim)
    return TensorRule(name=value.name, dtype=dtype, shape=shape, index_range=index_range)

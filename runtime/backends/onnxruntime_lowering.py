"""How is a model prepared for ONNX Runtime?  Exported program to ONNX, checked, optimized once, assigned, profiled."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime
import torch

from runtime.backends import onnx_graph
from runtime.backends import program as programs
from runtime.backends.contract import InputContract
from runtime.backends.errors import BuildFailed
from runtime.backends.fixture import require_within
from runtime.backends.lowering import ExportedLowering, target, unknown
from runtime.backends.one_shot import OneShotSpec
from runtime.backends.onnx_transfers import copy_estimate, sized_edges
from runtime.backends.onnxruntime import MODEL, PROVIDERS, SETTINGS, OrtExecutor, open_session, session_options
from runtime.backends.onnxruntime_blocks import PRODUCTS, REQUIRED_ISA, block_products, products_of
from runtime.backends.onnxruntime_loader import CONTEXT, executor_of
from runtime.backends.onnxruntime_one_shot import OrtOneShot
from runtime.backends.onnxruntime_passes import DISABLED, Rewriting
from runtime.backends.onnxruntime_quantization import DESCRIPTION, quantize
from runtime.backends.onnxruntime_translations import OPSETS, translations
from runtime.backends.program import StepProgram
from runtime.backends.protocol import Boundary, BuildOptions, LoadSpec
from runtime.backends.step_form import resident_form

FLAGS = {
    "disable_prepacking": "session.disable_prepacking",
    "memory_pattern": "session.memory_pattern",
    "cpu_arena": "session.cpu_arena",
}
"""Flags that a caller may set, and the session setting behind each."""
ONE_SHOT_OPSET = 20
"""Of programs that are not ours: in opset 23, ONNX Runtime refuses an attention mask that has to be broadcast."""
DEFAULT_LEVEL = "extended"
"""The highest level whose result does not depend on this machine's layout preferences."""


class OrtLowering(ExportedLowering):
    """Stages 1 to 6 for ONNX Runtime."""

    backend = "onnxruntime"
    _model: onnx.ModelProto
    _optimized: Path
    _passes: tuple[str, ...] = ()
    _blocked = 0

    def __init__(self, model_folder: Path, work: Path, options: BuildOptions, *, versions: Mapping[str, str]) -> None:
        super().__init__(model_folder, work, options, versions=versions)
        self.context = options.flags.get(CONTEXT, "resident")
        if self.context == "resident":
            self.step_kind, self.make_form = "resident", resident_form
        self.products = products_of(options.flags, resident=self.context == "resident")

    @property
    def level(self) -> str:
        """The graph optimization level in ONNX Runtime's words."""
        return DEFAULT_LEVEL if self.options.optimization == "default" else self.options.optimization

    @property
    def providers(self) -> tuple[str, ...]:
        """Requested execution providers."""
        return self.options.providers or PROVIDERS

    @property
    def settings(self) -> dict[str, str]:
        """Session settings that are pins of the package."""
        return {**SETTINGS, **{FLAGS[name]: value for name, value in self.options.flags.items() if name in FLAGS}}

    def capture(self) -> Boundary:
        """Stage 1: the exported program, then its ONNX form with the bounds as metadata."""
        base = super().capture()
        names: dict[str, Any] = {} if self.step_program else {"input_names": list(self.program.input_names)}
        start = time.perf_counter_ns()
        try:
            with torch.no_grad(), programs.quiet_exporters() as noted:
                exported = torch.onnx.export(
                    self.program.exported,
                    self.program.inputs,
                    dynamo=True,
                    verbose=False,
                    output_names=list(self.program.output_names),
                    opset_version=OPSETS[self.context] if self.step_program else ONE_SHOT_OPSET,
                    custom_translation_table=translations(),
                    **names,
                )
        except Exception as error:  # ConversionError and its causes share no base
            text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
            raise BuildFailed(
                f"the ONNX exporter refused the program: {text[0][:300] if text else type(error).__name__}",
                fix="the message names the operator that ONNX lacks; use another backend for this model",
                evidence={"operator_details": _root_cause(error), "exception": type(error).__name__},
                stage="a01",
            ) from error
        self._model = onnx_graph.prepare_model(exported, self.program)
        data = self._model.SerializeToString(deterministic=True)
        name = "sha256:" + hashlib.sha256(data).hexdigest()
        opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in self._model.opset_import)
        record = {
            **base.record,
            "exporter_version": f"torch.onnx (dynamo) {torch.__version__}, onnxscript {self.versions['onnxscript']}",
            "opset_or_dialect": f"{opsets}, IR {self._model.ir_version}",
            "warnings": sorted({*base.record["warnings"], *noted}),
            "unsupported_nodes": [*base.record["unsupported_nodes"], *onnx_graph.unsupported(self._model)],
            "artifact_digest": name,
        }
        spent = (time.perf_counter_ns() - start) // 1000
        return Boundary({**base.emitted, "onnx": name}, record, {**base.timings, "onnx_export_us": spent})

    def represent(self) -> Boundary:
        """Stage 2: the strict ONNX checker and shape inference, and what the graph holds."""
        base = super().represent()
        onnx_graph.check_model(self._model)
        graph = self._model.graph
        operators = dict(sorted(Counter(node.op_type for node in graph.node).items()))
        record = {
            **base.record,
            "ir_version": f"onnx IR {self._model.ir_version}",
            "node_count": {**base.record["node_count"], "onnx": len(graph.node)},
            "control_flow_inventory": [name for name in operators if name in ("If", "Loop", "Scan")],
            "validation_result": {
                "validator": "onnx.checker (full), strict shape inference, ExportedProgram.validate",
                "valid": True,
            },
            "model_signature": onnx_graph.signature(self._model),
        }
        return Boundary({**base.emitted, "onnx_operators": operators}, record)

    def analyze(self) -> Boundary:
        """Stage 3: the program's constraints, and that ONNX kept the same dimensions."""
        base = super().analyze()
        self._check_dimensions(self._model, stage="a03")
        record = {**base.record, "dynamic_dimensions": onnx_graph.dimensions(self._model)}
        return Boundary({**base.emitted, "onnx_dimensions": onnx_graph.dimensions(self._model)}, record)

    def optimize(self) -> Boundary:
        """Stage 4: let ONNX Runtime rewrite the graph once, keep the result, and compare it with eager.

        Whatever providers are requested: they get their nodes in stage 5, from the graph as it then is.
        """
        source, self._optimized = self.work / "captured.onnx", self.work / MODEL
        start = time.perf_counter_ns()
        quantized = quantize(self._model) if self.options.precision == "int8" else None
        captured = quantized.model if quantized else self._model
        source.write_bytes(captured.SerializeToString(deterministic=True))
        ran = self._rewriting.rewrite(source, self._optimized)
        after = onnx.load(str(self._optimized))
        if self.products == "blocked" and self.one_shot() is None:
            self._blocked = block_products(after)
            self._optimized.write_bytes(after.SerializeToString(deterministic=True))
        spent = (time.perf_counter_ns() - start) // 1000
        quantization = [f"quantize {DESCRIPTION}"] if quantized else []
        blocking = ["block products"] if self._blocked else []
        self._passes = (*quantization, *ran.names, *blocking)
        changed = {*quantization, *ran.changed, *blocking}
        self._check_dimensions(after, stage="a04")
        comparison = self.compare(self._executor(PROVIDERS))
        require_within(comparison, stage="a04")
        record = {
            "pass_list": [{"name": name, "changed": name in changed} for name in self._passes],
            "graph_before": {"nodes": len(self._model.graph.node)},
            "graph_after": {
                "nodes": len(after.graph.node),
                **({"products_in_blocks": self._blocked} if self._blocked else {}),
                **({"int8_layers": quantized.layers, "float32_products": quantized.kept} if quantized else {}),
                "by_level": self._rewriting.nodes_by_level(source, self.work),
                "operators": dict(sorted(Counter(node.op_type for node in after.graph.node).items())),
            },
            "numerical_validation": comparison.document(),
            "estimated_memory_bytes": {"weights": onnx_graph.initializer_bytes(after)},
            "optimization_us": {
                "total": spent,
                "passes": ran.pass_us or unknown("this version of ONNX Runtime gives its log lines no times"),
            },
        }
        emitted = {"graph": _file_digest(self._optimized), "passes": list(self._passes), "level": self.level}
        return Boundary(emitted, record, {"optimization_us": spent})

    def partition(self) -> Boundary:
        """Stage 5: which provider owns which node of the optimized graph."""
        options = session_options(
            threads=self.options.threads,
            settings={**self.settings, "session.record_ep_graph_assignment_info": "1"},
        )
        session = open_session(self._optimized, options, self.providers)
        owners: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for group in session.get_provider_graph_assignment_info():
            for node in group.get_nodes():
                owners[node.name] = group.ep_name
                counts[group.ep_name] += 1
        optimized = onnx.load(str(self._optimized))
        edges = sized_edges(optimized, onnx_graph.crossing_edges(optimized, owners))
        fallback = sum(count for name, count in counts.items() if name != self.providers[0])
        record = {
            "partition_map": {name: {"nodes": count} for name, count in sorted(counts.items())},
            "fallback_node_count": fallback,
            "transfer_edges": edges,
            "provider_versions": {name: _provider_version(name) for name in self.providers},
            "estimated_copy_bytes": copy_estimate(edges),
        }
        return Boundary({"partition": dict(sorted(counts.items())), "providers": list(self.providers)}, record)

    def lower(self) -> Boundary:
        """Stage 6: ONNX Runtime selects prebuilt kernels; a profiled run lists them."""
        start = time.perf_counter_ns()
        kernels = self._profile()
        spent = (time.perf_counter_ns() - start) // 1000
        record = {
            "target": target(),
            "compiler_flags": {"build": str(onnxruntime.get_build_info()), **self.settings},
            "code_size_bytes": unknown("ONNX Runtime runs prebuilt kernels; no code is generated"),
            "tuning_record": unknown("the CPU provider does not tune"),
            "kernel_inventory": kernels,
            "build_us": spent,
        }
        emitted = {"model": _file_digest(self._optimized), "kernels": kernels, "settings": self.settings}
        return Boundary(emitted, record, {"build_us": spent})

    def files(self) -> Mapping[str, Path]:
        """The optimized model, weights inside."""
        return {MODEL: self._optimized}

    def compiler(self) -> Mapping[str, Any]:
        """Session settings are flags: one of them alone can change how kernels depend on the batch."""
        base = self.base_compiler()
        flags = {name: value for name, value in base["flags"].items() if name not in FLAGS}
        decoder = {} if self.one_shot() else {CONTEXT: self.context, PRODUCTS: self.products}
        return {
            **base,
            "backend_version": self.versions["onnxruntime"],
            "exporter": "torch.onnx (dynamo)",
            "optimization_level": self.level,
            "passes": self._passes,
            "flags": {**flags, **decoder, **self.settings},
            **({"required_isa": REQUIRED_ISA} if self._blocked else {}),
            "execution_providers": self.providers,
        }

    @property
    def _rewriting(self) -> Rewriting:
        names = self.options.flags.get(DISABLED, "").split(";")
        return Rewriting(
            level=self.level,
            threads=self.options.threads,
            settings=self.settings,
            providers=PROVIDERS,
            disabled=tuple(filter(None, names)),
        )

    def _check_dimensions(self, model: onnx.ModelProto, *, stage: str) -> None:
        expected = onnx_graph.expected_dimensions(self.program)
        onnx_graph.check_dimensions(model, expected, self.program.declared, stage=stage)

    def _executor(self, providers: tuple[str, ...], **changes: Any) -> OrtExecutor | OrtOneShot:
        options = session_options(threads=self.options.threads, settings=self.settings)
        for name, value in changes.items():
            setattr(options, name, value)
        session = open_session(self._optimized, options, providers)
        model, threads = self.one_shot(), self.options.threads
        if model is not None:
            return OrtOneShot(session, OneShotSpec(contract=model.contract, threads=threads, providers=providers))
        config = cast(StepProgram, self.program).checkpoint.config
        spec = LoadSpec(
            config=config,
            contract=InputContract.of(config, self.options.bounds),
            precision=self.options.precision,
            threads=threads,
            providers=providers,
            batch_invariant=self.options.batch_invariant,
            flags={CONTEXT: self.context},
        )
        return executor_of(session, spec)

    def _profile(self) -> dict[str, dict[str, int]]:
        prefix = self.work / "profile"
        executor = self._executor(self.providers, enable_profiling=True, profile_file_prefix=str(prefix))
        self.exercise(executor)
        path = Path(executor.end_profiling())
        events = [event["args"] for event in json.loads(path.read_text()) if event["name"].endswith("_kernel_time")]
        path.unlink()
        nodes = {(entry["provider"], entry["op_name"], entry["node_index"]) for entry in events}
        kernels: dict[str, dict[str, int]] = {}
        for provider, operator, _ in sorted(nodes):
            owned = kernels.setdefault(provider, {})
            owned[operator] = owned.get(operator, 0) + 1
        return kernels


def _provider_version(name: str) -> str | dict[str, str]:
    for device in onnxruntime.get_ep_devices():
        if device.ep_name == name:
            return str(dict(device.ep_metadata).get("version", onnxruntime.__version__))
    return unknown("the provider registers no device")


def _root_cause(error: BaseException) -> str:
    """Give the innermost message of a chain: exporters name the operator there, pages of advice above it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()[:1000]


def _file_digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()

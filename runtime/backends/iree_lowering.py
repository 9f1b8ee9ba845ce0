"""How is a model prepared for IREE?  Imported and compiled in a child process, one phase of the compiler a stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.backends import program as programs
from runtime.backends.build_process import BuildProcess
from runtime.backends.child_lowering import ChildLowering
from runtime.backends.errors import BuildFailed, InputRefused
from runtime.backends.iree import FUNCTION, MODULE
from runtime.backends.iree_records import code_bytes, required_flags
from runtime.backends.lowering import unknown
from runtime.backends.protocol import Boundary

LEVELS = ("default", "O0", "O1", "O2", "O3")
DEFAULT_LEVEL = "O2"
FLAGS = {
    "target_cpu": ("host", "generic", "x86-64-v3", "x86-64-v4"),
    "data_tiling": ("false", "true"),
    "ukernels": ("none", "all"),
}
"""Flags that a caller may set, with their values; the first is the default."""
ELEMENTS = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "i8",
    "bool": "i1",
}
"""MLIR's element types."""


class IreeLowering(ChildLowering):
    """Stages 1 to 6 for IREE on the CPU (llvm-cpu)."""

    backend = "iree"
    _imported: Mapping[str, Any]
    _passes: tuple[str, ...] = ()
    _target: Mapping[str, str]
    _kernels: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """The compiler's optimization level."""
        return DEFAULT_LEVEL if self.options.optimization == "default" else self.options.optimization

    @property
    def choices(self) -> dict[str, str]:
        """Every flag of this backend with its value."""
        return {name: self.options.flags.get(name, values[0]) for name, values in FLAGS.items()}

    @property
    def compiler_flags(self) -> list[str]:
        """What iree-compile is called with in every phase."""
        chosen = self.choices
        return [
            "--iree-hal-target-backends=llvm-cpu",
            f"--iree-llvmcpu-target-cpu={chosen['target_cpu']}",
            f"--iree-opt-level={self.level}",
            f"--iree-opt-data-tiling={chosen['data_tiling']}",
            f"--iree-llvmcpu-enable-ukernels={chosen['ukernels']}",
            *(["--mlir-disable-threading"] if self.options.threads == 1 else []),
        ]

    def capture(self) -> Boundary:
        """Stage 1: the exported program, then its MLIR form; operators that the compiler does not know fail here."""
        base = super().capture()
        source = self.work / "program.pt2"
        source.write_bytes(self.program.serialized)
        self._build = BuildProcess(
            "runtime.backends.iree_compile",
            {
                "program": str(source),
                "output": str(self.work / MODULE),
                "work": str(self.work),
                "functions": self.functions(),
                "flags": self.compiler_flags,
            },
            self.work,
            environment={"OMP_NUM_THREADS": str(self.options.threads), "PYTHONHASHSEED": "0"},
            deadline_seconds=self.options.deadline_seconds,
            fix="the message names what IREE cannot compile; use another backend or optimization level",
        )
        self._imported = report = self._build.wait_for("imported", stage="a01")
        if report["unsupported"]:
            raise BuildFailed(
                f"IREE knows no {', '.join(report['unsupported'])}",
                fix="use another backend for this model, or replace the operator",
                evidence={"operator_details": ", ".join(report["unsupported"]), "artifact_digest": report["module"]},
                stage="a01",
            )
        record = {
            **base.record,
            "exporter_version": f"{base.record['exporter_version']}, FxImporter {self.versions['iree-base-compiler']}",
            "opset_or_dialect": f"{base.record['opset_or_dialect']}; MLIR torch dialect",
            "unsupported_nodes": report["unsupported"],
            "artifact_digest": report["module"],
        }
        return Boundary({**base.emitted, "mlir": report["module"]}, record, base.timings)

    def functions(self) -> list[dict[str, Any]]:
        """Name the functions of the module, with the sizes that are fixed in each by the exporter's symbols."""
        if self.options.buckets is None:
            return [{"name": FUNCTION, "sizes": {}}]
        symbols = {name: symbol for symbol, name in self.program.names.items()}
        return [
            {
                "name": bucket.name,
                "sizes": {symbols["B"]: bucket.batch, symbols["T"]: bucket.tokens, symbols["S"]: bucket.context},
            }
            for bucket in self.options.buckets.buckets()
        ]

    def represent(self) -> Boundary:
        """Stage 2: the program's own validation and MLIR's verifier."""
        base = super().represent()
        report = self._running().wait_for("verified", stage="a02")
        if not report["valid"]:
            raise BuildFailed(
                "MLIR's verifier refuses the imported module",
                fix="prepare the model again; if it repeats, use another backend",
                evidence={"validation_output": "verify() is false", "artifact_digest": self._imported["module"]},
                stage="a02",
            )
        record = {
            **base.record,
            "ir_version": f"{base.record['ir_version']}; MLIR of IREE {self.versions['iree-base-compiler']}",
            "node_count": {**base.record["node_count"], "mlir": sum(report["operators"].values())},
            "validation_result": {"validator": "ExportedProgram.validate, MLIR verifier", "valid": True},
        }
        return Boundary({**base.emitted, "mlir_operators": report["operators"]}, record)

    def analyze(self) -> Boundary:
        """Stage 3: the program's constraints, and that importing kept every dimension."""
        base = super().analyze()
        check_dimensions(self._imported["dimensions"], self._declared(), stage="a03", where="the imported module")
        record = {**base.record, "dynamic_dimensions": self._imported["dimensions"]}
        return Boundary({**base.emitted, "mlir_dimensions": self._imported["dimensions"]}, record)

    def optimize(self) -> Boundary:
        """Stage 4: from torch operations to fused linear algebra (IREE's phases up to global-optimization)."""
        report = self._running().wait_for("optimized", stage="a04")
        check_dimensions(report["dimensions"], self._declared(), stage="a04", where="the optimized module")
        self._passes = tuple(entry["name"] for entry in report["passes"])
        spent = {"total": report["us"], "passes": _by_name(report["passes"])}
        record = {
            "pass_list": list(self._passes),
            "graph_before": {"nodes": len(self.program.exported.graph.nodes)},
            "graph_after": {"nodes": sum(report["operators"].values()), "operators": report["operators"]},
            "numerical_validation": unknown("linear algebra is no code yet; compared with eager at stage a09"),
            "estimated_memory_bytes": unknown("buffers are assigned when code is generated, at stage a06"),
            "optimization_us": spent,
        }
        emitted = {"module": report["module"], "passes": list(self._passes), "level": self.level}
        return Boundary(emitted, record, {"optimization_us": report["us"]})

    def partition(self) -> Boundary:
        """Stage 5: operations are gathered into dispatches; one device owns them all."""
        report = self._running().wait_for("partitioned", stage="a05")
        check_dimensions(report["dimensions"], self._declared(), stage="a05", where="the module of dispatches")
        self._target, self._kernels = report["target"], tuple(report["executables"])
        dispatches = report["operators"].get("flow.dispatch", 0)
        record = {
            "partition_map": {"llvm-cpu": {"dispatches": dispatches, "executables": list(self._kernels)}},
            "fallback_node_count": 0,
            "transfer_edges": [],
            "provider_versions": {"llvm-cpu": f"IREE {self.versions['iree-base-compiler']}"},
            "estimated_copy_bytes": 0,
        }
        emitted = {"module": report["module"], "executables": list(self._kernels)}
        return Boundary(emitted, record, {"partition_us": report["us"]})

    def lower(self) -> Boundary:
        """Stage 6: LLVM generates code for the target; the module's bytes are the package."""
        report = self._running().wait_for("lowered", stage="a06")
        self._running().close()
        module = self.work / MODULE
        scheduled: dict[str, Any] = report["statistics"]["stream-aggregate"]
        record = {
            "target": dict(self._target),
            "compiler_flags": self.compiler_flags,
            "code_size_bytes": code_bytes(module),
            "tuning_record": unknown("no tuning specification is given; IREE chooses tile sizes by rule"),
            "kernel_inventory": {
                "dispatches": scheduled["execution"]["dispatch-count"],
                "executables": list(self._kernels),
                "constant_bytes": scheduled["global"]["constant-size"],
                "transient_bytes": scheduled["execution"]["transient-memory-size"]
                or unknown("shapes are dynamic, so memory is sized at each call"),
                "ukernels": self.choices["ukernels"],
            },
            "build_us": report["us"],
        }
        name = "sha256:" + hashlib.sha256(module.read_bytes()).hexdigest()
        return Boundary({"module": name}, record, {"build_us": report["us"]})

    def files(self) -> Mapping[str, Path]:
        """The module, weights inside."""
        return {MODULE: self.work / MODULE}

    def compiler(self) -> Mapping[str, Any]:
        """What `host` meant on this machine is identity: the processor's name and features."""
        base = self.base_compiler()
        features = self._target.get("cpu_features", "")
        return {
            **base,
            "backend_version": self.versions["iree-base-compiler"],
            "optimization_level": self.level,
            "passes": self._passes,
            "flags": {
                **base["flags"],
                **self.choices,
                "cpu": self._target.get("cpu", "unknown"),
                "isa": " ".join(required_flags(features)),
            },
            "required_isa": required_flags(features),
        }

    def _declared(self) -> dict[str, dict[str, str]]:
        """Write the inputs of each function as MLIR does: `?` for what is dynamic."""
        signature, names = programs.signature(self.program), self.program.names
        declared: dict[str, dict[str, str]] = {}
        for function in self.functions():
            sizes = {names[symbol]: size for symbol, size in function["sizes"].items()}
            declared[function["name"]] = {
                str(index): "x".join([*(_dimension(part, sizes) for part in entry["shape"]), ELEMENTS[entry["dtype"]]])
                for index, entry in enumerate(signature.values())
            }
        return declared


def check_dimensions(
    found: Mapping[str, Mapping[str, str]], declared: Mapping[str, Mapping[str, str]], *, stage: str, where: str
) -> None:
    """Refuse a module in which a declared dimension has become a number, or a number another one."""
    wrong = {
        f"{name}[{index}]": f"{shape}, declared {declared.get(name, {}).get(index, 'nothing')}"
        for name, inputs in found.items()
        for index, shape in inputs.items()
        if declared.get(name, {}).get(index) != shape
    }
    if wrong or set(found) != set(declared):
        text = json.dumps(wrong or {"functions": sorted(found)}, sort_keys=True)
        raise InputRefused(
            f"{where} holds other dimensions than the program: a stage specialized it silently ({text[:300]})",
            fix="choose another backend or optimization level",
            evidence={"input_signature": text, "guard": json.dumps(declared), "compile_event": where},
            stage=stage,
        )


def _dimension(part: str, sizes: Mapping[str, int]) -> str:
    return str(sizes[part]) if part in sizes else (part if part.isdigit() else "?")


def _by_name(passes: list[dict[str, Any]]) -> dict[str, int]:
    """Add up the microseconds of each pass; many run once a function."""
    spent: dict[str, int] = {}
    for entry in passes:
        spent[entry["name"]] = spent.get(entry["name"], 0) + entry["us"]
    return dict(sorted(spent.items(), key=lambda item: -item[1]))

"""How is a model prepared for XLA?  Exported program to StableHLO, then every bucket compiled in a child."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from manifests.canonical import canonical_bytes, digest
from runtime.backends import program as programs
from runtime.backends.build_process import BuildProcess
from runtime.backends.child_lowering import ChildLowering
from runtime.backends.contract import InputContract
from runtime.backends.errors import BackendRefused
from runtime.backends.jax_bridge import held_tensors
from runtime.backends.lowering import target, unknown
from runtime.backends.one_shot import OneShotModel, OneShotSpec
from runtime.backends.program import StepProgram
from runtime.backends.protocol import Boundary, LoadSpec
from runtime.backends.xla import (
    DEFAULT_LEVEL,
    DEFAULTS,
    DOCUMENT,
    EXECUTABLE,
    LAZY,
    LEVEL,
    PROGRAM,
    WEIGHTS,
    XlaExecutor,
    compile_options,
    load_xla,
    symbol_values,
)
from runtime.backends.xla_export import check_types, export_portable
from runtime.backends.xla_one_shot import BATCHES_FLAG, XlaOneShot, load_xla_one_shot
from runtime.backends.xla_platform import FLAGS, client
from runtime.backends.xla_program import dialect, read_module
from runtime.backends.xla_shapes import batch_plan, free_symbols, shapes_ahead, typical_shapes

POOL_SYMBOL = "P"


class XlaLowering(ChildLowering):
    """Stages 1 to 6 for XLA: the bridge, then one compile of all buckets in a child."""

    backend = "xla"
    _optimized: Mapping[str, Any]
    _lowered: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, str]:
        """Every flag with its value, defaults written out."""
        level = DEFAULT_LEVEL if self.options.optimization == "default" else self.options.optimization
        chosen = {**DEFAULTS, **self.options.flags, LEVEL: level}
        model = self.one_shot()
        if model is None:
            return chosen
        if free_symbols(model.contract) and "specialization" not in self.options.flags:
            chosen["specialization"] = LAZY
        return {**chosen, BATCHES_FLAG: ",".join(map(str, self._batches(model)))}

    @property
    def lazily(self) -> bool:
        """Whether the package compiles buckets at first use."""
        return self.settings["specialization"] == LAZY

    @property
    def buckets(self) -> dict[str, dict[str, int]]:
        """Each bucket by name, with the value of every symbol in it."""
        plan, model = self.options.buckets, self.one_shot()
        if model is not None:
            batches = self._batches(model)
            shapes = typical_shapes(model.contract, batches) if self.lazily else shapes_ahead(model.contract, batches)
            return {shape.name: shape.values() for shape in shapes}
        if plan is None:
            raise BackendRefused("xla compiles fixed shapes and was given no buckets", fix="declare a bucket plan")
        return {bucket.name: symbol_values(bucket, plan.pool) for bucket in plan.buckets()}

    def capture(self) -> Boundary:
        """Stage 1: the exported program, then its StableHLO form; every unsupported operator is named at once."""
        client(self.options.threads)  # refuses a bad XLA_FLAGS before XLA ends this process over it
        base = super().capture()
        model = self.one_shot()
        ranges = None if model is None else model.contract.symbols
        self._portable = export_portable(self.program.exported, self._names(), ranges=ranges)
        name = digest(self._portable.blob)
        versions = dialect()
        record = {
            **base.record,
            "exporter_version": f"jax.export {self.versions['jax']} over torch.export",
            "opset_or_dialect": f"StableHLO {versions['stablehlo']} (readers from {versions['oldest_readable']}), "
            f"calling conventions {versions['calling_conventions']}",
            "artifact_digest": name,
        }
        return Boundary({**base.emitted, "stablehlo": name}, record, base.timings)

    def represent(self) -> Boundary:
        """Stage 2: parse and verify the module, and count what it holds."""
        base = super().represent()
        self._module = module = read_module(self._portable.blob)
        record = {
            **base.record,
            "ir_version": f"StableHLO, calling convention {module.calling_convention}, {'/'.join(module.platforms)}",
            "node_count": {**base.record["node_count"], "stablehlo": sum(module.operations.values())},
            "validation_result": {"validator": "MLIR verifier, ExportedProgram.validate", "valid": True},
            "model_signature": {
                entry.name: {"dtype": entry.dtype, "shape": entry.text()} for entry in self._portable.inputs
            },
        }
        return Boundary({**base.emitted, "stablehlo_operators": module.operations}, record)

    def analyze(self) -> Boundary:
        """Stage 3: bounds as the module asserts them, and the census of element types."""
        base = super().analyze()
        module = self._module
        bounds = {name: limits for name, limits in module.bounds.items() if name != POOL_SYMBOL}
        declared = self.program.declared if self.one_shot() is None else self._symbols()
        programs.check_conserved(bounds, declared, stage="a03", where="the StableHLO module")
        check_types(module.types, self.program.exported, stage="a03")
        record = {
            **base.record,
            "dynamic_dimensions": {entry.name: entry.text() for entry in self._portable.inputs},
            "layout_decisions": {**base.record["layout_decisions"], "result_types": module.types},
        }
        return Boundary({**base.emitted, "types": module.types, "buckets": self.buckets}, record)

    def optimize(self) -> Boundary:
        """Stage 4: compile in a child; passes of one decode and one prefill bucket, memory and cost of all."""
        self._write()
        self._build = self._start()
        self._optimized = report = self._build.wait_for("optimized", stage="a04")
        self._partitioned = self._build.wait_for("partitioned", stage="a05")
        self._lowered = self._build.wait_for("lowered", stage="a06")
        comparison = self.compare(self._executor())
        if not comparison.within:
            raise BackendRefused(
                f"the compiled buckets differ from eager by {comparison.relative_rms:.2e} (relative root mean square)",
                fix="lower the optimization level, or prepare without fast_math",
                evidence={"validation_output": str(comparison.document())},
                stage="a04",
            )
        inspected: dict[str, Any] = report["inspected"]
        first = next(iter(inspected.values()))
        record = {
            "pass_list": [{"bucket": name, **entry} for name, found in inspected.items() for entry in found["passes"]],
            "graph_before": {"nodes": first["before"], **_each(inspected, "before")},
            "graph_after": {
                "nodes": first["after"],
                **_each(inspected, "after"),
                "fusions": _each(inspected, "fusions"),
            },
            "numerical_validation": comparison.document(),
            "estimated_memory_bytes": {
                "temporary": _each(report["buckets"], "temporary_bytes"),
                "flops": _each(report["buckets"], "flops"),
            },
            "optimization_us": {"total": report["elapsed_us"], "passes": _each(inspected, "times_us")},
        }
        emitted = {"hlo": _each(report["buckets"], "hlo"), "passes": self._passes()}
        return Boundary(emitted, record, {"optimization_us": report["elapsed_us"]})

    def partition(self) -> Boundary:
        """Stage 5: which instructions run as generated code, and which in a library that XLA calls."""
        per_bucket = _each(self._partitioned["buckets"], "owners")
        total: dict[str, Counter[str]] = {}
        for owners in per_bucket.values():
            for owner, operations in owners.items():
                total.setdefault(owner, Counter()).update(operations)
        record = {
            "partition_map": {
                owner: {"nodes": sum(counts.values()), "operators": dict(sorted(counts.items()))}
                for owner, counts in sorted(total.items())
            },
            "fallback_node_count": 0,
            "transfer_edges": [],
            "provider_versions": dict.fromkeys(sorted(total), f"jaxlib {self.versions['jaxlib']}"),
            "estimated_copy_bytes": 0,
        }
        return Boundary({"partition": per_bucket}, record)

    def lower(self) -> Boundary:
        """Stage 6: machine code of every bucket, and the file that holds it."""
        found: Mapping[str, Any] = self._lowered["buckets"]
        build_us = sum(entry["us"] for entry in found.values())
        record = {
            "target": {**target(), "instruction_sets": self._instruction_sets()},
            "compiler_flags": {
                **compile_options(self.settings[LEVEL], self.settings),
                FLAGS: os.environ.get(FLAGS, ""),
            },
            "code_size_bytes": sum(entry["code_bytes"] for entry in found.values()),
            "tuning_record": unknown("XLA's CPU compiler does not tune"),
            "kernel_inventory": {
                "generated": _each(found, "kernels"),
                "library": _each(self._partitioned["buckets"], "owners"),
                "executable_bytes": _each(found, "executable_bytes"),
            },
            "build_us": build_us,
        }
        executables = {} if self.lazily else {name: digest(path.read_bytes()) for name, path in self.files().items()}
        emitted = {"hlo": _each(self._optimized["buckets"], "hlo"), "files": executables}
        return Boundary(emitted, record, {"build_us": build_us})

    def files(self) -> Mapping[str, Path]:
        """Program, argument order and weights; the executables too, where they were made ahead of time."""
        names = [PROGRAM, DOCUMENT, WEIGHTS]
        if not self.lazily:
            names += [EXECUTABLE.format(name) for name in self.buckets]
        return {name: self.work / name for name in names}

    def compiler(self) -> Mapping[str, Any]:
        """Specialization, level and whatever XLA_FLAGS held are identity."""
        base = self.base_compiler()
        return {
            **base,
            "backend_version": self.versions["jaxlib"],
            "exporter": "jax.export",
            "exporter_version": self.versions["jax"],
            "optimization_level": self.settings[LEVEL],
            "passes": tuple(self._passes()),
            "flags": {**base["flags"], **self.settings, "xla_flags": os.environ.get(FLAGS, "")},
            "required_isa": () if self.lazily else tuple(self._instruction_sets()),
        }

    def _names(self) -> dict[str, str]:
        if self.one_shot() is not None:
            return dict(self.program.names)
        declared = self.program.declared
        names = {text: name for text, name in self.program.names.items() if name in declared}
        pool = next(node for node in self.program.exported.graph.nodes if node.name == "k_pool").meta["val"]
        (symbol,) = pool.shape[0].node.expr.free_symbols
        return {**names, str(symbol): POOL_SYMBOL}

    def _write(self) -> None:
        self._tensors = held_tensors(self.program.exported)
        (self.work / PROGRAM).write_bytes(self._portable.blob)
        (self.work / DOCUMENT).write_bytes(canonical_bytes(self._portable.document()))
        save_file(self._tensors, self.work / WEIGHTS, metadata={"format": "pt"})

    def _start(self) -> BuildProcess:
        buckets = self.buckets
        inspect = list(dict.fromkeys([next(iter(buckets)), next(reversed(buckets))]))  # one decodes, one prefills
        held = [
            [list(self._tensors[name].shape), str(self._tensors[name].dtype).removeprefix("torch.")]
            for name in self._portable.held
        ]
        return BuildProcess(
            "runtime.backends.xla_compile",
            {
                "program": str(self.work / PROGRAM),
                "document": str(self.work / DOCUMENT),
                "output": str(self.work),
                "file_name": EXECUTABLE,
                "dump": str(self.work / "dump"),
                "held": held,
                # what is compiled at first use needs no executable; two buckets show what the compiler does
                "buckets": {name: buckets[name] for name in inspect} if self.lazily else buckets,
                "inspect": inspect,
                "options": compile_options(self.settings[LEVEL], self.settings),
                "threads": self.options.threads,
            },
            self.work,
            environment={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": str(self.options.threads)},
            deadline_seconds=self.options.deadline_seconds,
            fix="lower the optimization level, declare fewer buckets, or use the onnxruntime backend",
        )

    def _batches(self, model: OneShotModel) -> tuple[int, ...]:
        plan = self.options.buckets
        return batch_plan(model.contract, None if plan is None else plan.decode)

    def _executor(self) -> XlaExecutor | XlaOneShot:
        model = self.one_shot()
        if model is None:
            return load_xla(self.work, self._spec())
        spec = OneShotSpec(
            contract=model.contract,
            precision=model.precision,
            flags=self.settings,
            threads=self.options.threads,
        )
        return load_xla_one_shot(self.work, spec)

    def _spec(self) -> LoadSpec:
        config = cast(StepProgram, self.program).checkpoint.config
        return LoadSpec(
            config=config,
            contract=InputContract.of(config, self.options.bounds),
            precision=self.options.precision,
            flags=self.settings,
            threads=self.options.threads,
            buckets=self.options.buckets,
        )

    def _passes(self) -> list[str]:
        names = [entry["name"] for found in self._optimized["inspected"].values() for entry in found["passes"]]
        return list(dict.fromkeys(names))

    def _instruction_sets(self) -> list[str]:
        found = {name for entry in self._lowered["buckets"].values() for name in entry["instruction_sets"]}
        return sorted(found)


def _each(entries: Mapping[str, Mapping[str, Any]], field: str) -> dict[str, Any]:
    return {name: entry[field] for name, entry in entries.items()}

"""How is a model prepared for ExecuTorch?  Edge dialect, XNNPACK partitions and a memory plan, in a child process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.backends import program as programs
from runtime.backends.build_process import BuildProcess
from runtime.backends.child_lowering import ChildLowering
from runtime.backends.executorch import ARENA, DECODE, PREFILL, PROGRAM, WHOLE
from runtime.backends.executorch_records import FALLBACK
from runtime.backends.lowering import target, unknown
from runtime.backends.protocol import Boundary
from runtime.backends.step_form import EXAMPLE

FLAGS = {
    "delegate": ("xnnpack", "none"),
    "memory_plan": ("greedy", "naive"),
    "methods": ("split", "single"),
}
"""Flags that a caller may set, with their values; the first is the default."""
NOMINAL = {"B": 8, "T": 128, "S": 128}
"""Sizes at which the bytes of crossing tensors are estimated; cut to the declared bounds."""
SMALLEST = 2
"""ExecuTorch writes a lower end of 1 as 2."""
DELEGATES = {"xnnpack": "XnnpackBackend"}


class ExecutorchLowering(ChildLowering):
    """Stages 4 to 6 for ExecuTorch: one compile in a child, which reports as it passes each stage."""

    backend = "executorch"
    step_kind = "whole_rows"
    _passes: tuple[str, ...] = ()
    _arena: int = 0

    @property
    def choices(self) -> dict[str, str]:
        """Every flag of this backend with its value."""
        return {name: self.options.flags.get(name, values[0]) for name, values in FLAGS.items()}

    def methods(self) -> list[dict[str, Any]]:
        """Name the program's methods, with the lower limits that each puts on the exporter's symbols.

        No limit is below the size that the program was traced with: the exporter holds that against the range.
        """
        symbols = {name: symbol for symbol, name in self.program.names.items()}
        if self.step_program is None or self.choices["methods"] == "single":
            return [{"name": WHOLE, "limits": {symbols[name]: most for name, most in self._closed().items()}}]
        batch, tokens, _, _ = EXAMPLE
        return [{"name": DECODE, "limits": {symbols["T"]: tokens}}, {"name": PREFILL, "limits": {symbols["B"]: batch}}]

    def optimize(self) -> Boundary:
        """Stage 4: graph passes to the edge dialect, up to the point where subgraphs are handed out."""
        source = self.work / "program.pt2"
        source.write_bytes(self.program.serialized)
        self._build = BuildProcess(
            "runtime.backends.executorch_compile",
            {
                **self.choices,
                "program": str(source),
                "output": str(self.work / PROGRAM),
                "methods": self.methods(),
                "symbols": dict(self.program.names),
                "nominal": self._nominal(),
                "threads": self.options.threads,
            },
            self.work,
            environment={"OMP_NUM_THREADS": str(self.options.threads), "PYTHONHASHSEED": "0"},
            deadline_seconds=self.options.deadline_seconds,
            fix="the message names what ExecuTorch cannot lower; use another backend, or the flag delegate=none",
        )
        report = self._build.wait_for("optimized", stage="a04")
        methods: dict[str, Any] = report["methods"]
        self._check_ranges(methods, stage="a04", where="the edge program")
        self._passes = tuple(entry["name"] for entry in report["passes"])
        record = {
            "pass_list": [{key: entry[key] for key in ("name", "before", "after")} for entry in report["passes"]],
            "graph_before": {"nodes": len(self.program.exported.graph.nodes)},
            "graph_after": {
                name: {"nodes": entry["nodes"], "operators": entry["operators"]} for name, entry in methods.items()
            },
            "numerical_validation": unknown("an edge program runs only once it is planned; compared at stage a09"),
            "estimated_memory_bytes": unknown("memory is planned when the program is emitted, at stage a06"),
            "optimization_us": {"total": report["elapsed_us"], "passes": _by_name(report["passes"])},
        }
        graphs = {name: entry["graph"] for name, entry in methods.items()}
        emitted = {"graphs": graphs, "passes": list(self._passes), "methods": self.choices["methods"]}
        return Boundary(emitted, record, {"optimization_us": report["elapsed_us"]})

    def partition(self) -> Boundary:
        """Stage 5: which nodes the delegate takes, which fall back to portable kernels, and what crosses."""
        report = self._running().wait_for("partitioned", stage="a05")
        methods: dict[str, Any] = report["methods"]
        self._check_ranges(methods, stage="a05", where="the partitioned program")
        owner = DELEGATES.get(self.choices["delegate"], FALLBACK)
        edges = [{"method": name, **edge} for name, entry in sorted(methods.items()) for edge in entry["edges"]]
        owned = {
            name: {
                **({owner: _owned(entry)} if owner != FALLBACK else {}),
                FALLBACK: {"nodes": entry["not_delegated"], "operators": entry["fallback_operators"]},
            }
            for name, entry in methods.items()
        }
        known = [edge["bytes"] for edge in edges if isinstance(edge["bytes"], int)]
        record = {
            "partition_map": owned,
            "fallback_node_count": sum(entry["not_delegated"] for entry in methods.values()),
            "transfer_edges": edges,
            "provider_versions": dict.fromkeys({owner, FALLBACK}, f"executorch {self.versions['executorch']}"),
            "estimated_copy_bytes": {
                "crossing": sum(known),
                "at": self._nominal(),
                "copied": unknown("delegates read and write the arena in place; the runtime counts no copies"),
            },
        }
        emitted = {name: [entry["graph"], entry["subgraphs"]] for name, entry in methods.items()}
        return Boundary({"partition": emitted, "delegate": self.choices["delegate"]}, record)

    def lower(self) -> Boundary:
        """Stage 6: delegates are compiled, memory is planned and the program is emitted."""
        report = self._running().wait_for("lowered", stage="a06")
        self._running().close()
        program = self.work / PROGRAM
        plans: dict[str, Any] = report["plans"]
        self._arena = sum(plan["arena_bytes"] for plan in plans.values())
        record = {
            "target": {**target(), "note": "XNNPACK and portable kernels are chosen when the program is loaded"},
            "compiler_flags": {**self.choices, "alloc_graph_input": "false", "check_ir_validity": "false"},
            "code_size_bytes": unknown("the program holds instructions for prebuilt kernels and no machine code"),
            "tuning_record": unknown("XNNPACK chooses microkernels by processor, without measuring"),
            "kernel_inventory": plans,
            "build_us": report["us"],
        }
        name = "sha256:" + hashlib.sha256(program.read_bytes()).hexdigest()
        return Boundary({"program": name, "plans": plans}, record, {"build_us": report["us"]})

    def files(self) -> Mapping[str, Path]:
        """The program, weights inside."""
        return {PROGRAM: self.work / PROGRAM}

    def compiler(self) -> Mapping[str, Any]:
        """The arena is among the flags: whoever loads the package must have that much memory."""
        base = self.base_compiler()
        return {
            **base,
            "backend_version": self.versions["executorch"],
            "optimization_level": "none",
            "passes": self._passes,
            "flags": {**base["flags"], **self.choices, ARENA: str(self._arena)},
        }

    def _closed(self) -> dict[str, int]:
        """Give the upper ends of dimensions for which the program itself has none: memory cannot be planned without."""
        one_shot = self.one_shot()
        closed = one_shot.contract.symbols if one_shot is not None else {}
        return {name: closed[name][1] for name, (_, most) in self.program.declared.items() if most is None}

    def _nominal(self) -> dict[str, int]:
        closed = self._closed()
        most = {name: closed.get(name) or high or 1 for name, (_, high) in self.program.declared.items()}
        return {name: min(NOMINAL.get(name, NOMINAL["B"]), high) for name, high in most.items()}

    def _check_ranges(self, methods: Mapping[str, Any], *, stage: str, where: str) -> None:
        """Refuse a method whose dynamic dimensions or bounds are not the declared ones: a silent specialization."""
        names = self.program.names
        for entry in self.methods():
            limits = {names[symbol]: most for symbol, most in entry["limits"].items()}
            declared = {
                name: [1 if (low or 0) <= SMALLEST else low, limits.get(name, high)]
                for name, (low, high) in self.program.declared.items()
            }
            # The pool's rows are a symbol of their own where the model has one layer; nobody declares them.
            kept: dict[str, list[int]] = methods[entry["name"]]["ranges"]
            found = {name: interval for name, interval in kept.items() if name in declared}
            programs.check_conserved(found, declared, stage=stage, where=f"{entry['name']} of {where}")


def _owned(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "nodes": entry["delegated"],
        "subgraphs": entry["subgraphs"],
        "operators": entry["delegated_operators"],
    }


def _by_name(passes: list[dict[str, Any]]) -> dict[str, int]:
    """Add up the microseconds of each pass; many run once a method."""
    spent: dict[str, int] = {}
    for entry in passes:
        spent[entry["name"]] = spent.get(entry["name"], 0) + entry["us"]
    return dict(sorted(spent.items(), key=lambda item: -item[1]))

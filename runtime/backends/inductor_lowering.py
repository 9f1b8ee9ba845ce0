"""How is a model prepared as compiled code?  AOTInductor in a child process, followed stage by stage."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.backends import program as programs
from runtime.backends.child_lowering import ChildLowering
from runtime.backends.inductor import PACKAGE
from runtime.backends.inductor_build import inductor_process
from runtime.backends.inductor_package import canonicalize, enforced_bounds, read_package
from runtime.backends.invariant import recipe_of
from runtime.backends.lowering import target, unknown
from runtime.backends.protocol import Boundary

SETTINGS = {
    "simdlen": "cpp.simdlen",
    "pattern_matcher": "pattern_matcher",
    "epilogue_fusion": "epilogue_fusion",
    "memory_planning": "memory_planning",
}
"""Flags that are settings of Inductor, and their names there; one that is not given keeps Inductor's own default."""
DEFAULT_LEVEL = "o3"
"""Kernels are compiled with -O3; Inductor has no other level that changes an ahead-of-time package."""


class InductorLowering(ChildLowering):
    """Stages 4 to 6 for AOTInductor: one compile in a child, which reports as it passes each stage."""

    backend = "inductor"
    _passes: tuple[str, ...] = ()
    _isa: str = ""
    _compiler: str = ""

    @property
    def freezing(self) -> bool:
        """Whether weights are folded in and packed; it changes linear layers from MKL to oneDNN kernels."""
        packed = self.options.batch_invariant and recipe_of(self.options.flags) == "tile"
        return self.options.flags.get("freezing", "true" if packed else "false") == "true"

    @property
    def settings(self) -> dict[str, int | bool]:
        """Settings of Inductor that were asked for."""
        asked = {SETTINGS[name]: text for name, text in self.options.flags.items() if name in SETTINGS}
        return {name: int(text) if text.isdigit() else text == "true" for name, text in asked.items()}

    def optimize(self) -> Boundary:
        """Stage 4: graph passes, up to the point where operations are scheduled."""
        source = self.work / "program.pt2"
        source.write_bytes(self.program.serialized)
        self._build = inductor_process(
            {
                "program": str(source),
                "output": str(self.work / PACKAGE),
                "freezing": self.freezing,
                "settings": self.settings,
                "examples": [
                    [str(value.dtype).removeprefix("torch."), list(value.shape)] for value in self.program.inputs
                ],
                "metadata": {
                    "replaylab.source": self.program.digest,
                    **{
                        f"replaylab.range.{name}": f"{low},{'' if high is None else high}"
                        for name, (low, high) in self.program.declared.items()
                    },
                },
            },
            self.work,
            threads=self.options.threads,
            deadline_seconds=self.options.deadline_seconds,
        )
        report = self._build.wait_for("optimized", stage="a04")
        self._passes = tuple(entry["name"] for entry in report["passes"])
        record = {
            "pass_list": report["passes"],
            "graph_before": {"nodes": len(self.program.exported.graph.nodes)},
            "graph_after": {"nodes": report["nodes"], "operators": report["operators"]},
            "numerical_validation": unknown("the graph runs only once it is code; compared with eager at stage a09"),
            "estimated_memory_bytes": {
                "weights": sum(tensor.nbytes for tensor in self.program.exported.state_dict.values()),
                "activations": unknown("Inductor plans memory per call for dynamic shapes"),
            },
            "optimization_us": {"total": report["elapsed_us"], "passes": report["pass_us"]},
        }
        emitted = {"graph": report["graph"], "passes": list(self._passes)}
        return Boundary(emitted, record, {"optimization_us": report["elapsed_us"]})

    def partition(self) -> Boundary:
        """Stage 5: which operations get generated code and which a library's kernel."""
        report = self._running().wait_for("partitioned", stage="a05")
        owners: dict[str, dict[str, int]] = report["owners"]
        counts = {name: sum(operators.values()) for name, operators in owners.items()}
        record = {
            "partition_map": {
                name: {"nodes": counts[name], "operators": operators} for name, operators in owners.items()
            },
            "fallback_node_count": counts["library"],
            "transfer_edges": [],
            "provider_versions": {"generated": f"inductor {torch.__version__}", "library": _library_versions()},
            "estimated_copy_bytes": 0,
        }
        return Boundary({"partition": owners}, record)

    def lower(self) -> Boundary:
        """Stage 6: C++ is generated and compiled; bounds must stand in the compiled checks."""
        report = self._running().wait_for("lowered", stage="a06")
        self._running().close()
        package = self.work / PACKAGE
        canonicalize(package)
        contents = read_package(package)
        programs.check_conserved(
            enforced_bounds(contents["limits"], programs.signature(self.program)),
            {name: [high] for name, (_, high) in self.program.declared.items() if high is not None},
            stage="a06",
            where="the compiled package's checks",
        )
        self._isa, self._compiler = contents["isa"], report["compiler"]
        build_us = sum(entry["us"] for entry in report["commands"])
        record = {
            "target": {**target(), "aoti_isa": contents["isa"]},
            "compiler_flags": {
                "compiler": self._compiler,
                "flags": sorted({flag for entry in report["commands"] for flag in entry["flags"]}),
            },
            "code_size_bytes": contents["code_bytes"],
            "tuning_record": unknown("autotuning is off: it would make the build depend on measured times"),
            "kernel_inventory": {
                "generated": report["kernels"],
                "library": contents["library"],
                "openmp_regions": contents["openmp_regions"],
            },
            "build_us": build_us,
        }
        emitted = {"package": "sha256:" + hashlib.sha256(package.read_bytes()).hexdigest()}
        return Boundary(emitted, record, {"build_us": build_us})

    def files(self) -> Mapping[str, Path]:
        """The AOTInductor package, weights inside."""
        return {PACKAGE: self.work / PACKAGE}

    def compiler(self) -> Mapping[str, Any]:
        """Freezing and the kernels it selects are identity."""
        base = self.base_compiler()
        return {
            **base,
            "backend_version": self.versions["torch"],
            "optimization_level": DEFAULT_LEVEL,
            "passes": self._passes,
            "flags": {**base["flags"], "freezing": str(self.freezing).lower(), "isa": self._isa, "cxx": self._compiler},
            "required_isa": tuple(self._isa.split()),
        }


def _library_versions() -> str:
    found = re.findall(r"(?:oneAPI Math Kernel Library|MKL-DNN|OpenMP)[^\n]*", torch.__config__.show())
    return "; ".join(entry.strip() for entry in found)[:300]

"""What do stages 1 to 3 record for every backend?  They work on the exported program, whatever comes after."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from manifests.canonical import digest
from runtime.backends import program as programs
from runtime.backends.errors import BackendRefused, BuildFailed
from runtime.backends.invariant import RECIPE, recipe_of, tile_of
from runtime.backends.inventory import without_kernel
from runtime.backends.program import StepProgram
from runtime.backends.protocol import Boundary, BuildOptions


def unknown(reason: str) -> dict[str, str]:
    """Say that a toolchain cannot tell a field, and why; never a zero in its place."""
    return {"unknown": reason}


class ExportedLowering:
    """Stages 1 to 3 on the exported program; backends add their own form of it and stages 4 to 6."""

    backend = ""

    def __init__(self, model_folder: Path, work: Path, options: BuildOptions, *, versions: Mapping[str, str]) -> None:
        self.model_folder, self.work, self.options = model_folder, work, options
        self.versions = dict(versions)
        self._program: StepProgram | None = None

    @property
    def program(self) -> StepProgram:
        """The captured program; available after stage 1."""
        if self._program is None:
            raise BackendRefused("stage a01 has not run", fix="call the stages in order")
        return self._program

    @property
    def query_tile(self) -> int | None:
        """The tile of queries of a batch-invariant step; None for the plain step."""
        return tile_of(self.options.flags, self.backend) if self.options.batch_invariant else None

    def capture(self) -> Boundary:
        """Stage 1: checkpoint to exported program."""
        self._program = program = programs.capture_program(self.model_folder, self.options, tile=self.query_tile)
        record = {
            "exporter_version": f"torch.export {torch.__version__}",
            "source_framework": f"torch {torch.__version__} ({program.checkpoint.config.family})",
            "opset_or_dialect": f"{program.exported.dialect}, schema {_schema_version()}",
            "warnings": list(program.warnings),
            "unsupported_nodes": without_kernel(program.exported),
            "artifact_digest": program.digest,
        }
        emitted = {"program": program.digest, "model": program.checkpoint.digest}
        return Boundary(emitted, record, {"trace_us": program.trace_us})

    def represent(self) -> Boundary:
        """Stage 2: validate the program and describe it."""
        exported = self.program.exported
        try:
            exported.validate()
        except Exception as error:  # SpecViolationError is private
            raise BuildFailed(
                f"the exported program is not valid: {error}",
                fix="export the model again",
                evidence={"validation_output": str(error)[:500]},
                stage="a02",
            ) from error
        record = {
            "ir_version": f"{exported.dialect}, schema {_schema_version()}",
            "node_count": {"training_ir": len(exported.graph.nodes)},
            "parameter_count": sum(tensor.numel() for tensor in exported.parameters()),
            "control_flow_inventory": programs.control_flow(exported),
            "validation_result": {"validator": "ExportedProgram.validate", "valid": True},
            "model_signature": programs.signature(exported),
        }
        operators = programs.histogram(exported)
        return Boundary({"graph": digest(str(exported.graph).encode()), "operators": operators}, record)

    def analyze(self) -> Boundary:
        """Stage 3: constraints of the program against the declared ones, and the key that names a specialization."""
        exported, options = self.program.exported, self.options
        found = programs.ranges(exported)
        programs.check_conserved(found, options.program_bounds, stage="a03", where="the exported program")
        guards = sorted(str(guard) for guard in getattr(exported, "_guards_code", ()))
        key = digest(
            {
                "program": self.program.digest,
                "backend": self.backend,
                "versions": self.versions,
                "symbols": options.bounds.symbols(),
                "optimization": options.optimization,
                "flags": dict(options.flags),
                "batch_invariant": options.batch_invariant,
                "threads": options.threads,
                "isa": torch.backends.cpu.get_cpu_capability(),
                **({"buckets": options.buckets.document()} if options.buckets else {}),
            }
        )
        record = {
            "shape_profile": {
                "symbols": found,
                "pool_slots": list(programs.POOL_SLOTS),
                **({"buckets": [entry.name for entry in options.buckets.buckets()]} if options.buckets else {}),
            },
            "guard_count": len(guards),
            "dynamic_dimensions": {
                name: entry["shape"] for name, entry in programs.signature(exported).items() if name != "v_pool"
            },
            "layout_decisions": {
                "k_pool": "flat rows layer*P+slot, row-major",
                "v_pool": "flat rows layer*P+slot, row-major",
                "inputs_contiguous": all(entry["contiguous"] for entry in programs.signature(exported).values()),
            },
            "specialization_cache_key": key,
        }
        # the key also holds what later stages decide: it is recorded here, but a change of theirs is a change there
        assumed = {"symbols": found, "guards": guards, "layouts": record["layout_decisions"]}
        return Boundary(assumed, record)

    def base_compiler(self) -> dict[str, Any]:
        """Give the compiler manifest's fields that every backend shares."""
        recipe: dict[str, str] = {}
        if self.options.batch_invariant:
            recipe = {RECIPE: recipe_of(self.options.flags), "query_tile": str(self.query_tile)}
        return {
            "backend": self.backend,
            "precision": self.options.precision,
            "exporter": "torch.export",
            "exporter_version": str(torch.__version__),
            "flags": {
                "norm": self.options.norm,
                "build_threads": str(self.options.threads),
                **self.options.flags,
                **recipe,
            },
            "batch_invariant": self.options.batch_invariant,
            "runtime_versions": self.versions,
        }

    def close(self) -> None:
        """Release the program."""
        self._program = None


def target() -> dict[str, str]:
    """Describe what code is made for: operating system, architecture and vector instructions of this machine."""
    return {
        "triple": f"{platform.machine()}-unknown-{platform.system().lower()}",
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def _schema_version() -> str:
    from torch._export.serde.schema import SCHEMA_VERSION

    return ".".join(str(part) for part in SCHEMA_VERSION)

"""What do stages 1 to 3 record for every backend?  They work on the exported program, whatever comes after."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from manifests.canonical import digest
from runtime.backends import program as programs
from runtime.backends.comparison import Comparison
from runtime.backends.errors import BackendRefused, BuildFailed
from runtime.backends.fixture import compare_with_reference, run_fixture
from runtime.backends.invariant import RECIPE, recipe_of, tile_of
from runtime.backends.inventory import without_kernel
from runtime.backends.one_shot import OneShotExecutor, OneShotModel
from runtime.backends.program import CapturedProgram, StepProgram
from runtime.backends.protocol import Boundary, BuildOptions, Executor
from runtime.backends.saved_program import SavedProgram, call_program, capture_saved
from runtime.backends.step_form import POOL_SLOTS, MakeForm, gathered_form
from runtime.backends.tensor_contract import Arrays
from runtime.models.loader import StepKind
from runtime.models.source import ModelKind, kind_of


def unknown(reason: str) -> dict[str, str]:
    """Say that a toolchain cannot tell a field, and why; never a zero in its place."""
    return {"unknown": reason}


class ExportedLowering:
    """Stages 1 to 3 on the exported program; backends add their own form of it and stages 4 to 6."""

    backend = ""
    step_kind: StepKind = "plain"
    """How the backend's decoder reads its context."""
    make_form: MakeForm = staticmethod(gathered_form)
    """The form of the step that goes with it."""

    def __init__(self, model_folder: Path, work: Path, options: BuildOptions, *, versions: Mapping[str, str]) -> None:
        self.model_folder, self.work, self.options = model_folder, work, options
        self.versions = dict(versions)
        self._program: CapturedProgram | None = None
        self._one_shot: OneShotModel | None = None

    @property
    def program(self) -> CapturedProgram:
        """The captured program; available after stage 1."""
        if self._program is None:
            raise BackendRefused("stage a01 has not run", fix="call the stages in order")
        return self._program

    @property
    def query_tile(self) -> int | None:
        """The tile of queries of a batch-invariant step; None for the plain step."""
        return tile_of(self.options.flags, self.backend) if self.options.batch_invariant else None

    @property
    def step_program(self) -> StepProgram | None:
        """The captured program where it is a decoder's step; None for a one-shot model."""
        return self.program if isinstance(self.program, StepProgram) else None

    def one_shot(self) -> OneShotModel | None:
        """The model where one call answers a request; None for a decoder.  Available after stage 1."""
        return self._one_shot

    def compare(self, executor: Executor | OneShotExecutor) -> Comparison:
        """Run the model's fixture on an executor of it, and compare with the reference."""
        model = self.one_shot()
        if model is not None:
            return model.compare(cast(OneShotExecutor, executor))
        return compare_with_reference(cast(Executor, executor), self.model_folder)

    def exercise(self, executor: Executor | OneShotExecutor) -> None:
        """Run the model's fixture on an executor of it, for a profile."""
        model = self.one_shot()
        if model is None:
            run_fixture(cast(Executor, executor))
            return
        for case in model.cases():
            cast(OneShotExecutor, executor).run(case.inputs)

    def capture(self) -> Boundary:
        """Stage 1: checkpoint or saved program to exported program."""
        kind, path = kind_of(self.model_folder)
        if kind is ModelKind.PROGRAM:
            self._program = program = capture_saved(path, self.options)
            self._one_shot = saved_model(program, path.stem)
        else:
            self._program = program = programs.capture_program(
                path, self.options, tile=self.query_tile, kind=self.step_kind, make_form=self.make_form
            )
        record = {
            "exporter_version": f"torch.export {torch.__version__}",
            "source_framework": f"torch {torch.__version__} ({program.framework})",
            "opset_or_dialect": f"{program.exported.dialect}, schema {_schema_version()}",
            "warnings": list(program.warnings),
            "unsupported_nodes": without_kernel(program.exported),
            "artifact_digest": program.digest,
        }
        emitted = {"program": program.digest, "model": program.model_digest}
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
            "model_signature": programs.signature(self.program),
        }
        operators = programs.histogram(exported)
        return Boundary({"graph": digest(str(exported.graph).encode()), "operators": operators}, record)

    def analyze(self) -> Boundary:
        """Stage 3: constraints of the program against the declared ones, and the key that names a specialization."""
        exported, options = self.program.exported, self.options
        found = programs.ranges(self.program)
        programs.check_conserved(found, self.program.declared, stage="a03", where="the exported program")
        guards = sorted(str(guard) for guard in getattr(exported, "_guards_code", ()))
        key = digest(
            {
                "program": self.program.digest,
                "backend": self.backend,
                "versions": self.versions,
                "symbols": self._symbols(),
                "optimization": options.optimization,
                "flags": dict(options.flags),
                "batch_invariant": options.batch_invariant,
                "threads": options.threads,
                "isa": torch.backends.cpu.get_cpu_capability(),
                **({"buckets": options.buckets.document()} if options.buckets else {}),
            }
        )
        described = programs.signature(self.program)
        record = {
            "shape_profile": self._shape_profile(found),
            "guard_count": len(guards),
            "dynamic_dimensions": {name: entry["shape"] for name, entry in described.items() if name != "v_pool"},
            "layout_decisions": {
                **(self.step_program.layout if self.step_program else {}),
                "inputs_contiguous": all(entry["contiguous"] for entry in described.values()),
            },
            "specialization_cache_key": key,
        }
        # the key also holds what later stages decide: it is recorded here, but a change of theirs is a change there
        assumed = {"symbols": found, "guards": guards, "layouts": record["layout_decisions"]}
        return Boundary(assumed, record)

    def _symbols(self) -> dict[str, list[int]]:
        """The ranges that calls are held to: a one-shot program's own may be wider, or have no end."""
        if self._one_shot is None:
            return self.options.bounds.symbols()
        return {name: list(found) for name, found in self._one_shot.contract.symbols.items()}

    def _shape_profile(self, found: Mapping[str, Any]) -> dict[str, Any]:
        if self._one_shot is None:
            buckets = self.options.buckets
            planned = {"buckets": [entry.name for entry in buckets.buckets()]} if buckets else {}
            return {"symbols": found, "pool_slots": list(POOL_SLOTS), **planned}
        return {"symbols": self._symbols(), "program": found, "index_ranges": index_ranges_of(self._one_shot)}

    def base_compiler(self) -> dict[str, Any]:
        """Give the compiler manifest's fields that every backend shares."""
        recipe: dict[str, str] = {}
        if self.options.batch_invariant:
            recipe = {RECIPE: recipe_of(self.options.flags), "query_tile": str(self.query_tile)}
        norm = {} if self.step_program is None else {"norm": self.options.norm}
        return {
            "backend": self.backend,
            "precision": self.options.precision,
            "exporter": "torch.export",
            "exporter_version": str(torch.__version__),
            "flags": {**norm, "build_threads": str(self.options.threads), **self.options.flags, **recipe},
            "batch_invariant": self.options.batch_invariant,
            "runtime_versions": self.versions,
        }

    def close(self) -> None:
        """Release the program."""
        self._program = self._one_shot = None


def saved_model(program: SavedProgram, name: str) -> OneShotModel:
    """Describe a saved program as a one-shot model whose reference is eager torch."""
    rules, call = program.contract.inputs, call_program(program.exported)

    def reference(inputs: Arrays) -> dict[str, Any]:
        tensors = [torch.from_numpy(np.array(inputs[rule.name], order="C")) for rule in rules]
        with torch.inference_mode():
            return {out: value.numpy() for out, value in zip(program.output_names, call(tensors), strict=True)}

    return OneShotModel(
        kind=ModelKind.PROGRAM,
        name=name,
        digest=program.model_digest,
        contract=program.contract,
        precision=program.precision,
        reference=reference,
        reference_name=lambda: "eager float32" if program.precision == "float32" else f"eager {program.precision}",
    )


def index_ranges_of(model: OneShotModel) -> dict[str, Any]:
    """Say which range each integer input's values must lie in, or that the graph tells none."""
    return {
        rule.name: list(rule.index_range) if rule.index_range else unknown("no lookup by this input in the graph")
        for rule in model.contract.inputs
        if rule.dtype.startswith(("int", "uint"))
    }


def target() -> dict[str, str]:
    """Describe what code is made for: operating system, architecture and vector instructions of this machine."""
    return {
        "triple": f"{platform.machine()}-unknown-{platform.system().lower()}",
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def _schema_version() -> str:
    from torch._export.serde.schema import SCHEMA_VERSION

    return ".".join(str(part) for part in SCHEMA_VERSION)

"""How the stages 1 to 6 are made to fail: defects planted in a model, a graph, a pass, a provider or a compiler."""

from __future__ import annotations

import dataclasses
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from runtime.backends import onnx_graph
from runtime.backends.eager_lowering import EagerLowering
from runtime.backends.lowering import ExportedLowering
from runtime.backends.onnxruntime import open_session, session_options
from runtime.backends.onnxruntime_passes import Rewriting
from runtime.backends.step_form import StepForm, gathered_form
from tests.runtime.prepare.broken_models import (
    Branches,
    Counts,
    Draws,
    Drifts,
    Eigenvalues,
    Remembers,
    onnx_with,
    with_foreign_node,
)
from tests.runtime.prepare.failure_table import A, Bench, C, Row, S, T, X, small_files


def planted(kind: type[Any], backend: str = "eager", **flags: str) -> Callable[[Bench], None]:
    """Prepare a decoder with a defect."""

    def provoke(bench: Bench) -> None:
        bench.decoder(kind)
        bench.prepare(backend, flags=flags)

    return provoke


def capture_rows() -> list[Row]:
    """Stage 1."""

    def without_weights(bench: Bench) -> None:
        folder = Path(shutil.copytree(bench.model, bench.work / "model"))
        (folder / "model.safetensors").unlink()
        bench.prepare(model=folder)

    def of_another_kind(bench: Bench) -> None:
        folder = Path(shutil.copytree(bench.model, bench.work / "model"))
        path = folder / "config.json"
        path.write_text(path.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
        bench.prepare(model=folder)

    def row(
        what: str,
        provoke: Callable[[Bench], None],
        backend: str = "eager",
        error: str = "build_failed",
        said: str | None = None,
    ) -> Row:
        facts = {} if said is None else {"operator_details": said}
        return Row(
            stage="a01",
            what=what,
            backend=backend,
            failure_class=A,
            error=error,
            provoke=provoke,
            keeps=True,
            facts=facts,
        )

    return [
        row("control flow that depends on a value", planted(Branches), said="data-dependent"),
        row("hidden side effect: a counter", planted(Counts), error="backend_refused", said="calls"),
        row("hidden side effect: a growing list", planted(Remembers), error="backend_refused", said="seen"),
        row("randomness that export would freeze", planted(Draws), error="backend_refused"),
        row(
            "operator that ONNX lacks",
            planted(Eigenvalues, "onnxruntime", context="gathered"),
            "onnxruntime",
            said="linalg_eig",
        ),
        row("weights are missing", without_weights, error="model_refused"),
        row("architecture that is not supported", of_another_kind, error="model_refused"),
        row(
            "precision that the backend lacks",
            lambda bench: bench.prepare("onnxruntime", precision="bfloat16"),
            "onnxruntime",
            "backend_refused",
        ),
    ]


def represent_rows() -> list[Row]:
    """Stage 2."""

    def foreign(bench: Bench) -> None:
        represent = ExportedLowering.represent

        def damaged(self: Any) -> Any:
            with_foreign_node(self.program.exported)
            return represent(self)

        bench.patch.setattr(ExportedLowering, "represent", damaged)
        bench.prepare()

    def checked(change: str) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            onnx_graph.check_model(onnx_with(change, onnx.load_model_from_string(bench.captured_onnx().data)))

        return provoke

    changes = {
        "unresolved reference": "nowhere",
        "duplicate output": "SSA",
        "cycle": "sorted",
        "unknown operator": "Frobnicate",
        "opset 99": "opset 99",
        "IR version 99": "IR version 99",
        "element type": "",
    }
    return [
        Row(
            stage="a02",
            what="a node that is no operator of the exported dialect",
            backend="eager",
            failure_class=A,
            error="build_failed",
            provoke=foreign,
            keeps=True,
        ),
        *(
            Row(
                stage="a02",
                what=change,
                backend="onnxruntime",
                failure_class=A,
                error="build_failed",
                provoke=checked(change),
                facts={"validation_output": said},
            )
            for change, said in changes.items()
        ),
    ]


def analyze_rows() -> list[Row]:
    """Stage 3."""

    def static_batch(bench: Bench) -> None:
        def narrowed(*given: Any) -> StepForm:
            form = gathered_form(*given)
            kept = [{axis: dim for axis, dim in one.items() if dim.__name__ != "B"} for one in form.dynamic_shapes]
            return dataclasses.replace(form, dynamic_shapes=tuple(kept))

        bench.patch.setattr(ExportedLowering, "make_form", staticmethod(narrowed))
        bench.prepare()

    def smaller_bound(bench: Bench) -> None:
        def narrowed(config: Any, precision: str, bounds: Any) -> StepForm:
            less = gathered_form(config, precision, dataclasses.replace(bounds, max_tokens=48))
            return dataclasses.replace(less, bounds=bounds)

        bench.patch.setattr(ExportedLowering, "make_form", staticmethod(narrowed))
        bench.prepare()

    def checked(change: str) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            model = onnx_with(change, onnx.load_model_from_string(bench.captured_onnx().data))
            captured = bench.captured_onnx()
            onnx_graph.check_dimensions(model, captured.expected, captured.declared, stage="a03")

        return provoke

    def row(what: str, provoke: Callable[[Bench], None], backend: str = "eager") -> Row:
        keeps = backend == "eager"
        return Row(
            stage="a03",
            what=what,
            backend=backend,
            failure_class=S,
            error="input_refused",
            provoke=provoke,
            keeps=keeps,
        )

    return [
        row("silent specialization: the batch is the example's", static_batch),
        row("a bound that is smaller than the declared one", smaller_bound),
        row("silent specialization in the ONNX form", checked("specialized batch"), "onnxruntime"),
        row("bounds lost in the ONNX form", checked("lost bounds"), "onnxruntime"),
    ]


def optimize_rows() -> list[Row]:
    """Stage 4."""

    def rewritten(change: Callable[[onnx.ModelProto], None]) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            rewrite = Rewriting.rewrite

            def and_more(self: Any, source: Path, target: Path) -> Any:
                found = rewrite(self, source, target)
                model = onnx.load(str(target))
                change(model)
                onnx.save(model, str(target))
                return found

            bench.patch.setattr(Rewriting, "rewrite", and_more)
            bench.prepare("onnxruntime")

        return provoke

    def rounded(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                values = onnx.numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    def subtracts(model: onnx.ModelProto) -> None:
        made = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.output}
        for node in model.graph.node:
            if node.op_type == "Add" and made & set(node.input):
                node.op_type = "Sub"

    def row(what: str, provoke: Callable[[Bench], None], backend: str, **changes: Any) -> Row:
        given = {"failure_class": A, "error": "backend_refused", "keeps": True, **changes}
        return Row(stage="a04", what=what, backend=backend, provoke=provoke, **given)

    return [
        row("numerical drift: weights rounded to float16", rewritten(rounded), "onnxruntime"),
        row("a pass that turns an addition into a subtraction", rewritten(subtracts), "onnxruntime", slow=True),
        row("numerical drift: answers off by a thousandth", planted(Drifts), "eager"),
        row(
            "compilation passes its deadline",
            lambda bench: bench.prepare("inductor", deadline_seconds=1),
            "inductor",
            failure_class=T,
            error="build_timed_out",
        ),
    ]


def partition_rows() -> list[Row]:
    """Stage 5."""

    def falls_back(bench: Bench) -> None:
        """Claim the provider, so that ONNX Runtime is really asked for it and really runs without it."""
        claimed = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
        bench.patch.setattr(onnxruntime, "get_available_providers", lambda: claimed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all that ONNX Runtime itself has to say
            bench.prepare("onnxruntime", providers=("CUDAExecutionProvider", "CPUExecutionProvider"))

    def no_kernel(bench: Bench) -> None:
        value = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node("Relu", ["x"], ["y"])
        kind = onnx.TensorProto.INT16
        graph = onnx.helper.make_graph([node], "relu", [value("x", kind, [2])], [value("y", kind, [2])])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=10)
        path = bench.work / "model.onnx"
        path.write_bytes(model.SerializeToString())
        bench.at("a05", lambda: open_session(path, session_options(threads=1, settings={}), ("CPUExecutionProvider",)))

    def row(what: str, provoke: Callable[[Bench], None], error: str = "provider_mismatch", **more: Any) -> Row:
        return Row(stage="a05", what=what, backend="onnxruntime", failure_class=A, error=error, provoke=provoke, **more)

    def asked(provider: str) -> Callable[[Bench], None]:
        return lambda bench: bench.prepare("onnxruntime", providers=(provider,))

    return [
        row("provider is not installed", asked("CUDAExecutionProvider"), keeps=True),
        row("provider that nobody knows", asked("FrobnicateExecutionProvider"), keeps=True, slow=True),
        row("provider falls back in silence", falls_back, keeps=True, facts={"provider_log": "actual"}),
        row("operator without a kernel on the provider", no_kernel, "build_failed"),
    ]


def lower_rows() -> list[Row]:
    """Stage 6."""

    def disk_full(bench: Bench) -> None:
        lower = EagerLowering.lower

        def confined(self: Any) -> Any:
            with small_files(20_000):
                return lower(self)

        bench.patch.setattr(EagerLowering, "lower", confined)
        bench.prepare()

    def compiler(script: str) -> Callable[[Bench], None]:
        def provoke(bench: Bench) -> None:
            path = bench.work / "cxx"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
            bench.patch.setenv("CXX", str(path))
            bench.prepare("inductor")

        return provoke

    def nowhere(bench: Bench) -> None:
        bench.patch.setenv("CXX", str(bench.work / "nowhere"))
        bench.prepare("inductor")

    def row(what: str, provoke: Callable[[Bench], None], backend: str = "inductor", **changes: Any) -> Row:
        given = {"failure_class": A, "error": "build_failed", "keeps": True, **changes}
        return Row(stage="a06", what=what, backend=backend, provoke=provoke, **given)

    forward = 'case "$*" in *.kernel.cpp*|*wrapper.cpp*) {} ;; *) exec g++ "$@" ;; esac'
    return [
        row("disk full", disk_full, "eager", failure_class=C, error="capacity_exhausted"),
        row("the C++ compiler is not there", nowhere, slow=True),
        row("the C++ compiler fails on generated code", compiler(forward.format("exit 4")), slow=True),
        row(
            "the compiling process crashes",
            compiler(forward.format("kill -SEGV $PPID; sleep 5")),
            failure_class=X,
            error="execution_failed",
            slow=True,
        ),
    ]


def rows() -> list[Row]:
    """Stages 1 to 6."""
    return [
        *capture_rows(),
        *represent_rows(),
        *analyze_rows(),
        *optimize_rows(),
        *partition_rows(),
        *lower_rows(),
    ]

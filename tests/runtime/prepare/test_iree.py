"""IREE: what its nine records hold, that its builds repeat, and that every fault of its compiler is classified."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from runtime.backends import iree_lowering, registry
from runtime.backends.buckets import BucketPlan
from runtime.backends.build_process import BuildProcess
from runtime.backends.eager import EagerExecutor
from runtime.backends.errors import BackendRefused, BuildFailed, ExecutionFailed, InputRefused
from runtime.backends.iree import MODULE, device_of, open_module
from runtime.backends.iree_compile import CompilerFailed, run_compiler
from runtime.backends.iree_lowering import check_dimensions
from runtime.backends.iree_records import compiled_dimensions, imported_dimensions, required_flags
from runtime.backends.protocol import BuildOptions
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from runtime.probe import processor_flags
from tests.runtime.prepare.conftest import BOUNDS
from tests.runtime.prepare.test_pipeline import random_inputs
from traces.failures import ClassifiedError, FailureClass

Prepared = Callable[..., PreparedPackage]
PLAN = BucketPlan(decode=(1, 4), tokens=(20,), context=(32,))


def record_of(package: PreparedPackage, stage: str) -> dict[str, Any]:
    return dict(next(report.record for report in package.reports if report.stage.value == stage))


def step_at(executor: Any, batch: int, tokens: int, context: int, pool: Any) -> Any:
    """Step on random inputs of a shape."""
    return executor.step(*random_inputs(executor, batch, tokens, context, pool.num_slots), pool)


def compile_program(program: Any, work: Path, *flags: str) -> BuildProcess:
    """Compile a program of the test's own in the child."""
    torch.export.save(program, work / "program.pt2")
    request = {
        "program": str(work / "program.pt2"),
        "output": str(work / MODULE),
        "work": str(work),
        "functions": [{"name": "main", "sizes": {}}],
        "flags": ["--iree-hal-target-backends=llvm-cpu", *flags],
    }
    return BuildProcess(
        "runtime.backends.iree_compile", request, work, environment={}, deadline_seconds=120, fix="another backend"
    )


def test_the_table_of_flags_is_the_lowering_s() -> None:
    assert registry.IREE.flags == iree_lowering.FLAGS
    assert registry.IREE.levels == iree_lowering.LEVELS


def test_the_records_come_from_the_compiler(prepared: Prepared) -> None:
    package = prepared("iree", "float32")
    partition, lowered = record_of(package, "a05"), record_of(package, "a06")
    owned = partition["partition_map"]["llvm-cpu"]
    assert owned["dispatches"] == lowered["kernel_inventory"]["dispatches"] > 20
    assert any("matmul" in name for name in owned["executables"])
    assert lowered["kernel_inventory"]["executables"] == owned["executables"]
    assert lowered["kernel_inventory"]["constant_bytes"] > 4 * 100_000, "the weights are constants of the module"
    assert 10_000 < lowered["code_size_bytes"] < 2_000_000
    assert lowered["target"]["format"].startswith("embedded-elf")
    optimized = record_of(package, "a04")
    assert "ConvertTorchToLinalg" in optimized["pass_list"]
    assert optimized["optimization_us"]["passes"]["ConvertTorchToLinalg"] > 0
    assert optimized["graph_after"]["operators"]["linalg.generic"] > 50
    assert not any(name.startswith("torch.") for name in optimized["graph_after"]["operators"])


def test_the_required_instruction_sets_are_in_the_envelope(prepared: Prepared) -> None:
    package = prepared("iree", "float32")
    features = record_of(package, "a06")["target"]["cpu_features"]
    envelope = package.manifest.envelope["isa"]
    assert tuple(envelope) == required_flags(features)
    assert set(envelope) <= processor_flags()
    assert required_flags("+avx2,+fma,-fma,+x87") == ("avx2",), "a later minus takes back an earlier plus"


def test_buckets_are_functions_that_share_their_weights(prepared: Prepared, model_folder: Path, tmp_path: Path) -> None:
    """Padding into a bucket changes no answer beyond the tolerance; what no bucket covers is refused."""
    store = PackageStore(tmp_path)
    package = prepare(model_folder, backend="iree", store=store, options=BuildOptions(bounds=BOUNDS, buckets=PLAN))
    model, reference = load_package(store, package.digest), EagerExecutor.from_checkpoint(model_folder, bounds=BOUNDS)
    ours, theirs = model.executor.new_pool(40), reference.new_pool(40)
    for batch, tokens, context in ((1, 1, 1), (3, 1, 17), (4, 1, 32), (1, 7, 5), (3, 20, 32)):
        out = step_at(model.executor, batch, tokens, context, ours)
        expected = step_at(reference, batch, tokens, context, theirs)
        np.testing.assert_allclose(out.logits, expected.logits, atol=2e-5)
        assert out.new_k.shape == tuple(expected.new_k.shape)
    with pytest.raises(InputRefused):
        step_at(model.executor, 5, 1, 9, ours)
    dynamic = prepared("iree", "float32").manifest.files[MODULE].size
    assert package.manifest.files[MODULE].size < 2 * dynamic, "three functions, one set of weights"
    assert record_of(package, "a06")["kernel_inventory"]["transient_bytes"] > 0


def test_threads_are_workers_of_their_own_device_and_change_no_bit(prepared: Prepared, store: PackageStore) -> None:
    package = prepared("iree", "float32")
    process = psutil.Process()
    before = process.num_threads()
    for threads in (2, 3):
        device_of(threads)
    assert process.num_threads() - before >= 5, "a device's workers are its own, whatever was made before it"
    one, two = (load_package(store, package.digest, threads=threads).executor for threads in (1, 2))
    outputs = [step_at(executor, 3, 4, 9, executor.new_pool(12)).logits for executor in (one, two)]
    assert np.array_equal(*outputs)


def test_a_foreign_pool_is_refused_and_outputs_outlive_their_executor(prepared: Prepared, store: PackageStore) -> None:
    package = prepared("iree", "float32")
    executor = load_package(store, package.digest).executor
    other = prepared("onnxruntime", "float32")
    with pytest.raises(InputRefused, match="pool"):
        step_at(executor, 1, 1, 1, load_package(store, other.digest).executor.new_pool(4))
    out = step_at(executor, 1, 3, 2, executor.new_pool(4))
    kept, copy = out.logits, out.logits.copy()
    executor.close()
    del executor, out
    gc.collect()
    again = load_package(store, package.digest).executor
    step_at(again, 2, 3, 2, again.new_pool(4))
    assert np.array_equal(kept, copy)
    with pytest.raises(ClassifiedError, match="closed"):
        package_executor = load_package(store, package.digest).executor
        package_executor.close()
        step_at(package_executor, 1, 1, 1, again.new_pool(4))


@pytest.mark.parametrize("damage", ["truncated", "header", "other"])
def test_a_module_that_cannot_be_loaded_is_an_artifact_failure(
    prepared: Prepared, store: PackageStore, tmp_path: Path, damage: str
) -> None:
    """Digests come before this; should a broken module pass them, loading still refuses it and does not crash."""
    data = (store.path(prepared("iree", "float32").digest) / MODULE).read_bytes()
    broken = {"truncated": data[: len(data) // 3], "header": b"\xff" * 16 + data[16:], "other": b"not a module"}[damage]
    (tmp_path / MODULE).write_bytes(broken)
    with pytest.raises(BackendRefused, match="cannot load") as caught:
        open_module(tmp_path / MODULE, threads=1)
    assert caught.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY
    assert caught.value.evidence["provider_log"]


class Odd(torch.nn.Module):
    """Uses an operator that torch-mlir does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x) + torch.special.airy_ai(x)


class Plain(torch.nn.Module):
    """Uses operators that it knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2


def test_unknown_operators_are_listed_before_anything_is_compiled(tmp_path: Path) -> None:
    process = compile_program(torch.export.export(Odd(), (torch.ones(3),)), tmp_path)
    report = process.wait_for("imported", stage="a01")
    process.close()
    assert report["unsupported"] == ["torch.aten.special_airy_ai", "torch.aten.special_bessel_j0"]


def test_a_target_that_does_not_exist_fails_where_the_compiler_looks_at_it(tmp_path: Path) -> None:
    program = torch.export.export(Plain(), (torch.ones(3),))
    process = compile_program(program, tmp_path, "--iree-llvmcpu-target-cpu=pentium9000")
    with pytest.raises(BuildFailed, match=r"LLVM ERROR|Unknown CPU") as caught:
        for event in ("imported", "verified", "optimized"):
            process.wait_for(event, stage="a04")
    process.close()
    assert caught.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY


def test_a_compiler_that_dies_is_an_execution_failure_with_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "iree-compile").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "iree-compile").chmod(0o755)
    monkeypatch.setenv("IREE_TOOL_PATH", str(tmp_path))
    process = compile_program(torch.export.export(Plain(), (torch.ones(3),)), tmp_path)
    with pytest.raises(ExecutionFailed) as caught:
        for event in ("imported", "verified", "optimized"):
            process.wait_for(event, stage="a04")
    process.close()
    assert caught.value.evidence["error_class"] == "SIGSEGV"
    assert caught.value.failure_class is FailureClass.MODEL_PROVIDER


def test_text_that_is_no_program_is_refused_with_the_compiler_s_words() -> None:
    with pytest.raises(CompilerFailed, match="error:"):
        run_compiler(["--iree-hal-target-backends=llvm-cpu"], b"func.func @f( {")


def test_dimensions_are_read_from_both_forms_of_a_module() -> None:
    imported = "func.func @main(%arg0: !torch.vtensor<[?,4],si64>, %arg1: !torch.vtensor<[],f32>) -> () attributes"
    assert imported_dimensions(imported) == {"main": {"0": "?x4xi64", "1": "f32"}}
    compiled = (
        "util.func public @main$async(%arg0: !hal.buffer_view) {\n"
        "  %1 = hal.tensor.import wait(%arg6) => %arg0 : !hal.buffer_view -> tensor<3x4xi64>\n"
    )
    assert compiled_dimensions(compiled) == {"main": {"0": "3x4xi64"}}


@pytest.mark.parametrize("found", [{"main": {"0": "3x?xi64"}}, {"main": {"0": "?x?xi32"}}, {"other": {}}, {}])
def test_a_specialized_dimension_fails_the_stage(found: dict[str, dict[str, str]]) -> None:
    declared = {"main": {"0": "?x?xi64", "1": "?xf32"}}
    check_dimensions({"main": {"0": "?x?xi64"}}, declared, stage="a04", where="here")
    with pytest.raises(InputRefused, match="specialized it silently") as caught:
        check_dimensions(found, declared, stage="a04", where="here")
    assert caught.value.failure_class is FailureClass.SHAPE_GUARD


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, None),
        ({"optimization": "O0"}, "a04"),
        ({"flags": {"data_tiling": "true"}}, "a04"),
        ({"flags": {"target_cpu": "x86-64-v3"}}, "a04"),
        ({"flags": {"ukernels": "all"}}, "a04"),
        ({"buckets": PLAN}, "a01"),
    ],
)
def test_a_rebuild_repeats_and_a_change_is_named_where_it_acts(
    prepared: Prepared, model_folder: Path, tmp_path: Path, changes: dict[str, Any], stage: str | None
) -> None:
    first = prepared("iree", "float32")
    options = replace(BuildOptions(bounds=BOUNDS), **changes)
    second = prepare(model_folder, backend="iree", store=PackageStore(tmp_path), options=options)
    assert second.preparation.first_difference(first.preparation) == stage
    assert (second.digest == first.digest) is (stage is None)

"""ExecuTorch: what its nine records hold, that its memory plan is held to, and that each fault is classified."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import executorch_lowering, registry
from runtime.backends.contract import Bounds
from runtime.backends.errors import BackendRefused, CapacityExhausted
from runtime.backends.executorch import ARENA, MAGIC, PROGRAM, ThreadPool, load_executorch
from runtime.backends.executorch_records import FALLBACK
from runtime.backends.protocol import BuildOptions, LoadSpec
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from tests.runtime.prepare.conftest import BOUNDS
from tests.runtime.prepare.test_pipeline import random_inputs
from traces.failures import FailureClass

Prepared = Callable[..., PreparedPackage]


def record_of(package: PreparedPackage, stage: str) -> dict[str, Any]:
    return dict(next(report.record for report in package.reports if report.stage.value == stage))


@pytest.fixture(scope="module")
def package(prepared: Prepared) -> PreparedPackage:
    return prepared("executorch", "float32")


@pytest.fixture(scope="module")
def spec(package: PreparedPackage, store: PackageStore) -> LoadSpec:
    return load_package(store, package.digest).executor.spec  # type: ignore[attr-defined]


def test_the_table_of_flags_is_the_lowering_s() -> None:
    assert registry.EXECUTORCH.flags == executorch_lowering.FLAGS


def test_the_partition_map_is_real(package: PreparedPackage) -> None:
    """Delegated and other nodes are named by operator, and every crossing has a size."""
    partition = record_of(package, "a05")
    for owned in partition["partition_map"].values():
        assert owned["XnnpackBackend"]["subgraphs"] > 5
        assert owned["XnnpackBackend"]["operators"]["aten_linear_default"] == 9
        assert sum(owned["XnnpackBackend"]["operators"].values()) == owned["XnnpackBackend"]["nodes"]
        assert owned[FALLBACK]["operators"]["aten_embedding_default"] == 5
        assert sum(owned[FALLBACK]["operators"].values()) == owned[FALLBACK]["nodes"]
    nodes = [owned[FALLBACK]["nodes"] for owned in partition["partition_map"].values()]
    assert partition["fallback_node_count"] == sum(nodes)
    edges = partition["transfer_edges"]
    assert all(edge["from"] != edge["to"] for edge in edges)
    assert {edge["to"] for edge in edges} > {FALLBACK}, "tensors cross in both directions"
    sizes = [edge["bytes"] for edge in edges if isinstance(edge["bytes"], int)]
    assert len(sizes) > 20
    assert partition["estimated_copy_bytes"]["crossing"] == sum(sizes)
    hidden = 8 * 1 * 64 * 4
    assert any(size % hidden == 0 for size in sizes), "activations of 8 rows cross the boundary"


def test_the_plan_is_recorded_and_is_a_pin(package: PreparedPackage) -> None:
    plans = record_of(package, "a06")["kernel_inventory"]
    assert set(plans) == {"decode", "prefill"}
    for plan in plans.values():
        assert plan["arena_bytes"] > 100_000
        assert plan["delegates"]["XnnpackBackend"] > 5
        assert plan["instructions"] > plan["delegates"]["XnnpackBackend"]
        assert "aten::embedding.out" in plan["operators"]
    total = sum(plan["arena_bytes"] for plan in plans.values())
    assert package.manifest.compiler.flags[ARENA] == str(total)
    passes = record_of(package, "a04")["pass_list"]
    assert any(entry["name"] == "ReplaceViewOpsWithViewCopyOpsPass" for entry in passes)


def test_a_plan_beyond_memory_is_refused_before_anything_is_loaded(
    package: PreparedPackage, store: PackageStore, spec: LoadSpec
) -> None:
    greedy = replace(spec, flags={**spec.flags, ARENA: str(1 << 50)})
    with pytest.raises(CapacityExhausted, match="memory plan") as caught:
        load_executorch(store.path(package.digest), greedy)
    assert caught.value.failure_class is FailureClass.CAPACITY_ADMISSION
    assert caught.value.evidence["requested_bytes"] == 1 << 50


@pytest.mark.parametrize("damage", ["magic", "truncated", "other"])
def test_a_program_that_cannot_be_loaded_is_an_artifact_failure(
    package: PreparedPackage, store: PackageStore, spec: LoadSpec, tmp_path: Path, damage: str
) -> None:
    """Digests come before this; should a broken file pass them, it is refused and the process lives."""
    data = (store.path(package.digest) / PROGRAM).read_bytes()
    assert data[4:8] == MAGIC
    broken = {"magic": data[:4] + b"ET99" + data[8:], "truncated": data[: len(data) // 3], "other": b"no"}[damage]
    (tmp_path / PROGRAM).write_bytes(broken)
    with pytest.raises(BackendRefused) as caught:
        load_executorch(tmp_path, spec)
    assert caught.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY
    assert caught.value.evidence["provider_log"]


def test_an_operator_that_the_runtime_lacks_is_named_from_its_log(
    package: PreparedPackage, store: PackageStore, spec: LoadSpec, tmp_path: Path
) -> None:
    data = (store.path(package.digest) / PROGRAM).read_bytes()
    assert b"aten::embedding" in data
    (tmp_path / PROGRAM).write_bytes(data.replace(b"aten::embedding", b"aten::embeddinh"))
    with pytest.raises(BackendRefused, match="cannot load") as caught:
        load_executorch(tmp_path, spec)
    assert "embeddinh" in caught.value.evidence["provider_log"]


def test_a_delegate_that_the_runtime_lacks_is_refused(
    package: PreparedPackage, store: PackageStore, spec: LoadSpec, tmp_path: Path
) -> None:
    data = (store.path(package.digest) / PROGRAM).read_bytes()
    (tmp_path / PROGRAM).write_bytes(data.replace(b"XnnpackBackend", b"XnnpackBackenx"))
    with pytest.raises(BackendRefused, match="cannot load"):
        load_executorch(tmp_path, spec)


class FakeNative:
    """Counts threads as the native pool does."""

    def __init__(self) -> None:
        self.threads = 2

    def _threadpool_get_thread_count(self) -> int:
        return self.threads

    def _unsafe_reset_threadpool(self, threads: int) -> None:
        self.threads = threads


def test_a_pool_of_threads_in_use_is_never_made_anew() -> None:
    pool, native = ThreadPool(), FakeNative()
    pool.hold(native, 1)
    pool.hold(native, 1)
    with pytest.raises(BackendRefused, match="computes with 1 threads, not 4"):
        pool.hold(native, 4)
    pool.release()
    pool.release()
    pool.hold(native, 4)
    assert native.threads == 4


def test_rows_of_many_tokens_answer_as_each_row_alone(package: PreparedPackage, store: PackageStore) -> None:
    executor: Any = load_package(store, package.digest).executor
    pool = executor.new_pool(40)
    inputs = random_inputs(executor, 4, 5, 17, 40)
    whole = executor.step(*inputs, pool)
    for row in range(4):
        alone = executor.step(*(part[row : row + 1] for part in inputs), pool)
        assert np.array_equal(whole.logits[row], alone.logits[0])
        assert np.array_equal(whole.new_k[:, row], alone.new_k[:, 0])


def test_loading_does_not_import_the_compiler(package: PreparedPackage, store: PackageStore) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from runtime.prepare.load import load_package\n"
        "from runtime.prepare.store import PackageStore\n"
        f"load_package(PackageStore(Path({str(store.root.parent)!r})), {package.digest!r})\n"
        "assert 'executorch.exir' not in sys.modules, 'a server imports no compiler'\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, None),
        ({"flags": {"memory_plan": "naive"}}, "a06"),
        ({"flags": {"delegate": "none"}}, "a04"),
        ({"flags": {"methods": "single"}}, "a04"),
    ],
)
def test_a_rebuild_repeats_and_a_change_is_named_where_it_acts(
    package: PreparedPackage, model_folder: Path, tmp_path: Path, changes: dict[str, Any], stage: str | None
) -> None:
    options = replace(BuildOptions(bounds=BOUNDS), **changes)
    second = prepare(model_folder, backend="executorch", store=PackageStore(tmp_path), options=options)
    assert second.preparation.first_difference(package.preparation) == stage
    assert (second.digest == package.digest) is (stage is None)


@pytest.mark.slow
def test_the_default_bounds_fit_an_ordinary_machine(model_folder: Path, tmp_path: Path) -> None:
    made = prepare(
        model_folder, backend="executorch", store=PackageStore(tmp_path), options=BuildOptions(bounds=Bounds())
    )
    assert int(made.manifest.compiler.flags[ARENA]) < 1 << 30

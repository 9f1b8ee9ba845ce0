"""XLA: buckets made ahead of time or lazily, bytes that repeat, a refusal where a shape is one too many."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manifests.scheduling import SchedulingManifest
from runtime.backends.buckets import BucketPlan
from runtime.backends.errors import BackendRefused, BuildTimedOut, CapacityExhausted, InputRefused
from runtime.backends.protocol import BuildOptions, Executor
from runtime.backends.registry import backend_named
from runtime.backends.xla import XlaExecutor
from runtime.backends.xla_executable import canonicalize, code_bytes, deserialize, instruction_sets, kernels
from runtime.backends.xla_platform import client, compile_counter, pool_threads
from runtime.engine.playback import PlanPlayer
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from runtime.probe import probe
from tests.runtime.engine.recorded import record, requests_with_shared_prefixes
from tests.runtime.engine.toy import ToyModel
from tests.runtime.prepare.conftest import BOUNDS
from traces.failures import FailureClass, rule_of

Prepared = Callable[..., PreparedPackage]
LAZY = BucketPlan(decode=(16,), tokens=(64,), context=(128,), pool=600)


def decode(executor: Executor, batch: int, context: int = 8, tokens: int = 1) -> np.ndarray:
    """Compute `tokens` in each of `batch` rows over an empty pool."""
    ids = np.arange(batch * tokens, dtype=np.int64).reshape(batch, tokens)
    slots, lengths = np.zeros((batch, context), dtype=np.int64), np.full(batch, context, dtype=np.int64)
    return executor.step(ids, np.full_like(ids, context), slots, lengths, executor.new_pool(8)).logits


def test_an_ahead_of_time_package_compiles_nothing(prepared: Prepared, store: PackageStore) -> None:
    package = prepared("xla")
    before = compile_counter().count
    executor = load_package(store, package.digest).executor
    assert isinstance(executor, XlaExecutor)
    for batch in (1, 3, 16):
        decode(executor, batch)
    assert compile_counter().count == before
    assert executor.compile_events() == ()
    record = package.reports[8].record["compilation_cache_events"]
    assert record == {"compilations": 0, "ready_state": "compiles nothing", "specializations": []}


def test_the_stages_record_what_xla_did(prepared: Prepared) -> None:
    records = {report.stage.value: report.record for report in prepared("xla").reports}
    buckets = {"b1_t1_s128", "b16_t1_s128", "b1_t64_s128"}
    assert set(records["a03"]["shape_profile"]["buckets"]) == buckets
    assert "f64" not in records["a03"]["layout_decisions"]["result_types"]
    assert "StableHLO 1." in records["a01"]["opset_or_dialect"]
    passes = records["a04"]["pass_list"]
    assert {entry["bucket"] for entry in passes} == {"b1_t1_s128", "b1_t64_s128"}
    assert any(entry["before"] > entry["after"] for entry in passes)
    assert records["a04"]["graph_before"]["nodes"] == passes[0]["before"]
    assert all(size > 0 for size in records["a04"]["estimated_memory_bytes"]["temporary"].values())
    assert len(records["a04"]["optimization_us"]["passes"]["b1_t1_s128"]) == sum(
        entry["bucket"] == "b1_t1_s128" for entry in passes
    )
    assert {"generated", "ynn"} <= set(records["a05"]["partition_map"])
    assert set(records["a06"]["kernel_inventory"]["generated"]) == buckets
    assert records["a06"]["code_size_bytes"] > 1000
    assert records["a08"]["cache_capacity"]["slots"] == 600


def test_executables_are_canonical_whole_and_bound_to_this_processor(prepared: Prepared, store: PackageStore) -> None:
    package = prepared("xla")
    data = (store.path(package.digest) / "bucket.b1_t1_s128.xla").read_bytes()
    assert canonicalize(data) == data
    assert len(kernels(data)) > 5 and code_bytes(data) > 1000
    assert set(instruction_sets(data)) <= set(probe().isa_flags)
    assert set(package.manifest.envelope["isa"]) == set(instruction_sets(data))
    deserialize(client(1), data)
    draw = random.Random(0)
    for _ in range(40):
        damaged = data[: draw.randrange(len(data))]
        try:
            canonicalize(damaged)
        except BackendRefused as error:
            assert "jaxlib" in str(error)
        else:
            raise AssertionError("a truncated executable was taken for a whole one")


def test_two_orders_of_object_files_are_one_executable(prepared: Prepared, store: PackageStore) -> None:
    data = (store.path(prepared("xla").digest) / "bucket.b16_t1_s128.xla").read_bytes()
    from runtime.backends import xla_executable

    objects = xla_executable.object_files(data)
    parts = [data[start:end] for start, end in objects]
    random.Random(1).shuffle(parts)
    shuffled = data[: objects[0][0]] + b"".join(parts) + data[objects[-1][1] :]
    assert shuffled != data and canonicalize(shuffled) == data
    loaded = deserialize(client(1), shuffled)
    assert loaded is not None, "the order of object files means nothing to the loader"


@pytest.fixture(scope="module")
def lazy(model_folder: Path, store: PackageStore) -> PreparedPackage:
    """A package that compiles at first use."""
    flags = {"specialization": "lazy", "max_specializations": "2"}
    options = BuildOptions(bounds=BOUNDS, buckets=LAZY, flags=flags)
    return prepare(model_folder, backend="xla", store=store, options=options)


def test_a_lazy_package_reports_every_compile_and_stays_within_its_limit(
    lazy: PreparedPackage, store: PackageStore
) -> None:
    assert not any(name.endswith(".xla") for name in lazy.manifest.files)
    cache = lazy.reports[8].record["compilation_cache_events"]
    assert cache["ready_state"] == "compiles a shape at its first use"
    assert cache["compilations"] == len(cache["specializations"]) == 2
    executor = load_package(store, lazy.digest).executor
    assert isinstance(executor, XlaExecutor)
    first = decode(executor, 3)
    assert [event.shape for event in executor.compile_events()] == ["b16_t1_s128"]
    assert np.array_equal(decode(executor, 3), first)
    assert len(executor.compile_events()) == 1


@pytest.mark.parametrize("on_limit", ["refuse", "evict"])
def test_a_shape_beyond_the_limit_is_refused_before_anything_runs_or_evicts_another(
    lazy: PreparedPackage, store: PackageStore, on_limit: str
) -> None:
    loaded = load_package(store, lazy.digest).executor
    assert isinstance(loaded, XlaExecutor)
    flags = {**loaded.spec.flags, "max_specializations": "1", "on_limit": on_limit}
    executor = backend_named("xla").load(store.path(lazy.digest), replace(loaded.spec, flags=flags))
    assert isinstance(executor, XlaExecutor)
    before = decode(executor, 2)
    if on_limit == "refuse":
        with pytest.raises(InputRefused, match="b1_t64_s128") as caught:
            decode(executor, 1, tokens=5)
        assert set(rule_of(FailureClass.SHAPE_GUARD).evidence) <= set(caught.value.evidence)
        assert np.array_equal(decode(executor, 2), before)
        assert len(executor.compile_events()) == 1
        return
    decode(executor, 1, tokens=5)
    assert executor.compile_events()[1].evicted == "b16_t1_s128"


def test_a_pool_larger_than_the_plan_is_a_capacity_failure(prepared: Prepared, store: PackageStore) -> None:
    executor = load_package(store, prepared("xla").digest).executor
    with pytest.raises(CapacityExhausted, match="pool=601") as caught:
        executor.new_pool(601)
    assert caught.value.failure_class is FailureClass.CAPACITY_ADMISSION
    with pytest.raises(InputRefused, match="at least one slot"):
        executor.new_pool(0)


def test_the_pool_is_read_in_place_and_another_executor_s_is_refused(prepared: Prepared, store: PackageStore) -> None:
    executor = load_package(store, prepared("xla").digest).executor
    pool = executor.new_pool(20)
    assert pool.num_slots == 20
    assert pool.k_array.unsafe_buffer_pointer() == pool.k.data_ptr()  # type: ignore[attr-defined]
    with pytest.raises(InputRefused, match="not a pool of this executor"):
        one, none = np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
        executor.step(one, one, one, none, load_package(store, prepared("eager").digest).executor.new_pool(20))


def test_one_thread_is_held_and_another_number_is_refused() -> None:
    client(1)
    assert pool_threads() == 1
    with pytest.raises(BackendRefused, match="1 threads in this process, 2 were asked"):
        client(2)


def test_concurrent_requests_replay_to_the_bit(prepared: Prepared, store: PackageStore) -> None:
    """Twenty requests through the engine: chunked prefill, prefix hits, batches; each replays from its slice."""
    loaded = load_package(store, prepared("xla").digest)
    model = ToyModel(loaded.executor, loaded.tokenizer)
    scheduling = SchedulingManifest(
        max_num_seqs=8, max_num_batched_tokens=64, num_blocks=34, batch_sizes=(1, 2, 4, 8), watermark="0.02"
    )
    requests = requests_with_shared_prefixes(20, seed=11, vocab_size=256, longest_output=12, stop=258)
    recording = record(model, scheduling, requests)
    assert max(call.batch for plan in recording.plans for call in plan.calls) > 2
    player = PlanPlayer(model.executor, model.tokenizer, scheduling, recording.plans, recording.sequences)
    for request, result in zip(recording.requests, recording.results, strict=True):
        assert player.play(request, "faithful", result).result.document() == result.document()


def test_a_compiler_past_its_deadline_is_a_timeout(model_folder: Path, tmp_path: Path) -> None:
    options = BuildOptions(bounds=BOUNDS, buckets=LAZY, deadline_seconds=1)
    with pytest.raises(BuildTimedOut) as caught:
        prepare(model_folder, backend="xla", store=PackageStore(tmp_path), options=options)
    assert (caught.value.failure_class, caught.value.stage) == (FailureClass.TIMEOUT_CANCELLATION, "a04")


def test_an_unknown_xla_flag_is_refused_instead_of_ending_the_process() -> None:
    code = (
        "from runtime.backends.errors import BackendRefused\n"
        "from runtime.backends.xla_platform import client\n"
        "try:\n    client(1)\n"
        "except BackendRefused as error:\n    print(error, error.failure_class.value)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_frobnicate=1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0
    assert "xla_frobnicate" in done.stdout and "artifact_compatibility" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"specialization": "lazy"}, {"disabled_passes": "fusion"}, {"fast_math": "true"}]
)
def test_bfloat16_rebuilds_to_the_same_bytes(model_folder: Path, tmp_path: Path, flags: dict[str, str]) -> None:
    options = BuildOptions(bounds=BOUNDS, buckets=LAZY, precision="bfloat16", flags=flags)
    made = [
        prepare(model_folder, backend="xla", store=PackageStore(tmp_path / name), options=options)
        for name in ("a", "b")
    ]
    assert made[0].digest == made[1].digest

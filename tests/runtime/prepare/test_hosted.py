"""A backend in a process of its own answers to the bit what it answers here, and its death is an answer too."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.scheduling import SchedulingManifest
from runtime.backends.errors import (
    BackendError,
    BackendRefused,
    CapacityExhausted,
    HostDied,
    HostTimedOut,
    InputRefused,
    InstanceRefused,
)
from runtime.backends.hosted import HostedExecutor, load_hosted
from runtime.backends.hosted_process import Hosting
from runtime.backends.protocol import Support
from runtime.backends.registry import BACKENDS
from runtime.engine.generation import GenerationRequest, Sampling
from runtime.engine.loop import Engine
from runtime.engine.playback import PlanPlayer
from runtime.prepare.load import load_package, load_spec
from runtime.prepare.manifest import read_config_document
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.store import PackageStore
from runtime.prepare.warm import validate
from tests.runtime.engine.recorded import plans_of, sequences_of, stored_pair
from tests.runtime.engine.toy import ListRecorder, ToyModel
from traces.failures import FailureClass, rule_of

Prepared = Callable[..., PreparedPackage]
HOSTED = [
    ("eager", "bfloat16"),
    *((one.name, "float32") for one in BACKENDS if one.abilities["own_process"].support is Support.SUPPORTED),
]
POISON = 70
"""A position; whoever decodes a token there loses the process."""


@contextmanager
def hosted(store: PackageStore, package: PreparedPackage, **hosting: Any) -> Generator[HostedExecutor]:
    executor = load_package(store, package.digest, hosting=Hosting(**hosting)).executor
    assert isinstance(executor, HostedExecutor)
    try:
        yield executor
    finally:
        executor.close()


def small_step(executor: Any, pool: Any, *, token: int = 5) -> Any:
    one, none = np.full((1, 1), token, dtype=np.int64), np.zeros(1, dtype=np.int64)
    return executor.step(one, np.zeros_like(one), np.zeros_like(one), none, pool)


@contextmanager
def killed_during(executor: HostedExecutor, number: signal.Signals) -> Generator[None]:
    """Hold the child, and end it by a signal once the call has been sent to it."""
    pid = executor.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    def strike() -> None:
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(0.1, strike)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.parametrize(
    ("backend", "precision"),
    HOSTED,
)
def test_a_hosted_package_answers_with_the_bits_of_one_in_this_process(
    prepared: Prepared, store: PackageStore, backend: str, precision: str
) -> None:
    package = prepared(backend, precision)
    here = load_package(store, package.digest)
    hosting = load_package(store, package.digest, hosting=Hosting())
    try:
        assert validate(hosting, store)[0].digests() == validate(here, store)[0].digests()
        pools = [one.executor.new_pool(8) for one in (hosting, here)]
        for one, pool in zip((hosting, here), pools, strict=True):
            out = small_step(one.executor, pool)
            zero = np.zeros(1, dtype=np.int64)
            pool.write(np.array([6]), out.new_k, out.new_v, rows=zero, columns=zero)
        for ours, theirs in zip(pools[0].read(np.array([6])), pools[1].read(np.array([6])), strict=True):
            assert np.array_equal(ours, theirs)
        with pytest.raises(InputRefused):
            small_step(hosting.executor, here.executor.new_pool(8))
    finally:
        hosting.executor.close()
    with pytest.raises(BackendRefused, match="closed"):
        small_step(hosting.executor, pools[0])


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGSEGV,
        signal.SIGKILL,
        pytest.param(signal.SIGABRT, marks=pytest.mark.slow),
        pytest.param(signal.SIGFPE, marks=pytest.mark.slow),
    ],
)
def test_a_death_is_a_classified_failure_and_the_cache_outlives_it(
    prepared: Prepared, store: PackageStore, number: signal.Signals
) -> None:
    with hosted(store, prepared("eager", "float32")) as executor:
        pool = executor.new_pool(8)
        out = small_step(executor, pool)
        zero = np.zeros(1, dtype=np.int64)
        pool.write(np.array([3]), out.new_k, out.new_v, rows=zero, columns=zero)
        kept = pool.read(np.arange(8))
        with killed_during(executor, number), pytest.raises(HostDied, match=number.name) as caught:
            small_step(executor, pool)
        failure = caught.value
        assert failure.failure_class is FailureClass.MODEL_PROVIDER
        assert set(rule_of(failure.failure_class).evidence) <= set(failure.complete_evidence())
        assert failure.evidence["error_class"] == number.name
        assert failure.evidence["shape"] == (1, 1, 1)
        if number is not signal.SIGKILL:
            assert "hosted_child" in failure.evidence["log"], "the child's last words are kept"
        again = small_step(executor, pool)
        assert np.array_equal(again.logits, out.logits)
        assert all(np.array_equal(one, two) for one, two in zip(pool.read(np.arange(8)), kept, strict=True))
        assert executor.deaths == 1


def test_a_child_that_died_idle_costs_nobody_and_too_many_deaths_refuse_the_instance(
    prepared: Prepared, store: PackageStore
) -> None:
    with hosted(store, prepared("eager", "float32"), max_deaths=2) as executor:
        pool = executor.new_pool(2)
        expected = small_step(executor, pool).logits
        os.kill(executor.pid or 0, signal.SIGKILL)
        time.sleep(0.2)
        assert np.array_equal(small_step(executor, pool).logits, expected)
        with killed_during(executor, signal.SIGKILL), pytest.raises(HostDied):
            small_step(executor, pool)
        for _ in range(2):
            with pytest.raises(InstanceRefused, match="lost 2 times") as caught:
                small_step(executor, pool)
            assert caught.value.evidence["attempt"] == 2
        assert executor.pid is None


def test_a_hanging_step_is_a_timeout_and_its_process_is_ended(prepared: Prepared, store: PackageStore) -> None:
    with hosted(store, prepared("eager", "float32"), step_deadline_us=300_000) as executor:
        pool, pid = executor.new_pool(2), executor.pid or 0
        small_step(executor, pool)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(HostTimedOut) as caught:
            small_step(executor, pool)
        assert caught.value.failure_class is FailureClass.TIMEOUT_CANCELLATION
        assert caught.value.evidence["deadline_us"] == 300_000
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_bad_inputs_are_refused_here_without_asking_the_child(prepared: Prepared, store: PackageStore) -> None:
    with hosted(store, prepared("eager", "float32")) as executor:
        pool = executor.new_pool(2)
        os.kill(executor.pid or 0, signal.SIGSTOP)  # whoever asked it now would wait for a minute
        with pytest.raises(InputRefused, match="index range"):
            small_step(executor, pool, token=10**6)


def test_the_child_can_read_a_cache_but_not_write_it(prepared: Prepared, store: PackageStore) -> None:
    with hosted(store, prepared("eager", "float32")) as executor:
        pool = executor.new_pool(2)
        small_step(executor, pool)
        lines = Path(f"/proc/{executor.pid}/maps").read_text().splitlines()
        tables = [line.split() for line in lines if "memfd:replaylab-k" in line or "memfd:replaylab-v" in line]
        assert len(tables) == 2
        assert {fields[1] for fields in tables} == {"r--s"}
        del pool
        other = executor.new_pool(2)
        small_step(executor, other)
        lines = Path(f"/proc/{executor.pid}/maps").read_text().splitlines()
        assert sum("memfd:replaylab-k" in line for line in lines) == 1, "a pool that is gone here is gone there"


def test_a_memory_limit_is_a_capacity_failure_of_the_load(prepared: Prepared, store: PackageStore) -> None:
    package = prepared("eager", "float32")
    with pytest.raises(CapacityExhausted) as caught:
        load_package(store, package.digest, hosting=Hosting(memory_bytes=0))
    assert caught.value.failure_class is FailureClass.CAPACITY_ADMISSION
    assert caught.value.stage == "a08"
    assert caught.value.evidence["memory_pressure"]
    with hosted(store, package, memory_bytes=1 << 30) as executor:
        small_step(executor, executor.new_pool(64))


def test_code_that_kills_its_loader_is_a_classified_failure_here(
    prepared: Prepared, store: PackageStore, tmp_path: Path
) -> None:
    """Digests would refuse this file; here they are passed by on purpose."""
    package = prepared("inductor", "float32")
    folder = tmp_path / "damaged"
    shutil.copytree(store.path(package.digest), folder)
    data = bytearray((folder / "step.pt2").read_bytes())
    start = data.index(b"\x7fELF")
    data[start + 4096 : start + 4096 + 60_000] = bytes(60_000)
    (folder / "step.pt2").write_bytes(data)
    spec = load_spec(package.manifest, read_config_document(package.manifest.config))
    with pytest.raises(BackendError) as caught:
        load_hosted("inductor", folder, spec, Hosting())
    assert caught.value.stage == "a08"
    assert caught.value.evidence.get("error_class", "SIG").startswith("SIG")


def test_a_child_does_not_outlive_its_parent(prepared: Prepared, store: PackageStore) -> None:
    package = prepared("eager", "float32")
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from runtime.backends.hosted_process import Hosting\n"
        "from runtime.prepare.load import load_package\n"
        "from runtime.prepare.store import PackageStore\n"
        "model = load_package(PackageStore(Path(sys.argv[1])), sys.argv[2], hosting=Hosting())\n"
        "print(model.executor.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(store.root.parent), package.digest]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)  # even one that would not listen
        parent.kill()
    os.kill(pid, signal.SIGCONT)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


class Poisoned:
    """A hosted executor whose child dies in every step that reaches the poisonous position."""

    def __init__(self, executor: HostedExecutor) -> None:
        self._executor = executor

    def step(self, tokens: Any, positions: Any, *rest: Any, **more: Any) -> Any:
        if positions.shape[1] != 1 or not (positions == POISON).any():
            return self._executor.step(tokens, positions, *rest, **more)
        if self._executor.pid is None:  # lost in the call before this one
            small_step(self._executor, self._executor.new_pool(2))
        with killed_during(self._executor, signal.SIGSEGV):
            return self._executor.step(tokens, positions, *rest, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def test_a_death_costs_no_other_request_and_the_schedule_still_replays(prepared: Prepared, store: PackageStore) -> None:
    scheduling = SchedulingManifest(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=32, batch_sizes=(1, 2, 4, 8))
    package = prepared("eager", "float32")
    model = load_package(store, package.digest, hosting=Hosting(max_deaths=9))
    assert isinstance(model.executor, HostedExecutor)
    recorder = ListRecorder()
    common = tuple(range(40, 60))
    with Engine(ToyModel(Poisoned(model.executor)), scheduling, recorder) as engine:
        first = threading.Event()
        handles = [
            engine.submit(
                GenerationRequest(
                    f"good-{n}", "tenant", (*common, n), Sampling(seed=n, temperature=0.7, max_tokens=40)
                ),
                lambda _: first.set(),
            )
            for n in range(5)
        ]
        first.wait(60)
        bad = engine.submit(GenerationRequest("bad", "tenant", tuple(range(64)), Sampling(max_tokens=20)))
        with pytest.raises(HostDied, match="SIGSEGV"):
            bad.wait(120)
        results = [handle.wait(120) for handle in handles]
    assert {result.finish_reason for result in results} == {"length"}
    assert [len(result.tokens) for result in results] == [40] * 5
    plans = plans_of(recorder)
    (died,) = [plan for plan in plans for call in plan.calls if 5 in call.sequences and call.starts == [POISON]]
    assert len(died.calls) == 6, "the rows of the dead call stand there one by one"
    assert all(len(call.sequences) == 1 for call in died.calls)
    assert model.executor.deaths == 2, "once with the others, once alone"
    player = PlanPlayer(load_package(store, package.digest).executor, None, scheduling, plans, sequences_of(recorder))
    for result in results:
        request, recorded = stored_pair(recorder, result.sequence_id)
        again = player.replay(request, "faithful", recorded)
        assert again.tokens == result.tokens
        assert [one.logits_digest for one in again.records] == [one.logits_digest for one in result.records]
    request, recorded = stored_pair(recorder, "bad")
    assert player.replay(request, "faithful", recorded).finish_reason == "error"
    model.executor.close()

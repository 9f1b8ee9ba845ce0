"""What an event costs the thread that emits it, and in all (``make bench``; figures are CPU time)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from traces.ledger.ledger import Ledger
from traces.recorder import Recorder

EVENTS = 2_000
PLAN = '[123,[["decode",8,1,256,[[1,40,1,true],[2,55,1,true],[3,12,1,true],[4,99,1,true]]]],[],[],[],[]]'
STEP: dict[str, Any] = {
    "track": "B",
    "engine_id": "engine_1",
    "step": 123,
    "batch_size": 4,
    "queue_depth": 2,
    "kv_blocks": 12,
    "duration_us": 2_150,
}


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    """A recorder whose queue holds a whole round."""
    with Recorder(tmp_path / "ledger", run_id="run_1", component="bench") as opened:
        yield opened


def steps(recorder: Recorder) -> None:
    """Emit engine steps as the engine does."""
    for _ in range(EVENTS):
        recorder.emit("engine.step", payload={"plan": PLAN, "plan_us": 12}, **STEP)


@pytest.mark.benchmark(timer=time.thread_time, group="emit, CPU of the calling thread, per 2,000 events")
def test_emit(benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    benchmark.pedantic(steps, args=(recorder,), setup=recorder.flush, rounds=30, warmup_rounds=2)
    assert recorder.dropped == 0
    if benchmark.stats:
        benchmark.extra_info["microseconds_an_event"] = benchmark.stats.stats.min / EVENTS * 1e6


@pytest.mark.benchmark(timer=time.process_time, group="emit and write, CPU of the process, per 2,000 events")
def test_emit_and_write(benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    def whole() -> None:
        steps(recorder)
        recorder.flush()

    benchmark.pedantic(whole, rounds=20, warmup_rounds=2)
    assert recorder.dropped == 0
    if benchmark.stats:
        benchmark.extra_info["microseconds_an_event"] = benchmark.stats.stats.min / EVENTS * 1e6


@pytest.mark.benchmark(group="commit, wall clock")
def test_commit(benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    benchmark.pedantic(
        recorder.commit, args=("request.terminal",), kwargs={"status": "ok"}, rounds=300, warmup_rounds=10
    )


@pytest.mark.benchmark(timer=time.process_time, group="drain, CPU, per 20,000 events")
def test_drain(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")

    def fill() -> None:
        with Recorder(tmp_path / "ledger", run_id="run_1", component="bench") as recorder:
            for _ in range(10):
                steps(recorder)

    benchmark.pedantic(ledger.drain, setup=fill, rounds=4, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["events_a_cpu_second"] = EVENTS * 10 / benchmark.stats.stats.min

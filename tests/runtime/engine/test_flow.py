"""A reader that falls behind holds its sequence up; a caller may leave at any point; everything ends exactly once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from manifests.scheduling import SchedulingManifest
from runtime.engine.flow import Flow
from runtime.engine.generation import GenerationRequest, Sampling, TokenRecord
from runtime.engine.live import Handle
from runtime.engine.loop import Engine
from tests.runtime.engine.recorded import plans_of
from tests.runtime.engine.toy import ListRecorder, ToyExecutor, ToyModel

LIMIT = 4


def request(name: str, *, prompt: int = 3, output: int = 30, **fields: Any) -> GenerationRequest:
    """A greedy request with a prompt of its own."""
    tokens = tuple((ord(name[0]) + place) % 50 for place in range(prompt))
    return GenerationRequest(name, "t", tokens, Sampling(max_tokens=output), **fields)


@contextmanager
def engine(executor: Any = None, **pins: Any) -> Iterator[tuple[Engine, ListRecorder]]:
    """A live engine that lets a stream be LIMIT tokens ahead."""
    fields = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "num_blocks": 16, "max_undelivered_tokens": LIMIT}
    recorder = ListRecorder()
    with Engine(
        ToyModel(executor or ToyExecutor()), SchedulingManifest.model_validate(fields | pins), recorder
    ) as live:
        yield live, recorder


class Reader:
    """Takes tokens when it is told to."""

    def __init__(self) -> None:
        self.flow = Flow()
        self.seen: list[int] = []
        self.most = 0
        self.behind = threading.Event()

    def __call__(self, record: TokenRecord) -> None:
        """Note a token."""
        self.seen.append(record.token)
        self.most = max(self.most, self.flow.behind)
        if self.flow.behind > LIMIT:
            self.behind.set()

    def catch_up(self) -> None:
        """Take all that is there."""
        self.behind.clear()
        self.flow.take(self.flow.behind)


def ends(recorder: ListRecorder) -> Counter[str]:
    """How often each sequence ended."""
    return Counter(
        p["sequence_id"] for n, p, _ in recorder.events if n == "engine.sequence" and p["phase"] == "finished"
    )


def test_a_slow_reader_gets_every_token_and_is_never_far_behind() -> None:
    """The same tokens as without a limit; at most one more than the limit on their way; the wait is delivery."""
    with engine(max_undelivered_tokens=None) as (free, _):
        whole = free.submit(request("a")).wait(60)
    with engine() as (live, recorder):
        reader = Reader()
        handle = live.submit(request("a"), reader, flow=reader.flow)
        while not handle.done:
            if reader.behind.wait(0.05):
                assert len(reader.seen) - len(whole.tokens) <= 0
                reader.catch_up()
        result = handle.wait(60)
    assert result.tokens == whole.tokens == tuple(reader.seen)
    assert reader.most == LIMIT + 1
    assert (
        result.latency is not None and result.latency.total_us == result.queue_us + result.prefill_us + result.decode_us
    )
    assert not any(plan.preemptions for plan in plans_of(recorder))


def test_others_go_on_while_one_is_held_and_the_plan_says_so() -> None:
    """The held one is a row of no step meanwhile, keeps its blocks, and finishes afterwards."""
    with engine() as (live, recorder):
        reader = Reader()
        held = live.submit(request("a"), reader, flow=reader.flow)
        assert reader.behind.wait(60)
        assert live.submit(request("b")).wait(60).finish_reason == "length"
        seen = len(reader.seen)
        assert not held.done and seen == LIMIT + 1
        while not held.done:
            reader.catch_up()
        assert held.wait(60).preemptions == 0
    plans = plans_of(recorder)
    assert sum(plan.held == [0] for plan in plans) >= 29
    assert all(0 not in call.sequences for plan in plans if plan.held for call in plan.calls)


def test_a_held_one_loses_its_place_to_those_who_can_use_it_and_comes_back() -> None:
    """One place only: the next in line takes it; what was lost is computed again, with the same tokens."""
    with engine(max_num_seqs=1, batch_sizes=(1,), max_undelivered_tokens=None) as (free, _):
        whole = free.submit(request("a")).wait(60)
    with engine(max_num_seqs=1, batch_sizes=(1,)) as (live, recorder):
        reader = Reader()
        held = live.submit(request("a"), reader, flow=reader.flow)
        assert reader.behind.wait(60)
        assert live.submit(request("b")).wait(60).finish_reason == "length"
        while not held.done:
            reader.catch_up()
        result = held.wait(60)
    assert [(one.sequence, one.reason) for plan in plans_of(recorder) for one in plan.preemptions] == [(0, "stalled")]
    assert result.preemptions == 1 and result.tokens == whole.tokens
    assert result.latency is not None and result.latency.delivery_us > 0


def test_a_deadline_ends_a_held_sequence_in_an_idle_engine() -> None:
    """Nothing else happens, and still the time is kept; the output is partial and says so."""
    with engine() as (live, recorder):
        reader = Reader()
        result = live.submit(request("a", deadline_us=200_000), reader, flow=reader.flow).wait(60)
    assert (result.finish_reason, result.partial, len(result.tokens)) == ("deadline", True, LIMIT + 1)
    assert result.latency is not None and result.latency.delivery_us > result.latency.total_us // 2
    (ended,) = [(p, c) for n, p, c in recorder.events if n == "engine.sequence" and p["phase"] == "finished"]
    assert ended[0]["partial"] is True and ended[1]["status"] == "partial"


def test_draining_does_not_wait_for_readers() -> None:
    """An engine that is to stop finishes what it has, read or not."""
    with engine() as (live, _):
        reader = Reader()
        handle = live.submit(request("a"), reader, flow=reader.flow)
        assert reader.behind.wait(60)
        live.close(drain=True)
        assert handle.wait(1).finish_reason == "length"


class GatedExecutor(ToyExecutor):
    """Runs as many calls as it is allowed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gate = threading.Semaphore(0)
        self.at_gate = threading.Event()

    def step(self, *arguments: Any, **more: Any) -> Any:
        """Wait for leave."""
        self.at_gate.set()
        assert self.gate.acquire(timeout=60)
        return super().step(*arguments, **more)

    def allow(self, calls: int) -> None:
        """Let so many calls through, and wait until the engine stands before the next."""
        for _ in range(calls):
            self.at_gate.clear()
            self.gate.release()
            assert self.at_gate.wait(60)


@pytest.mark.parametrize(
    ("point", "calls", "tokens"),
    [("waiting", 1, 0), ("prefill", 1, 0), ("decode", 5, 5), ("evicted", 14, 13)],
)
def test_a_caller_may_leave_at_any_point(point: str, calls: int, tokens: int) -> None:
    """It ends once, with what it had; its blocks are free before the next step; the others finish."""
    executor = GatedExecutor()
    pins = {"max_num_seqs": 1, "batch_sizes": (1,)} if point == "waiting" else {}
    pins |= {"num_blocks": 4, "enable_prefix_caching": False} if point == "evicted" else {}
    with engine(executor, **pins) as (live, recorder):
        first = live.submit(request("a", prompt=20, output=28))
        assert executor.at_gate.wait(60)
        second = live.submit(request("b", prompt=40 if point == "prefill" else 10, output=20))
        executor.allow(calls)
        second.cancel("test")
        executor.gate.release(10_000)
        result = second.wait(60)
        assert first.wait(60).finish_reason == "length"
    assert (result.finish_reason, result.cancel_origin, len(result.tokens)) == ("cancelled", "test", tokens)
    assert result.preemptions == (point == "evicted")
    assert ends(recorder) == {"a": 1, "b": 1}
    last = max((step for step in result.steps), default=None)
    freed = [plan.step for plan in plans_of(recorder) for one in plan.releases if one.sequence == 1]
    assert len(freed) == 1
    if last is not None and point != "evicted":
        assert freed == [last + 1], "released in the step after its last one"
    assert [c["kv_blocks"] for n, _, c in recorder.events if n == "engine.step"][-1] == 0


def test_handles_may_be_cancelled_after_the_end() -> None:
    """Too late changes nothing."""
    with engine() as (live, recorder):
        handle: Handle = live.submit(request("a", output=2))
        assert handle.wait(60).finish_reason == "length"
        handle.cancel("late")
        assert live.submit(request("b", output=2)).wait(60).finish_reason == "length"
    assert ends(recorder) == {"a": 1, "b": 1}

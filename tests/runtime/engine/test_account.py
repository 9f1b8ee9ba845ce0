"""Every microsecond of a sequence has one owner: the parts add up to the whole, whatever happens to it."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.scheduling import SchedulingManifest
from runtime.engine.account import Account, CallTimes, settle_step
from runtime.engine.flow import Flow
from runtime.engine.generation import EngineLatency, GenerationRequest, Sampling
from runtime.engine.live import LiveSequence
from runtime.engine.loop import Engine
from runtime.engine.plan import Call
from runtime.engine.sequence import Output
from tests.runtime.engine.recorded import requests_with_shared_prefixes, stored_pair
from tests.runtime.engine.toy import ListRecorder, ToyExecutor, ToyModel
from traces.failures import ClassifiedError

PARTS = msgspec.structs.fields(EngineLatency)


class SteppingClock:
    """Goes on by a few microseconds at every look, from any thread."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self._times = itertools.accumulate(itertools.cycle([draw.randrange(1, 60) for _ in range(97)]))
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            return next(self._times)


def ends(recorder: ListRecorder) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Payload and columns of every end of a sequence."""
    return [(p, c) for n, p, c in recorder.events if n == "engine.sequence" and p["phase"] == "finished"]


@given(
    seed=st.integers(0, 2**20),
    policy=st.sampled_from(["fcfs", "priority", "deadline", "fair"]),
    blocks=st.integers(10, 20),
    undelivered=st.sampled_from([None, 2]),
)
@settings(max_examples=25, deadline=None)
def test_the_parts_add_up_to_the_whole(seed: int, policy: str, blocks: int, undelivered: int | None) -> None:
    """Through evictions, cancellations, deadlines, failing calls and slow readers, in real engine runs."""
    scheduling = SchedulingManifest.model_validate(
        {
            "policy": policy,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "num_blocks": blocks,
            "max_undelivered_tokens": undelivered,
        }
    )
    draw, recorder = random.Random(seed), ListRecorder()
    requests = requests_with_shared_prefixes(12, seed=seed, vocab_size=49, longest_output=25)
    with Engine(ToyModel(ToyExecutor(fail_on=49)), scheduling, recorder, clock=SteppingClock(seed)) as engine:
        handles: list[Any] = []
        for request in requests:
            changes: dict[str, Any] = {"priority": draw.randrange(3)}
            if draw.random() < 0.2:
                changes["deadline_us"] = draw.randrange(1, 20_000)
            if draw.random() < 0.1:
                changes["prompt"] = (*request.prompt, 49)
            flow = Flow()
            receiver = (lambda _, flow=flow: flow.take()) if draw.random() < 0.5 else (lambda _: None)
            handles.append(engine.submit(msgspec.structs.replace(request, **changes), receiver, flow=flow))
            if draw.random() < 0.1:
                draw.choice(handles).cancel("test")
        engine.close(drain=True)
    for handle in handles:
        with contextlib.suppress(ClassifiedError):
            assert handle.wait(1).latency is not None
    assert len(ends(recorder)) == len(requests)
    for payload, columns in ends(recorder):
        parts = payload["latency"]
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == columns["duration_us"]
        assert sum(parts.values()) == payload["queue_us"] + payload["prefill_us"] + payload["decode_us"]
        assert parts["queue_us"] == payload["queue_us"]
        assert (parts["preemption_us"] > 0) <= (payload["preemptions"] > 0)
        assert (parts["decode_us"] > 0) <= (columns["output_tokens"] > 0)


def test_a_lone_request_meets_no_interference_and_a_second_one_does() -> None:
    """With nobody beside it, all of a step is its own."""
    recorder = ListRecorder()
    scheduling = SchedulingManifest(max_num_seqs=4, max_num_batched_tokens=32, num_blocks=16)
    with Engine(ToyModel(ToyExecutor()), scheduling, recorder, clock=SteppingClock(1)) as engine:
        request = GenerationRequest("lone", "t", tuple(range(40)), Sampling(max_tokens=6))
        lone = engine.submit(request).wait(60).latency
        assert lone is not None and lone.interference_us == lone.preemption_us == 0
        assert min(lone.prefill_us, lone.decode_us, lone.sampling_us, lone.delivery_us) > 0
        pair = [engine.submit(msgspec.structs.replace(request, sequence_id=name)) for name in "ab"]
        beside = [handle.wait(60).latency for handle in pair]
    assert all(one is not None and one.interference_us > 0 for one in beside)
    assert stored_pair(recorder, "lone")[1].latency == lone


def sequence(name: str, *, output: bool, submitted_us: int = 0) -> LiveSequence:
    """A live sequence that runs since its submission."""
    request = GenerationRequest(name, "t", (1, 2, 3))
    one = LiveSequence(request, Output(request), on_token=None, submitted_us=submitted_us)
    one.account.admit(submitted_us, cached=0)
    one.account.decoding = output
    one.first_token_us = 0 if output else None
    return one


def test_a_step_is_split_by_the_rule_that_is_written_down() -> None:
    """By hand: a decode call of two rows and a prefill call of one, 8 of the step's 10 tokens."""
    first, second, third, idle = (sequence(name, output=name in "ab") for name in "abcd")
    decode = CallTimes(Call("decode", 2, 1, 64, [0, 1], [5, 6]), ran_us=100)
    decode.chose_us, decode.gave_us, decode.receivers = 40, 30, {0: 30}
    prefill = CallTimes(Call("prefill", 1, 16, 64, [2], [0], [8], [0]), ran_us=200)
    live = dict(enumerate([first, second, third, idle]))
    settle_step([decode, prefill], live, live, now_us=470)  # 100 us of planning and recording
    got = {name: one.account.close(470, by_itself=False) for name, one in zip("abcd", live.values(), strict=True)}
    assert got["a"] == latency(decode_us=50 + 10, sampling_us=20, delivery_us=30, interference_us=470 - 110)
    assert got["b"] == latency(decode_us=50 + 10, sampling_us=20, interference_us=470 - 80)
    assert got["c"] == latency(prefill_us=200 + 80, interference_us=470 - 280)
    assert got["d"] == latency(interference_us=470)


def latency(**parts: int) -> EngineLatency:
    """An account with zeros where nothing is given."""
    return EngineLatency(**dict.fromkeys((field.name for field in PARTS), 0) | parts)


def test_all_time_from_an_eviction_until_the_loss_is_made_good_is_preemption() -> None:
    """Waiting, and computing again; what follows is its own again."""
    account = Account(0)
    account.admit(10, cached=0)
    account.ran(110, own_us=60, sampling_us=0, delivery_us=0, computed=8)
    account.evict(120, discarded=8)
    account.admit(300, cached=4)
    account.ran(340, own_us=30, sampling_us=0, delivery_us=0, computed=6)
    account.ran(390, own_us=30, sampling_us=5, delivery_us=0, computed=8)
    account.decoding = True
    account.ran(440, own_us=20, sampling_us=5, delivery_us=0, computed=9)
    assert account.close(450, by_itself=True) == latency(
        queue_us=10,
        prefill_us=60,
        interference_us=40 + 25,
        preemption_us=280,
        decode_us=20,
        sampling_us=5,
        delivery_us=10,
    )


@pytest.mark.parametrize("kept", [True, False])
def test_time_spent_waiting_for_the_reader_is_delivery(kept: bool) -> None:
    """Whether it kept its blocks meanwhile or not; an evicted one then has to recover."""
    account = Account(0)
    account.admit(0, cached=0)
    account.ran(50, own_us=50, sampling_us=0, delivery_us=0, computed=8)
    account.hold(50)
    if not kept:
        account.evict(80, discarded=8)
    account.resume(100, running=kept)
    if not kept:
        account.admit(130, cached=0)
    account.ran(160, own_us=10, sampling_us=0, delivery_us=0, computed=9)
    assert account.close(160, by_itself=True) == (
        latency(prefill_us=60, delivery_us=50, interference_us=50)
        if kept
        else latency(prefill_us=50, delivery_us=50, preemption_us=60)
    )

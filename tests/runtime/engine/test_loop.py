"""One request's trouble is its own: refusals, cancellation, deadlines, failing calls and callbacks; all is recorded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from manifests.scheduling import SchedulingManifest
from runtime.engine.errors import EngineFailed, SamplingRefused, SequenceRefused
from runtime.engine.generation import GenerationRequest, Sampling, TokenRecord
from runtime.engine.loop import Engine
from tests.runtime.engine.recorded import plans_of, record, requests_with_shared_prefixes, stored_pair
from tests.runtime.engine.toy import ListRecorder, ToyExecutor, ToyModel, ToyPool
from traces.failures import FailureClass

SCHEDULING = SchedulingManifest(max_num_seqs=4, max_num_batched_tokens=32, num_blocks=16)


def request(name: str = "one", *, prompt: tuple[int, ...] = (1, 2, 3), **fields: object) -> GenerationRequest:
    """A short greedy request."""
    sampling = Sampling(max_tokens=fields.pop("max_tokens", 5), stop_token_ids=fields.pop("stop", ()))  # type: ignore[arg-type]
    return GenerationRequest(name, "tenant", prompt, sampling, **fields)  # type: ignore[arg-type]


@contextmanager
def engine(executor: ToyExecutor | None = None, scheduling: SchedulingManifest = SCHEDULING) -> Iterator[Engine]:
    """A live engine on the toy."""
    with Engine(ToyModel(executor or ToyExecutor()), scheduling, ListRecorder()) as live:
        yield live


def test_a_result_carries_its_evidence_and_its_times_add_up() -> None:
    """Tokens, records, steps, and queue + prefill + decode = the recorded whole."""
    recording = record(ToyModel(ToyExecutor()), SCHEDULING, [request(max_tokens=6, prompt=tuple(range(40)))])
    (result,) = recording.results
    assert result.finish_reason == "length"
    assert [one.token for one in result.records] == list(result.tokens)
    assert [one.position for one in result.records] == list(range(40, 46))
    assert result.steps == tuple(range(7))
    assert [one.step for one in result.records] == list(range(1, 7))
    (ended,) = [c for n, p, c in recording.recorder.events if n == "engine.sequence" and p["phase"] == "finished"]
    assert result.queue_us + result.prefill_us + result.decode_us == ended["duration_us"]
    assert stored_pair(recording.recorder, "one") == (recording.requests[0], result)


def test_stop_tokens_end_a_sequence() -> None:
    """The stop token is the last token."""
    with engine() as live:
        free = live.submit(request(max_tokens=8)).wait(60)
        stop = next(token for place, token in enumerate(free.tokens) if place >= 2)
        first = free.tokens.index(stop)
        stopped = live.submit(request(max_tokens=8, stop=(stop,))).wait(60)
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish_reason == "stop"


def test_forced_tokens_are_fed_and_the_choice_is_recorded() -> None:
    """The records say what would have been chosen under the forced history."""
    with engine() as live:
        free = live.submit(request(max_tokens=4)).wait(60)
        other = tuple((token + 1) % 50 for token in free.tokens)
        forced = live.submit(request(max_tokens=4, forced_tokens=other)).wait(60)
    assert forced.tokens == other
    assert forced.records[0].token == free.tokens[0]
    assert forced.records[0].logits_digest == free.records[0].logits_digest
    assert forced.records[1].logits_digest != free.records[1].logits_digest


def test_malformed_and_oversized_requests_are_refused_and_others_go_on() -> None:
    """Nothing is queued for them."""
    with engine() as live:
        with pytest.raises(SequenceRefused):
            live.submit(request(prompt=(1,) * 250, max_tokens=20))
        with pytest.raises(SamplingRefused):
            live.submit(request(prompt=()))
        with pytest.raises(SamplingRefused):
            live.submit(request(prompt=(50,)))
        assert live.submit(request()).wait(60).finish_reason == "length"


def test_a_failing_call_fails_its_own_rows_only() -> None:
    """The planted token kills one request; its neighbours, and the engine, live."""
    with engine(ToyExecutor(fail_on=49)) as live:
        handles = [live.submit(request(str(n), prompt=(n + 1,) * 20, max_tokens=3)) for n in range(2)]
        bad = live.submit(request("bad", prompt=(49, 1)))
        with pytest.raises(EngineFailed) as caught:
            bad.wait(60)
        assert caught.value.failure_class is FailureClass.MODEL_PROVIDER
        assert live.submit(request("after")).wait(60).finish_reason == "length"
        assert all(handle.done for handle in handles)


def test_an_answer_that_is_no_number_costs_its_own_request_and_never_enters_the_cache() -> None:
    """In real attention a masked key of that kind still reaches the sum: a later owner of the block would fail too."""
    executor = ToyExecutor(spoil_on=49)
    pools: list[ToyPool] = []
    make = executor.new_pool
    executor.new_pool = lambda num_slots: pools.append(make(num_slots)) or pools[-1]  # type: ignore[method-assign, func-returns-value]
    recorder = ListRecorder()
    with Engine(ToyModel(executor), SCHEDULING, recorder) as live:
        spoiled = [request(f"bad {n}", prompt=(n + 1, 49, 3), max_tokens=40) for n in range(2)]
        whole = [request(f"good {n}", prompt=(n + 1, 2, 3), max_tokens=40) for n in range(2)]
        asked = [live.submit(one) for pair in zip(spoiled, whole, strict=True) for one in pair]
        for handle in asked[::2]:
            with pytest.raises(EngineFailed, match="no numbers"):
                handle.wait(60)
        assert [handle.wait(60).finish_reason for handle in asked[1::2]] == ["length", "length"]
        assert live.submit(request("after", max_tokens=90)).wait(60).finish_reason == "length"
    assert all(np.isfinite(pool.table).all() for pool in pools)


def test_cancelling_frees_the_blocks_and_names_who_asked() -> None:
    """A cancelled sequence ends once, with what it had produced."""
    seen = threading.Event()
    recorder = ListRecorder()
    with Engine(ToyModel(ToyExecutor()), SCHEDULING, recorder) as live:
        handle = live.submit(request(max_tokens=200), lambda _: seen.set())
        seen.wait(60)
        handle.cancel("operator")
        handle.cancel("again")
        result = handle.wait(60)
    assert result.finish_reason == "cancelled"
    assert result.cancel_origin == "operator"
    assert 1 <= len(result.tokens) < 200
    assert [r.reason for plan in plans_of(recorder) for r in plan.releases] == ["cancelled"]
    assert recorder.events[-1][2]["kv_blocks"] == 0


def test_a_passed_deadline_gives_the_partial_output() -> None:
    """By an injected clock: one microsecond a look."""
    ticks = iter(range(1_000_000))
    with Engine(ToyModel(ToyExecutor()), SCHEDULING, ListRecorder(), clock=lambda: next(ticks)) as live:
        result = live.submit(request(max_tokens=200, deadline_us=100)).wait(60)
    assert result.finish_reason == "deadline"
    assert 0 < len(result.tokens) < 200


def test_a_full_queue_refuses_with_an_estimate_and_the_rest_is_served() -> None:
    """Two run, two wait, the fifth is turned away: classified, recorded, with a time to come back once one is known."""
    scheduling = SCHEDULING.model_copy(update={"max_num_seqs": 1, "batch_sizes": (1,), "max_num_queued_reqs": 2})
    recorder = ListRecorder()
    running = threading.Event()
    with Engine(ToyModel(ToyExecutor()), scheduling, recorder) as live:
        first = live.submit(request("first", max_tokens=200), lambda _: running.set())
        assert running.wait(60)
        handles = [live.submit(request(str(n), max_tokens=2)) for n in range(3)]
        with pytest.raises(SequenceRefused) as caught:
            handles[2].wait(60)
        assert [handle.wait(60).finish_reason for handle in (first, *handles[:2])] == ["length"] * 3
    evidence = caught.value.complete_evidence()
    assert (caught.value.error_type, evidence["queue_depth"]) == ("queue_full", 2)
    assert evidence["retry_after_us"] > 0
    (told,) = [columns | payload for name, payload, columns in recorder.events if name == "engine.refused"]
    assert (told["sequence_id"], told["failure_class"], told["error_type"]) == ("2", "capacity_admission", "queue_full")
    assert not any(
        payload.get("sequence_id") == "2" for name, payload, _ in recorder.events if name == "engine.sequence"
    )


def test_a_deadline_out_of_reach_is_refused_before_it_costs_anything() -> None:
    """The first request teaches the engine its pace; the second could not have a token in time."""
    ticks = iter(range(0, 100_000_000, 10))
    scheduling = SCHEDULING.model_copy(update={"policy": "deadline", "load_shedding": True})
    recorder = ListRecorder()
    with Engine(ToyModel(ToyExecutor()), scheduling, recorder, clock=lambda: next(ticks)) as live:
        assert live.submit(request("one", deadline_us=10_000_000)).wait(60).finish_reason == "length"
        late = live.submit(request("late", prompt=(1,) * 100, deadline_us=150))
        with pytest.raises(SequenceRefused) as caught:
            late.wait(60)
    assert caught.value.error_type == "deadline_unreachable"
    (refusal,) = [refusal for plan in plans_of(recorder) for refusal in plan.refusals]
    assert refusal.now_us is not None and refusal.step_us is not None
    ended = [
        columns for name, payload, columns in recorder.events if name == "engine.sequence" and payload["index"] == 1
    ]
    assert (ended[1]["failure_class"], ended[1]["finish_reason"]) == ("capacity_admission", "error")


@pytest.mark.parametrize("policy", ["priority", "deadline", "fair"])
def test_every_policy_serves_a_live_engine(policy: str) -> None:
    """Under memory pressure, with cancellations: everything ends, and the plans are the schedule."""
    scheduling = SCHEDULING.model_copy(update={"policy": policy, "num_blocks": 14})
    requests = [
        msgspec.structs.replace(one, priority=number % 3, deadline_us=60_000_000 - number)
        for number, one in enumerate(requests_with_shared_prefixes(24, seed=5, vocab_size=50))
    ]
    recording = record(ToyModel(ToyExecutor()), scheduling, requests, cancel_every=7)
    assert {result.finish_reason for result in recording.results} <= {"length", "stop", "cancelled"}
    assert any(plan.preemptions for plan in recording.plans)


def test_a_raising_callback_cancels_its_own_sequence() -> None:
    """The engine goes on."""

    def broken(_: TokenRecord) -> None:
        raise OSError("gone")

    with engine() as live:
        handle = live.submit(request(max_tokens=100), broken)
        assert handle.wait(60).cancel_origin == "token_callback_failed"
        assert live.submit(request()).wait(60).finish_reason == "length"


def test_closing_ends_what_is_left_and_draining_finishes_it() -> None:
    """Nobody waits for ever."""
    live = Engine(ToyModel(ToyExecutor()), SCHEDULING, ListRecorder())
    handles = [live.submit(request(str(n), max_tokens=200)) for n in range(8)]
    live.close()
    assert {handle.wait(1).cancel_origin for handle in handles} <= {None, "engine_closed"}
    with pytest.raises(SequenceRefused):
        live.submit(request())
    draining = Engine(ToyModel(ToyExecutor()), SCHEDULING, ListRecorder())
    handles = [draining.submit(request(str(n))) for n in range(8)]
    draining.close(drain=True)
    assert {handle.wait(1).finish_reason for handle in handles} == {"length"}


def test_generate_streams_on_the_event_loop_and_cancels_with_its_caller() -> None:
    """Every token arrives before the result; a cancelled task leaves no sequence behind."""

    async def scenario() -> None:
        with engine() as live:
            seen: list[int] = []
            results = await asyncio.gather(
                live.generate(request("a"), lambda record: seen.append(record.token)), live.generate(request("b"))
            )
            assert tuple(seen) == results[0].tokens
            first = asyncio.Event()
            task = asyncio.create_task(live.generate(request("c", max_tokens=200), lambda _: first.set()))
            await first.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(scenario())


def test_every_sequence_is_recorded_in_and_out_and_plans_are_small() -> None:
    """Two lines a sequence, dense step numbers, about ten bytes a token."""
    requests = requests_with_shared_prefixes(30, seed=3, vocab_size=50)
    recording = record(ToyModel(ToyExecutor()), SCHEDULING, requests, cancel_every=9)
    phases = [payload["phase"] for name, payload, _ in recording.recorder.events if name == "engine.sequence"]
    assert phases.count("admitted") == phases.count("finished") == 30
    assert [plan.step for plan in recording.plans] == list(range(len(recording.plans)))
    size = sum(len(plan.encode()) for plan in recording.plans)
    assert size / sum(plan.token_count for plan in recording.plans) < 13

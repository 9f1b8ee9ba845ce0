"""Effects: performed and recorded live, answered from the record by kind and arguments, never written in a replay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.effects import LiveEffects, Override, RecordedEffects
from runtime.errors import AmbiguousSideEffect, EffectMiss, ToolFailed, WriteForbidden
from tests.runtime.serve.desk import MemoryRecorder
from traces.failures import ClassifiedError, FailureClass, TelemetryPersistenceError


def live(recorder: MemoryRecorder) -> LiveEffects:
    return LiveEffects(recorder, columns={"request_ref": "req_1"})


def recorded(recorder: MemoryRecorder, **settings: Any) -> RecordedEffects:
    return RecordedEffects(
        recorder.events, read_blob=recorder.read, recorder=MemoryRecorder(), columns={"request_ref": "r"}, **settings
    )  # fmt: skip


def perform(effects: Any, kind: str, arguments: dict[str, Any], action: Callable[[], Any], **more: Any) -> Any:
    return asyncio.run(effects.perform(kind, arguments, action, **more))


def never() -> Any:
    raise RuntimeError("a replay touched the world")


calls = st.lists(
    st.tuples(st.sampled_from(["retrieval", "tool", "clock"]), st.integers(0, 3), st.integers(0, 2**53 - 1)),
    max_size=12,
)


@given(calls, st.randoms(use_true_random=False))
def test_the_nth_equal_call_gets_the_nth_record_in_any_order_of_unequal_calls(
    made: list[tuple[Any, int, int]], random: Any
) -> None:
    recorder = MemoryRecorder()
    effects = live(recorder)
    for kind, argument, result in made:
        perform(effects, kind, {"argument": argument}, lambda result=result: result)
    groups: dict[tuple[str, int], list[int]] = {}
    for kind, argument, result in made:
        groups.setdefault((kind, argument), []).append(result)
    order = [key for key, results in groups.items() for _ in results]
    random.shuffle(order)
    replayed = recorded(recorder)
    for kind, argument in order:
        expected = groups[(kind, argument)].pop(0)
        assert perform(replayed, kind, {"argument": argument}, never) == expected
    assert replayed.unplayed() == ()


def test_a_miss_names_the_nearest_recorded_call_and_how_they_differ() -> None:
    recorder = MemoryRecorder()
    perform(live(recorder), "tool", {"tool": "lookup_account", "account": "4821"}, lambda: {"plan": "gold"})
    with pytest.raises(EffectMiss) as caught:
        perform(recorded(recorder), "tool", {"tool": "lookup_account", "account": "4822"}, never)
    assert '-  "account": "4821"' in caught.value.message
    assert '+  "account": "4822"' in caught.value.message
    assert caught.value.evidence["nearest"] == {"tool": "lookup_account", "account": "4821"}
    assert caught.value.fix


def test_one_more_equal_call_than_recorded_is_a_miss() -> None:
    recorder = MemoryRecorder()
    perform(live(recorder), "clock", {"purpose": "x"}, lambda: 1)
    replayed = recorded(recorder)
    perform(replayed, "clock", {"purpose": "x"}, never)
    with pytest.raises(EffectMiss, match="once more"):
        perform(replayed, "clock", {"purpose": "x"}, never)


def test_a_write_is_durable_before_it_acts_and_before_its_result_is_used() -> None:
    recorder = MemoryRecorder()
    seen: list[int] = []
    perform(live(recorder), "tool", {}, lambda: seen.append(len(recorder.events)), side_effect="reversible")
    assert seen == [1]
    assert [event.payload["phase"] for event in recorder.events] == ["intended", "performed"]
    assert all(event.durability == "mandatory" for event in recorder.events)


def test_a_write_whose_intent_cannot_be_stored_does_not_act() -> None:
    recorder = MemoryRecorder(refuse=lambda event_type, payload: True)
    acted: list[bool] = []
    with pytest.raises(TelemetryPersistenceError):
        perform(live(recorder), "tool", {}, lambda: acted.append(True), side_effect="irreversible")
    assert acted == []


def test_a_replay_never_writes_even_where_a_kind_is_allowed_anew() -> None:
    replayed = recorded(MemoryRecorder(), anew=frozenset({"memory"}))
    with pytest.raises(WriteForbidden):
        perform(replayed, "memory", {}, never, side_effect="reversible")


def test_a_recorded_failure_is_replayed_as_the_same_failure() -> None:
    recorder = MemoryRecorder()

    def fail() -> Any:
        raise ToolFailed("no answer", reason="tool_unanswered", evidence={"side_effect_status": "none"}, fix="look")

    for make in (live, recorded):
        with pytest.raises(ClassifiedError) as caught:
            perform(make(recorder), "tool", {"a": 1}, fail)
        assert caught.value.failure_class is FailureClass.TOOL_SIDE_EFFECT
        assert (caught.value.error_type, caught.value.message) == ("tool_unanswered", "no answer")
        assert caught.value.evidence == {"side_effect_status": "none"}


def test_a_write_that_broke_off_is_ambiguous_live_and_replayed() -> None:
    recorder = MemoryRecorder()
    for make in (live, recorded):
        with pytest.raises(ClassifiedError) as caught:
            perform(make(recorder), "tool", {}, never, side_effect="reversible")
        assert caught.value.error_type == "ambiguous_side_effect"
    assert recorder.events[-1].side_effect == "ambiguous"


def test_a_write_without_a_recorded_end_is_ambiguous() -> None:
    recorder = MemoryRecorder()
    perform(live(recorder), "tool", {}, lambda: 1, side_effect="reversible")
    recorder.events.pop()
    with pytest.raises(ClassifiedError) as caught:
        perform(recorded(recorder), "tool", {}, never, side_effect="reversible")
    assert caught.value.error_type == "ambiguous_side_effect"


def test_an_override_answers_one_call_and_says_that_it_simulated() -> None:
    recorder = MemoryRecorder()
    effects = live(recorder)
    for account in ("1", "2"):
        perform(effects, "tool", {"account": account}, lambda account=account: {"plan": account})
    child = MemoryRecorder()
    replayed = RecordedEffects(
        recorder.events, read_blob=recorder.read, recorder=child, columns={},
        overrides=[Override(kind="tool", arguments={"account": "2"}, result={"plan": "gold"})],
    )  # fmt: skip
    assert perform(replayed, "tool", {"account": "1"}, never) == {"plan": "1"}
    assert perform(replayed, "tool", {"account": "2"}, never) == {"plan": "gold"}
    assert [event.effect_origin for event in child.events] == ["replayed", "simulated"]


def test_frontier_kinds_go_live_only_where_the_record_ends() -> None:
    recorder = MemoryRecorder()
    perform(live(recorder), "clock", {"purpose": "x"}, lambda: 1)
    replayed = recorded(recorder, at_frontier=frozenset({"clock"}))
    assert perform(replayed, "clock", {"purpose": "x"}, never) == 1
    assert perform(replayed, "clock", {"purpose": "x"}, lambda: 2) == 2


def test_a_cancelled_read_is_recorded_as_cancelled() -> None:
    recorder = MemoryRecorder()

    async def cancelled() -> None:
        task = asyncio.ensure_future(live(recorder).perform("tool", {}, lambda: asyncio.sleep(30), side_effect="read"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert recorder.events[-1].error_type == "cancelled"


def test_what_is_recorded_is_what_the_live_run_saw() -> None:
    recorder = MemoryRecorder()
    seen = perform(live(recorder), "tool", {}, lambda: {"rows": (1, 2)})
    assert seen == json.loads(recorder.read(recorder.events[-1].result_ref))["result"] == {"rows": [1, 2]}


def test_an_answer_that_is_no_canonical_json_is_the_adapters_fault() -> None:
    with pytest.raises(ClassifiedError) as caught:
        perform(live(MemoryRecorder()), "tool", {}, lambda: {"score": 0.5})
    assert caught.value.failure_class is FailureClass.MODEL_PROVIDER
    assert not isinstance(caught.value, AmbiguousSideEffect)

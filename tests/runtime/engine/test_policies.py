"""Each policy serves in its order, nothing starves, and the fair one keeps its bound where first come does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as trial
from hypothesis import strategies as st

from runtime.engine.errors import SequenceRefused
from runtime.engine.plan import StepPlan
from runtime.engine.policies import KeyedQueue, service_gap
from runtime.engine.scheduled import SequenceState
from runtime.engine.scheduler import (
    SchedulerState,
    complete_step,
    hold,
    new_state,
    plan_step,
    resume,
    submit,
    withdraw,
)
from tests.runtime.engine.stepping import run, settings_of
from traces.failures import FailureClass


def admitted(plans: list[StepPlan]) -> list[int]:
    """The order in which sequences were let in."""
    return [one.sequence for plan in plans for one in plan.admissions]


def test_priority_serves_lower_numbers_first_then_arrival() -> None:
    state = new_state(settings_of(policy="priority", max_num_seqs=1))
    for index, priority in enumerate([5, 1, 5, 0, 1]):
        submit(state, index, prompt=(1, 2), max_tokens=1, tenant="a", priority=priority)
    assert admitted(serve(state, 5)) == [3, 1, 4, 0, 2]


def test_a_better_priority_takes_the_place_of_a_lesser_one_and_it_is_recorded() -> None:
    state = new_state(settings_of(policy="priority", max_num_seqs=1))
    submit(state, 0, prompt=(1, 2), max_tokens=9, tenant="a", priority=3)
    run(state)
    submit(state, 1, prompt=(1, 2), max_tokens=9, tenant="a", priority=3)
    assert not run(state)[0].preemptions  # an equal waits its turn
    submit(state, 2, prompt=(1, 2), max_tokens=1, tenant="a", priority=2)
    (plan,) = run(state)
    assert [(one.sequence, one.reason) for one in plan.preemptions] == [(0, "priority")]
    assert admitted([plan]) == [2]
    withdraw(state, 2, reason="length")
    assert admitted(run(state)) == [0]


def test_deadline_serves_the_earliest_first_and_the_undated_in_their_time() -> None:
    state = new_state(settings_of(policy="deadline", max_num_seqs=1, aging_us=100))
    for index, due in enumerate([90, 30, None, 500, 60]):
        submit(state, index, prompt=(1, 2), max_tokens=1, tenant="a", deadline_us=due, now_us=index)
    assert admitted(serve(state, 5)) == [1, 4, 0, 2, 3]  # 2 counts as due at 102, and 3 at 103


def test_fair_serves_the_tenant_that_had_least() -> None:
    state = new_state(settings_of(policy="fair", max_num_seqs=1))
    for index, (tenant, size) in enumerate([("a", 8), ("a", 8), ("a", 8), ("b", 2), ("b", 2), ("c", 4)]):
        submit(state, index, prompt=(index,) * size, max_tokens=1, tenant=tenant)
    assert admitted(serve(state, 6)) == [0, 3, 5, 4, 1, 2]


@pytest.mark.parametrize(("policy", "aging"), [("priority", 20), ("deadline", 200)])
def test_a_stream_of_better_ones_cannot_starve_a_lesser_one(policy: str, aging: int) -> None:
    """It waits out those that arrive within its aging, and not a step longer than their work takes."""
    assert (waited := lesser_waits(policy, aging)) is not None
    levels = 9 if policy == "priority" else 1
    steps = aging * levels if policy == "priority" else aging // 10
    assert steps - 2 <= waited <= steps + 4
    assert lesser_waits(policy, 10_000_000) is None, "without aging it would not be served at all"


def lesser_waits(policy: str, aging: int) -> int | None:
    """Steps until the least urgent sequence is let in, while a better one arrives in every step."""
    state = new_state(settings_of(policy=policy, max_num_seqs=1, aging_steps=aging, aging_us=aging))
    submit(state, 0, prompt=(1, 2), max_tokens=1, tenant="a", priority=9, now_us=0)
    for step in range(1, 500):
        now = step * 10
        submit(state, step, prompt=(1, 2), max_tokens=1, tenant="a", deadline_us=now + 15, now_us=now)
        if 0 in admitted(serve(state, 1)):
            return step
    return None


def test_nobody_is_evicted_more_often_than_the_pin_allows_and_the_last_is_refused_then() -> None:
    """Two sequences that cannot both finish: one is evicted twice, then protected, and in the end given up."""
    state = new_state(settings_of(num_blocks=4, max_num_seqs=2, max_preemptions=0, enable_prefix_caching=False))
    for index in range(2):
        submit(state, index, prompt=(1,) * 7, max_tokens=9, tenant="a")
    plans = run(state, 6)
    refused = [(one.sequence, one.reason) for plan in plans for one in plan.refusals]
    assert refused == [(1, "preemption_limit")]
    assert not any(plan.preemptions for plan in plans)
    assert [one.index for one in state.running] == [0]


@given(
    policy=st.just("fair"),
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 18)), min_size=2, max_size=6),
    caching=st.booleans(),
    blocks=st.integers(12, 24),
)
@trial(max_examples=60, deadline=None)
def test_two_backlogged_tenants_are_served_alike(
    policy: str, sizes: list[tuple[int, int]], caching: bool, blocks: int
) -> None:
    """However unlike their requests are, and through preemptions: over any span, by 2 * S * L tokens at most."""
    settings = settings_of(policy=policy, num_blocks=blocks, max_num_seqs=2, enable_prefix_caching=caching)
    assert widest_gap(new_state(settings), sizes, steps=250) <= service_gap(settings)


def test_first_come_first_served_breaks_the_bound_that_fair_keeps() -> None:
    """The control: a tenant with twenty times the requests gets nearly everything."""
    sizes = [(8, 1)] + [(8, 8)] * 20
    fair, fcfs = (settings_of(policy=name, max_num_seqs=2, num_blocks=8) for name in ("fair", "fcfs"))
    assert widest_gap(new_state(fair), sizes, steps=300, tenants=[0] + [1] * 20) <= service_gap(fair)
    assert widest_gap(new_state(fcfs), sizes, steps=300, tenants=[0] + [1] * 20) > service_gap(fcfs)


def widest_gap(
    state: SchedulerState, sizes: list[tuple[int, int]], *, steps: int, tenants: list[int] | None = None
) -> int:
    """Keep two tenants backlogged and return by how many tokens their service differs most over any span of steps.

    sizes: prompt and output lengths that arrive in turn; tenants: whose each is, in turns when None.
    """
    left: dict[int, int] = {}
    owner: dict[int, int] = {}
    served, paid = [0, 0], dict[int, int]()
    differences = [0]
    arrived = 0
    for _ in range(steps):
        while min(sum(owner[index] == tenant for index in left if index in state.waiting) for tenant in (0, 1)) < 2:
            prompt, output = sizes[arrived % len(sizes)]
            owner[arrived] = arrived % 2 if tenants is None else tenants[arrived % len(tenants)]
            submit(state, arrived, prompt=(arrived % 7,) * prompt, max_tokens=output, tenant="ab"[owner[arrived]])
            left[arrived] = output
            arrived += 1
        plan, state = plan_step(state)
        for admission in plan.admissions:  # the prompt is charged when it is let in, without what the cache spared
            hit, index = len(admission.hits) * state.settings.block_size, admission.sequence
            known = max(paid.get(index, 0), hit)
            served[owner[index]] += max(0, admission.known - known)
            paid[index] = max(known, admission.known)
        sampled: dict[int, int] = {}
        for row in (row for call in plan.calls for row in call.rows):
            if row.start + row.count > paid[row.sequence]:
                served[owner[row.sequence]] += row.start + row.count - paid[row.sequence]
                paid[row.sequence] = row.start + row.count
            if row.sample:
                sampled[row.sequence] = 3
        complete_step(state, plan, sampled)
        finish(state, left, sampled)
        for refusal in plan.refusals:
            del left[refusal.sequence]
        differences.append(served[0] - served[1])
    return max(differences) - min(differences)


def finish(state: SchedulerState, left: dict[int, int], sampled: dict[int, int]) -> None:
    """End the sequences that have all their tokens."""
    for index in sampled:
        left[index] -= 1
        if not left[index]:
            withdraw(state, index, reason="length")
            del left[index]


def serve(state: SchedulerState, steps: int) -> list[StepPlan]:
    """Run steps in which every sequence ends with its first token."""
    plans: list[StepPlan] = []
    for _ in range(steps):
        (plan,) = run(state)
        for call in plan.calls:
            for row in call.rows:
                if row.sample:
                    withdraw(state, row.sequence, reason="length")
        plans.append(plan)
    return plans


def test_a_full_queue_refuses_with_its_depth_and_an_empty_one_takes_anything() -> None:
    state = new_state(settings_of(max_num_queued_tokens=5, max_num_seqs=1))
    submit(state, 0, prompt=(2,), max_tokens=1, tenant="a")
    run(state)
    submit(state, 1, prompt=(1,) * 9, max_tokens=1, tenant="a")
    with pytest.raises(SequenceRefused) as caught:
        submit(state, 2, prompt=(1,), max_tokens=1, tenant="a")
    assert caught.value.failure_class is FailureClass.CAPACITY_ADMISSION
    evidence = caught.value.complete_evidence()
    assert (evidence["queue_depth"], evidence["queued_tokens"]) == (1, 9)
    assert evidence["excess"] == {"sequences": 0, "tokens": 5}
    withdraw(state, 0, reason="length")
    submit(state, 2, prompt=(1,), max_tokens=1, tenant="a")


def burst(state: SchedulerState, count: int, *, tokens: int) -> int:
    """Submit so many at once; return how many the queue took."""
    for index in range(count):
        try:
            submit(state, index, prompt=(index,) * tokens, max_tokens=1, tenant="a")
        except SequenceRefused as refusal:
            assert refusal.evidence["queue_depth"] == index
            return index
    return count


def test_what_the_next_step_would_run_does_not_count_as_queued() -> None:
    """An idle engine with eight places and a queue of two takes ten at once, and runs eight of them."""
    pins = {"max_num_seqs": 8, "batch_sizes": (8,), "max_num_batched_tokens": 16, "num_blocks": 12}
    state = new_state(settings_of(max_num_queued_reqs=2, **pins))
    assert burst(state, 20, tokens=2) == 10
    run(state)
    assert (len(state.running), len(state.waiting)) == (8, 2)
    with pytest.raises(SequenceRefused):
        submit(state, 20, prompt=(1,), max_tokens=1, tenant="a")
    withdraw(state, 0, reason="length")
    submit(state, 20, prompt=(1,), max_tokens=1, tenant="a")
    assert burst(new_state(settings_of(max_num_queued_tokens=5, **pins)), 20, tokens=2) == 10


def test_places_without_blocks_are_none() -> None:
    """Twelve blocks hold four prompts of three blocks, so that four of eight places are worth something."""
    pins = {"max_num_seqs": 8, "batch_sizes": (8,), "num_blocks": 12}
    assert burst(new_state(settings_of(max_num_queued_reqs=2, **pins)), 20, tokens=12) == 6


def test_a_deadline_that_cannot_be_met_is_refused_with_the_reckoning() -> None:
    state = new_state(settings_of(policy="deadline", load_shedding=True))
    submit(state, 0, prompt=(1,) * 20, max_tokens=1, tenant="a", deadline_us=1_000, now_us=0)
    submit(state, 1, prompt=(1,) * 4, max_tokens=1, tenant="a", deadline_us=1_001, now_us=0)
    plan, state = plan_step(state, now_us=500, step_us=300)
    assert [(one.sequence, one.reason, one.now_us, one.step_us) for one in plan.refusals] == [
        (0, "deadline_unreachable", 500, 300)
    ]
    assert admitted([plan]) == [1]


def test_a_held_sequence_keeps_its_blocks_until_they_are_needed() -> None:
    state = new_state(settings_of(num_blocks=6))
    submit(state, 0, prompt=(1,) * 7, max_tokens=9, tenant="a")
    run(state)
    assert hold(state, 0) and not state.has_work
    submit(state, 1, prompt=(2,) * 7, max_tokens=9, tenant="a")
    (plan,) = run(state)
    assert plan.held == [0] and not plan.preemptions
    submit(state, 2, prompt=(3,) * 11, max_tokens=2, tenant="a")
    (plan,) = run(state)
    assert [(one.sequence, one.reason) for one in plan.preemptions] == [(0, "stalled")]
    assert not run(state)[0].held and 0 in state.parked
    assert resume(state, 0) and 0 in state.waiting


def test_a_queue_forgets_what_was_removed() -> None:
    """Removing from the middle is cheap and leaves no growing remainder."""
    queue = KeyedQueue()
    for index in range(10_000):
        queue.push(SequenceState(index, [1], b"", key=(0, index)))
        if index >= 10:
            queue.remove(index)
    assert len(queue) == 10 and len(queue.heap) < 200
    assert [queue.take().index for _ in range(10)] == list(range(10))

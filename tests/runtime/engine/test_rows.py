"""Where does a decoding sequence stand?  In its row from step to step; and where it stands decides nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.diff import diff_dimension
from manifests.scheduling import SchedulingManifest
from runtime.engine.draft import keep_places
from runtime.engine.plan import Hit, StepPlan
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

POLICIES = ["fcfs", "priority", "deadline", "fair"]


@given(before=st.lists(st.integers(0, 12), unique=True, max_size=8), now=st.lists(st.integers(0, 12), unique=True))
def test_no_more_rows_move_than_left(before: list[int], now: list[int]) -> None:
    """Whoever comes and goes: the same rows, without holes, and one that stays moves only into a hole."""
    placed = [row[0] for row in keep_places(before, [(index, 5, 1, True) for index in now])]
    assert sorted(placed) == sorted(now)
    moved = [index for index in before if index in now and placed.index(index) != before.index(index)]
    assert len(moved) <= len(set(before) - set(now))
    assert all(placed.index(index) < before.index(index) for index in moved)
    new = [index for index in placed if index not in before]
    assert new == [index for index in now if index not in before], "new ones stand in the order of service"


def test_the_last_row_moves_into_the_hole() -> None:
    """One move where one ends and nobody comes; none where another comes at once; without a predecessor, as decided."""
    rows = [(index, 5, 1, True) for index in (1, 3, 4, 6)]
    assert [row[0] for row in keep_places([1, 2, 3, 4], rows[:3])] == [1, 4, 3]
    assert [row[0] for row in keep_places([1, 2, 3, 4], rows)] == [1, 6, 3, 4]
    assert [row[0] for row in keep_places([2, 5, 7, 1], rows[:1])] == [1]
    assert keep_places([], rows) == rows


def test_rows_stay_when_one_ends() -> None:
    """Four decode; the first ends, and only the last changes its row; in the order of service all would."""
    for order, rows in (("stable", [3, 1, 2]), ("service", [1, 2, 3])):
        state = new_state(settings_of(row_order=order, max_num_batched_tokens=16))
        for index in range(4):
            submit(state, index, prompt=(index,) * 2, max_tokens=20, tenant="a")
        run(state, 2)
        withdraw(state, 0, reason="stop")
        assert [plan.calls[0].sequences for plan in run(state, 2)] == [rows, rows]


def test_a_document_from_before_means_the_order_of_service() -> None:
    """It keeps its digest and its plans; new ones say what they do, and a difference between both is named."""
    old = {name: value for name, value in SchedulingManifest().to_document().items() if name != "row_order"}
    read = SchedulingManifest.from_document(old)
    assert (read.row_order, read.to_document()) == ("service", old)
    assert SchedulingManifest.from_document(SchedulingManifest().to_document()).row_order == "stable"
    assert SchedulingManifest(row_order="service") == read != SchedulingManifest()
    (found,) = diff_dimension("scheduling", read, SchedulingManifest())
    assert (found.path, found.left, found.right) == ("scheduling.row_order", "service", "stable")


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32))
def test_places_decide_nothing_else(policy: str, seed: int) -> None:
    """One history of arrivals, ends, cancellations and slow readers: but for the places, the plans are the same."""
    draw = random.Random(seed)
    pins = {
        "policy": policy,
        "num_blocks": draw.randrange(6, 14),
        "max_num_batched_tokens": draw.randrange(4, 20),
        "aging_steps": 5,
        "max_preemptions": draw.choice([None, 1, 2]),
    }
    one, two = (new_state(settings_of(row_order=order, **pins)) for order in ("stable", "service"))
    script = [draw.random() for _ in range(60)]
    before: list[int] = []
    arrived = 0
    for chance in script:
        if chance < 0.4:
            arrive([one, two], arrived, draw)
            arrived += 1
        elif chance < 0.55 and arrived:
            disturb([one, two], draw.randrange(arrived), draw.choice(["cancel", "hold", "resume"]))
        else:
            kept, plain = (plan_step(state)[0] for state in (one, two))
            assert placeless(kept) == placeless(plain)
            now = kept.calls[0].sequences if kept.calls and kept.calls[0].tokens == 1 else []
            moved = [index for index in before if index in now and now.index(index) != before.index(index)]
            assert len(moved) <= len(set(before) - set(now))
            before = now
            finish([(one, kept), (two, plain)], draw)
    assert one.running == two.running and one.waiting == two.waiting
    assert {name: value for name, value in vars(one.cache).items() if name != "origin_of"} == {
        name: value for name, value in vars(two.cache).items() if name != "origin_of"
    }


def arrive(states: list[SchedulerState], index: int, draw: random.Random) -> None:
    """Submit the same sequence to both; prompts of few kinds, so that prefixes are shared."""
    prompt = tuple([1] * draw.randrange(1, 10) + [draw.randrange(2)] * draw.randrange(1, 4))
    tenant, priority, due = draw.choice("ab"), draw.randrange(3), draw.randrange(100)
    for state in states:
        submit(
            state, index, prompt=prompt, max_tokens=8, tenant=tenant, priority=priority, deadline_us=due, now_us=index
        )


def disturb(states: list[SchedulerState], index: int, what: str) -> None:
    """Do the same to a sequence in both; nothing where it has ended."""
    for state in states:
        if what == "cancel":
            withdraw(state, index, reason="cancelled")
        elif what == "hold":
            hold(state, index)
        else:
            resume(state, index)


def finish(planned: list[tuple[SchedulerState, StepPlan]], draw: random.Random) -> None:
    """Give every sampling row one of two tokens, and end some, in both alike."""
    rows = sorted(row.sequence for call in planned[0][1].calls for row in call.rows if row.sample)
    sampled = {index: draw.randrange(2) for index in rows}
    ended = [index for index in rows if draw.random() < 0.15]
    for state, plan in planned:
        complete_step(state, plan, sampled)
        for one in list(state.running):
            if one.index in ended or len(one.tokens) >= 20:
                withdraw(state, one.index, reason="length")


def placeless(plan: StepPlan) -> object:
    """What a plan decided, without rows' places."""
    calls = [
        (
            call.graph,
            call.batch,
            call.tokens,
            call.context,
            sorted((r.sequence, r.start, r.count, r.sample) for r in call.rows),
        )
        for call in plan.calls
    ]
    entered = [(one.sequence, one.known, [placeless_hit(hit) for hit in one.hits]) for one in plan.admissions]
    return calls, entered, plan.allocations, plan.releases, plan.preemptions, plan.refusals, plan.held


def placeless_hit(hit: Hit) -> tuple[int, int, int]:
    """A hit without the row that computed it."""
    return hit.block, hit.step, hit.call

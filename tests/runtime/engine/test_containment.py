"""A call that kept nothing is replaced by its rows, one by one; any other failure is its rows' own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.backends.errors import ExecutionFailed, HostDied, HostOutOfMemory, HostTimedOut
from runtime.engine.containment import ContainedCalls, single_rows
from runtime.engine.errors import AnswerNotFinite
from runtime.engine.plan import Call, StepPlan, decode_plan
from runtime.engine.settings import settings_for
from tests.runtime.engine.test_loop import SCHEDULING
from tests.runtime.engine.toy import ToyExecutor

SETTINGS = settings_for(SCHEDULING, ToyExecutor())


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A decode call or a prefill call of up to four rows, some of them silent."""
    rows = draw(st.integers(1, 4))
    tokens = draw(st.sampled_from([1, 16, 32]))
    starts = draw(st.lists(st.integers(0, 200), min_size=rows, max_size=rows))
    counts = [] if tokens == 1 else draw(st.lists(st.integers(1, tokens), min_size=rows, max_size=rows))
    silent = draw(st.sets(st.integers(0, rows - 1)))
    return Call(
        graph="decode" if tokens == 1 else "prefill",
        batch=4,
        tokens=tokens,
        context=256,
        sequences=list(range(rows)),
        starts=starts,
        counts=counts,
        silent=sorted(silent),
    )


@given(calls())
def test_single_rows_are_the_same_rows_in_shapes_of_their_own(call: Call) -> None:
    alone = single_rows(call, SETTINGS)
    assert [row for one in alone for row in one.rows] == list(call.rows)
    assert all(one.batch == 1 and one.tokens == call.tokens and one.context >= one.starts[0] for one in alone)


@given(st.lists(calls(), min_size=1, max_size=4), st.data())
def test_only_a_call_that_kept_nothing_is_replaced_and_the_plan_says_what_ran(
    planned: list[Call], data: st.DataObject
) -> None:
    plan = StepPlan(step=3, calls=planned)
    contained = ContainedCalls(plan, SETTINGS)
    ran: list[Call] = []
    for call in contained:
        died = [HostDied("gone"), HostTimedOut("gone"), HostOutOfMemory("gone"), AnswerNotFinite()]
        error = data.draw(st.sampled_from([None, ExecutionFailed("its own"), *died]))
        lost = error in died
        replaced = error is not None and contained.replace(error)
        assert replaced == (lost and len(call.sequences) > 1)
        if not replaced:
            ran.append(call)
    edited = contained.plan()
    assert edited.calls == ran
    assert [row for call in edited.calls for row in call.rows] == [row for call in planned for row in call.rows]
    assert decode_plan(edited.encode()) == edited

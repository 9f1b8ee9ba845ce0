"""How a step is filled: decodes first, chunks, shared prefixes, preemption, the watermark; what can never fit."""

from __future__ import annotations

import pytest

from runtime.engine.errors import SequenceRefused, SettingsRefused
from runtime.engine.scheduler import new_state, submit
from tests.runtime.engine.stepping import run, settings_of
from traces.failures import FailureClass


def test_decodes_come_first_and_chunks_fill_the_budget() -> None:
    """A running decode keeps its place while a long prompt is read in chunks."""
    state = new_state(settings_of())
    submit(state, 0, prompt=(1, 2), max_tokens=20, tenant="a")
    run(state)
    submit(state, 1, prompt=tuple(range(20)), max_tokens=2, tenant="a")
    first, second = run(state, 2)
    assert [(call.graph, [(row.sequence, row.start, row.count) for row in call.rows]) for call in first.calls] == [
        ("decode", [(0, 2, 1)]),
        ("prefill", [(1, 0, 11)]),
    ]
    assert [row.start for row in second.calls[1].rows] == [11]
    assert first.calls[1].silent == [0]


def test_a_shared_prefix_is_hit_only_inside_one_tenant() -> None:
    """The second request of a tenant reads the first one's blocks, with their origin; another tenant computes."""
    state = new_state(settings_of(max_num_batched_tokens=16))
    submit(state, 0, prompt=(1,) * 9, max_tokens=4, tenant="a")
    run(state)
    submit(state, 1, prompt=(1,) * 9, max_tokens=4, tenant="a")
    submit(state, 2, prompt=(1,) * 9, max_tokens=4, tenant="b")
    submit(state, 3, prompt=(1,) * 9, max_tokens=4, tenant="a")
    (plan,) = run(state)
    hits = {
        admission.sequence: [(hit.step, hit.call, hit.row) for hit in admission.hits] for admission in plan.admissions
    }
    assert hits == {1: [(0, 0, 0)] * 2, 2: [], 3: [(0, 0, 0)] * 2}


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    """When blocks run out the newest sequence yields, keeps its tokens, and is recomputed before later arrivals."""
    state = new_state(settings_of(num_blocks=4, enable_prefix_caching=False))
    for index in range(2):
        submit(state, index, prompt=(1,) * 7, max_tokens=9, tenant="a")
    submit(state, 2, prompt=(1, 2), max_tokens=2, tenant="a")
    plans = run(state, 12)
    preempted = [(plan.step, one.sequence) for plan in plans for one in plan.preemptions]
    assert preempted[0][1] == 1
    order = [one.sequence for plan in plans for one in plan.admissions]
    assert order[:2] == [0, 1]


def test_what_can_never_fit_is_refused_as_capacity() -> None:
    """A request longer than the cache is refused alone, with what it needed."""
    state = new_state(settings_of(num_blocks=2))
    with pytest.raises(SequenceRefused) as caught:
        submit(state, 0, prompt=(1,) * 7, max_tokens=2, tenant="a")
    assert caught.value.failure_class is FailureClass.CAPACITY_ADMISSION
    assert caught.value.complete_evidence()["reservation_failure"] == {"tokens_needed": 9, "tokens_possible": 8}
    assert not state.has_work


def test_context_is_padded_to_whole_blocks_where_nothing_else_is_pinned() -> None:
    assert [settings_of(context_multiple=None).pad_context(start) for start in (0, 1, 4, 5, 8)] == [4, 4, 4, 8, 8]
    assert [settings_of(context_multiple=8).pad_context(start) for start in (0, 1, 4, 5, 8)] == [8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {"context_multiple": 6},
        {"batch_sizes": (1, 2)},
        {"batch_sizes": ()},
        {"max_num_batched_tokens": 3},
        {"watermark": "1.01"},
        {"watermark": "-0.5"},
    ],
)
def test_contradicting_pins_are_refused(changes: dict[str, object]) -> None:
    """Settings that no engine could honour are refused before it starts, as bad input that names the pin."""
    with pytest.raises(SettingsRefused, match=next(iter(changes)).split("_")[0]) as caught:
        settings_of(**changes)
    assert caught.value.failure_class is FailureClass.VALIDATION_POLICY
    assert caught.value.fix


def test_a_watermark_holds_back_admission_but_never_the_only_sequence() -> None:
    """With half the blocks reserved, one sequence may still use all of them."""
    state = new_state(settings_of(num_blocks=4, watermark="0.5"))
    submit(state, 0, prompt=(1,) * 9, max_tokens=4, tenant="a")
    submit(state, 1, prompt=(2,) * 3, max_tokens=4, tenant="a")
    (plan,) = run(state)
    assert [one.sequence for one in plan.admissions] == [0]


def test_tenants_share_prefixes_where_it_is_allowed() -> None:
    """Under `prefix_sharing` all, the other tenant hits too; another salt still computes for itself."""
    state = new_state(settings_of(max_num_batched_tokens=16, prefix_sharing="all"))
    submit(state, 0, prompt=(1,) * 9, max_tokens=4, tenant="a")
    run(state)
    submit(state, 1, prompt=(1,) * 9, max_tokens=4, tenant="b")
    submit(state, 2, prompt=(1,) * 9, max_tokens=4, tenant="b", salt="own")
    (plan,) = run(state)
    assert {one.sequence: len(one.hits) for one in plan.admissions} == {1: 2, 2: 0}

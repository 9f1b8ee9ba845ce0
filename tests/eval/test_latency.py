"""Latency: the parts of the critical path sum to the end-to-end time, always and exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.latency import UNCOVERED, compare_stages, decompose
from eval.records import SpanRecord
from eval.token_latency import (
    Objective,
    TokenLatency,
    attainment,
    chunk_gaps,
    goodput,
    streamed_latency,
    token_latency,
)
from tests.strategies import span_sets

SPECIFICATION = (
    ("boundary", 0, 24),
    ("context", 18, 156),
    ("route", 150, 166),
    ("queue", 160, 234),
    ("prefill", 230, 516),
    ("decode", 510, 936),
    ("tool authorization", 702, 724),
    ("tool", 720, 884),
    ("final", 882, 1136),
    ("validation", 1128, 1220),
    ("commit", 1210, 1258),
    ("response", 1254, 1272),
)
"""The specification's example runtime trace, in milliseconds."""


def _spans(*parts: tuple[str, int, int]) -> tuple[SpanRecord, ...]:
    return tuple(SpanRecord(name, start, end) for name, start, end in parts)


def test_the_specifications_twelve_spans_make_1272_ms() -> None:
    found = decompose(_spans(*((name, start * 1000, end * 1000) for name, start, end in SPECIFICATION)))
    assert sum(item.inclusive_us for item in found.spans) == 1_562_000
    assert [item.critical_us // 1000 for item in found.spans] == [18, 132, 10, 70, 280, 192, 18, 162, 246, 82, 44, 18]
    assert sum(item.critical_us for item in found.spans) == found.total_us == 1_272_000
    assert found.uncovered_us == 0


@given(span_sets(), st.integers(0, 400), st.integers(0, 400))
def test_critical_parts_sum_to_the_whole(spans: tuple[SpanRecord, ...], one: int, other: int) -> None:
    for bounds in ({}, {"start_us": min(one, other), "end_us": max(one, other)}):
        found = decompose(spans, **bounds)
        assert sum(item.critical_us for item in found.spans) + found.uncovered_us == found.total_us
        assert sum(found.by_stage().values()) == found.total_us
        for item in found.spans:
            assert 0 <= item.exclusive_us <= item.inclusive_us
            assert 0 <= item.critical_us <= item.inclusive_us


@given(span_sets())
def test_the_path_has_no_gap_and_no_overlap(spans: tuple[SpanRecord, ...]) -> None:
    found = decompose(spans)
    times = [found.start_us, *(segment.end_us for segment in found.path)]
    assert [segment.start_us for segment in found.path] == times[: len(found.path)]
    assert found.path == () or times[-1] == found.end_us


@given(span_sets(latest_us=40))
def test_the_sweep_agrees_with_asking_every_instant(spans: tuple[SpanRecord, ...]) -> None:
    found = decompose(spans)
    by_id = {span.span_id: span for span in spans}

    def above(span: SpanRecord) -> list[str | None]:
        chain: list[str | None] = []
        while span.parent_span_id is not None:
            span = by_id[span.parent_span_id]
            chain.append(span.span_id)
        return chain

    critical = dict.fromkeys(range(len(spans)), 0)
    exclusive = dict.fromkeys(range(len(spans)), 0)
    for instant in range(found.start_us, found.end_us):
        active = [index for index, span in enumerate(spans) if span.start_us <= instant < span.end_us]
        if not active:
            continue
        owner = max(active, key=lambda i: (spans[i].start_us, len(above(spans[i])), -spans[i].end_us, i))
        critical[owner] += 1
        for index in active:
            if all(other == index or spans[other].span_id in above(spans[index]) for other in active):
                exclusive[index] += 1
    assert [item.critical_us for item in found.spans] == list(critical.values())
    assert [item.exclusive_us for item in found.spans] == list(exclusive.values())


def test_uncovered_time_has_an_owner_of_its_own() -> None:
    found = decompose(_spans(("a", 10, 20), ("b", 30, 40)), start_us=0, end_us=50)
    assert found.uncovered_us == 30
    assert found.by_stage() == {"a": 10, "b": 10, UNCOVERED: 30}
    assert [segment.owner for segment in found.path] == [None, 0, None, 1, None]


def test_a_root_span_owns_only_what_its_children_leave() -> None:
    root = SpanRecord("request", 0, 100, None, "0", None)
    child = SpanRecord("prefill", 0, 60, "b05", "1", "0")
    found = decompose((child, root))
    assert [(item.critical_us, item.exclusive_us) for item in found.spans] == [(60, 60), (40, 40)]


def test_a_span_that_began_before_the_request_does_not_outrank_one_that_began_with_it() -> None:
    found = decompose(_spans(("late", 10, 30), ("early", 0, 30)), start_us=10)
    assert [item.critical_us for item in found.spans] == [20, 0]


def test_nothing_recorded_has_no_time() -> None:
    with pytest.raises(ValueError, match="no span"):
        decompose(())
    assert decompose((), start_us=0, end_us=5).by_stage() == {UNCOVERED: 5}
    with pytest.raises(ValueError, match="before it starts"):
        decompose((), start_us=5, end_us=0)
    with pytest.raises(ValueError, match="before it starts"):
        SpanRecord("a", 5, 4)


def test_stages_of_two_requests_stand_side_by_side() -> None:
    left = decompose(_spans(("queue", 0, 10), ("decode", 10, 30)))
    right = decompose(_spans(("queue", 0, 40), ("tool", 40, 45)))
    assert compare_stages(left, right) == {"queue": (10, 40), "decode": (20, 0), "tool": (0, 5)}


def test_token_latency_starts_at_the_scheduled_arrival() -> None:
    found = token_latency(100, [400, 450, 530])
    assert found == TokenLatency(300, 430, (50, 80))
    assert found.per_token_us == 65.0
    single = token_latency(0, [7])
    assert single is not None and single.per_token_us is None
    assert token_latency(0, []) is None
    with pytest.raises(ValueError, match="one clock"):
        token_latency(100, [50])


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8).map(sorted))
def test_first_token_and_gaps_sum_to_the_end(times: list[int]) -> None:
    found = token_latency(times[0], times[1:])
    assert found is not None
    assert found.first_us + sum(found.gaps_us) == found.end_us


def test_attainment_counts_all_sent_requests() -> None:
    fast, slow = token_latency(0, [10, 20]), token_latency(0, [10, 200])
    objective = Objective(first_us=10, per_token_us=50.0, end_us=1000)
    assert attainment([fast, slow, None], objective) == (1, 3)
    assert attainment([], objective) == (0, 0)
    assert Objective().met_by(slow)


def test_goodput_is_good_requests_a_second_and_no_time_has_none() -> None:
    fast, slow = token_latency(0, [10, 20]), token_latency(0, [10, 200])
    objective = Objective(per_token_us=50.0)
    assert goodput([fast, slow, None, fast], objective, duration_us=500_000) == 4.0
    assert goodput([None], objective, duration_us=1) == 0.0
    assert goodput([fast], objective, duration_us=0) is None
    with pytest.raises(ValueError, match="no duration"):
        goodput([fast], objective, duration_us=-1)


def test_a_late_client_cannot_hide_queueing() -> None:
    found = token_latency(100, [400, 450], sent_us=350)
    assert found is not None
    assert (found.first_us, found.lag_us, found.first_from_send_us) == (300, 250, 50)
    unnoted = token_latency(100, [400])
    assert unnoted is not None and unnoted.first_from_send_us is None
    with pytest.raises(ValueError, match="one clock"):
        token_latency(100, [400], sent_us=401)


def test_chunks_of_several_tokens_have_a_gap_a_token() -> None:
    assert chunk_gaps([(100, 3), (140, 2), (150, 1)]) == (20.0, 10.0)
    assert chunk_gaps([(100, 3)]) == chunk_gaps([]) == ()
    with pytest.raises(ValueError, match="without tokens"):
        chunk_gaps([(1, 1), (2, 0)])


def test_the_wait_between_two_generations_is_no_gap_between_tokens() -> None:
    found = streamed_latency(0, [[(100, 1), (110, 2)], [(500, 1), (520, 1)]], sent_us=40)
    assert found == TokenLatency(100, 520, (10, 0, 20), 40)
    assert found.per_token_us == 10.0
    assert streamed_latency(0, []) is streamed_latency(0, [[]]) is None
    with pytest.raises(ValueError, match="without tokens"):
        streamed_latency(0, [[(100, 0)]])


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 3)), min_size=1, max_size=8).map(sorted))
def test_one_generation_streamed_is_the_latency_of_its_tokens(chunks: list[tuple[int, int]]) -> None:
    tokens = [at for at, count in chunks for _ in range(count)]
    assert streamed_latency(0, [chunks]) == token_latency(0, tokens)


LATENCIES = st.lists(
    st.none()
    | st.lists(st.integers(0, 1000), min_size=1, max_size=5).map(lambda times: token_latency(0, sorted(times))),
    max_size=8,
)


@given(LATENCIES, st.integers(0, 1000), st.integers(0, 500), st.integers(0, 500))
def test_a_looser_objective_is_kept_by_no_fewer_requests(
    latencies: list[TokenLatency | None], first_us: int, per_token_us: int, looser: int
) -> None:
    strict = Objective(first_us=first_us, per_token_us=per_token_us)
    loose = Objective(first_us=first_us + looser, per_token_us=per_token_us + looser)
    kept, sent = attainment(latencies, strict)
    more, also_sent = attainment(latencies, loose)
    assert kept <= more <= sent == also_sent == len(latencies)
    rate = goodput(latencies, strict, duration_us=1_000_000)
    assert rate is not None and rate == kept

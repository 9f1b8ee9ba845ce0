"""The batcher's decision is a pure function; no batch is too large, nobody waits too long beside a free instance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.batching import BatchingSettings, Waiting, decide
from runtime.errors import RequestRefused

SETTINGS = st.builds(
    lambda most, sizes, delay: BatchingSettings(
        max_batch_size=most,
        preferred_batch_size=tuple(sorted({1 + size % most for size in sizes})),
        max_queue_delay_microseconds=delay,
    ),
    st.integers(1, 12),
    st.lists(st.integers(0, 11), max_size=3),
    st.integers(0, 50),
)
QUEUES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12), st.sampled_from("ab")), max_size=12)


def queue_of(drawn: list[tuple[int, int, str]], settings: BatchingSettings) -> list[Waiting]:
    arrivals = sorted(arrival for arrival, _, _ in drawn)
    return [
        Waiting(index, arrival, 1 + (rows - 1) % settings.max_batch_size, shape)
        for index, (arrival, (_, rows, shape)) in enumerate(zip(arrivals, drawn, strict=True))
    ]


def waiting(*rows: int, arrival: int = 0) -> list[Waiting]:
    return [Waiting(index, arrival, count, "") for index, count in enumerate(rows)]


@given(SETTINGS, QUEUES, st.integers(1, 4))
def test_every_decision_keeps_the_rules(
    settings: BatchingSettings, drawn: list[tuple[int, int, str]], free: int
) -> None:
    queue, now = queue_of(drawn, settings), 60
    decision = decide(queue, now, free=free, settings=settings)
    assert decision == decide(queue, now, free=free, settings=settings), "pure"
    by_index = {one.index: one for one in queue}
    taken = [index for batch in decision.batches for index in batch.requests]
    assert len(taken) == len(set(taken)), "no request is in two batches"
    assert len(decision.batches) <= free
    for batch in decision.batches:
        members = [by_index[index] for index in batch.requests]
        assert batch.requests == sorted(batch.requests), "oldest first"
        assert {one.shape for one in members} == {batch.shape}
        assert [one.rows for one in members] == batch.rows
        assert batch.size <= settings.max_batch_size
        older = [one for one in queue if one.shape == batch.shape and one.index < batch.requests[-1]]
        assert {one.index for one in older} <= set(taken), "nobody of the same shape is passed over"
    left = [one for one in queue if one.index not in set(taken)]
    if len(decision.batches) < free:
        late = [one for one in left if now - one.arrival_us >= settings.max_queue_delay_microseconds]
        assert not late, "a free instance leaves nobody waiting beyond the delay"
        if left:
            assert decision.wake_us is not None
            assert decision.wake_us > now


@given(SETTINGS, QUEUES)
def test_deciding_again_and_again_ends_every_request_once(
    settings: BatchingSettings, drawn: list[tuple[int, int, str]]
) -> None:
    queue, now, seen = queue_of(drawn, settings), 0, list[int]()
    while queue:
        decision = decide([one for one in queue if one.arrival_us <= now], now, free=1, settings=settings)
        for batch in decision.batches:
            seen += batch.requests
            queue = [one for one in queue if one.index not in set(batch.requests)]
        now += 1
        assert now < 10_000, "everything goes in the end"
    assert sorted(seen) == list(range(len(drawn)))


@pytest.mark.parametrize(
    ("rows", "now", "size", "due"),
    [
        ((1, 1, 1, 1), 0, 4, "preferred"),
        ((1, 1, 1, 1, 1, 1), 0, 4, "preferred"),
        ((2, 1, 2, 1, 2), 0, 8, "preferred"),
        ((3, 3, 3), 0, 6, "full"),
        ((1, 1, 1), 0, None, None),
        ((1, 1, 1), 99, None, None),
        ((1, 1, 1), 100, 3, "delay"),
    ],
)
def test_preferred_sizes_go_at_once_and_the_rest_at_the_end_of_the_delay(
    rows: tuple[int, ...], now: int, size: int | None, due: str | None
) -> None:
    settings = BatchingSettings(max_batch_size=8, preferred_batch_size=(4, 8), max_queue_delay_microseconds=100)
    decision = decide(waiting(*rows), now, free=1, settings=settings)
    found = [(batch.size, batch.due) for batch in decision.batches]
    assert found == ([] if size is None else [(size, due)])
    if size is None:
        assert decision.wake_us == 100


@pytest.mark.parametrize(
    "fields",
    [
        {"max_batch_size": 0},
        {"preferred_batch_size": (9,)},
        {"max_queue_delay_microseconds": -1},
        {"max_queue_size": 0},
        {"instance_count": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(RequestRefused, match="do not hold together"):
        BatchingSettings(**fields)  # type: ignore[arg-type]

"""Compiled shapes: made once each, so many at a time, so many in all, every one of them reported."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.backends.buckets import Bucket
from runtime.backends.errors import InputRefused
from runtime.backends.xla_specializations import Specializations
from traces.failures import FailureClass, rule_of

BUCKETS = tuple(Bucket(batch, 1, 64) for batch in (1, 2, 4, 8, 16, 32))


def held(limit: int, compile_bucket: Callable[[Bucket], Any] | None = lambda b: b.name, **more: Any) -> Specializations:
    settings = {"concurrency": 1, "evict": False, **more}
    ready = settings.pop("ready", {})
    return Specializations(
        ready, compile_bucket=compile_bucket, cache_key=lambda bucket: f"key {bucket.name}", limit=limit, **settings
    )


@given(calls=st.lists(st.sampled_from(BUCKETS), max_size=30), limit=st.integers(1, 7), evict=st.booleans())
def test_growth_is_bounded_and_every_compile_is_reported(calls: list[Bucket], limit: int, evict: bool) -> None:
    shapes = held(limit, evict=evict)
    expected: list[Bucket] = []  # least recently used first
    compiled: list[str] = []
    for bucket in calls:
        if bucket in expected:
            expected.remove(bucket)
        elif len(expected) == limit and not evict:
            with pytest.raises(InputRefused):
                shapes.get(bucket)
            continue
        else:
            compiled.append(bucket.name)
            expected = expected[-(limit - 1) :] if limit > 1 else []
        expected.append(bucket)
        assert shapes.get(bucket) == bucket.name
        assert shapes.held() == tuple(expected)
    assert [event.shape for event in shapes.events()] == compiled
    assert [event.cache_key for event in shapes.events()] == [f"key {name}" for name in compiled]


@pytest.mark.parametrize("shapes", [held(1, ready={BUCKETS[0]: "made"}), held(9, None, ready={BUCKETS[0]: "made"})])
def test_a_shape_too_many_is_refused_with_all_that_its_class_demands(shapes: Specializations) -> None:
    assert shapes.get(BUCKETS[0]) == "made"
    with pytest.raises(InputRefused, match="b2_t1_s64") as caught:
        shapes.get(BUCKETS[1])
    error = caught.value
    assert error.failure_class is FailureClass.SHAPE_GUARD
    assert set(rule_of(error.failure_class).evidence) <= set(error.evidence)
    assert error.evidence["cache_key"] == "key b2_t1_s64"
    assert "b1_t1_s64" in error.evidence["guard"]
    assert shapes.events() == ()


@pytest.mark.parametrize("concurrency", [1, 2])
def test_threads_share_one_compile_a_shape_and_the_compiler_is_never_overrun(concurrency: int) -> None:
    lock, running, most, made = threading.Lock(), 0, 0, []

    def compile_bucket(bucket: Bucket) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
            made.append(bucket)
        return bucket.name

    shapes = held(8, compile_bucket, concurrency=concurrency)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda bucket=bucket: found.append(shapes.get(bucket)))
        for bucket in BUCKETS[:4]
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(found) == sorted(bucket.name for bucket in BUCKETS[:4] for _ in range(4))
    assert sorted(made) == sorted(BUCKETS[:4])
    assert most == concurrency


def test_a_failed_compile_is_tried_again_by_the_next_call() -> None:
    answers = iter([RuntimeError("codegen exploded"), "made"])

    def compile_bucket(_: Bucket) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    shapes = held(1, compile_bucket)
    with pytest.raises(RuntimeError, match="exploded"):
        shapes.get(BUCKETS[0])
    assert (shapes.get(BUCKETS[0]), len(shapes.events())) == ("made", 1)

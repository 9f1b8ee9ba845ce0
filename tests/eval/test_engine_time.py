"""Time inside the engine: parts that are the whole, or a refusal; what was not measured is not counted as zero."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.engine_time import OWNERS, EngineTime, add_up, engine_time
from runtime.engine.generation import EngineLatency

parts = st.fixed_dictionaries({name: st.integers(0, 10_000) for name in OWNERS})


@given(parts)
def test_the_parts_are_the_whole(recorded: dict[str, int]) -> None:
    found = engine_time(recorded, total_us=sum(recorded.values()))
    assert found is not None and found.total_us == sum(recorded.values())
    shares = found.shares()
    assert (shares is None) == (found.total_us == 0)
    assert shares is None or sum(shares.values()) == pytest.approx(1)


def test_what_was_not_measured_is_not_zero() -> None:
    assert engine_time(None) is None
    one = engine_time(dict.fromkeys(OWNERS, 2))
    assert add_up([one, None, one]) == (EngineTime(**dict.fromkeys(OWNERS, 4)), 1)
    assert add_up([None]) == (None, 1)
    assert add_up([]) == (None, 0)


@pytest.mark.parametrize(
    ("changes", "total_us", "said"),
    [
        ({"queue_us": -1}, None, "negative"),
        ({"idle_us": 1}, None, "owners of engine time"),
        ({}, 8, "the parts are 7 us"),
    ],
)
def test_a_wrong_account_is_refused(changes: dict[str, int], total_us: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine_time(dict.fromkeys(OWNERS, 1) | changes, total_us=total_us)


def test_the_engine_and_the_judge_name_the_same_owners() -> None:
    assert EngineLatency.__struct_fields__ == OWNERS

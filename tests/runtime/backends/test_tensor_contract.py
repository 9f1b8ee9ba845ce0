"""Inputs of one-shot models are checked by names, dtype, rank, bounds, relations and index ranges, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.backends.contract import Bounds
from runtime.backends.errors import BackendRefused, InputRefused
from runtime.backends.one_shot import fixture_cases, fixture_inputs, typical_sizes
from runtime.backends.tensor_contract import TensorContract, TensorRule, bounded
from traces.failures import FailureClass

CONTRACT = TensorContract(
    inputs=(
        TensorRule(name="ids", dtype="int64", shape=("B", "T"), index_range=(0, 9)),
        TensorRule(name="mask", dtype="int64", shape=("B", "T")),
        TensorRule(name="pairs", dtype="float32", shape=("B", "2*T+1", "4")),
    ),
    outputs=(TensorRule(name="vector", dtype="float32", shape=("B", "4")),),
    symbols={"B": (1, 8), "T": (2, 6)},
)


def good(batch: int = 2, length: int = 3) -> dict[str, Any]:
    return fixture_inputs(CONTRACT, {"B": batch, "T": length}, label="good")


def test_sizes_of_symbols_are_learned_and_the_batch_is_the_leading_one() -> None:
    assert CONTRACT.check(good()) == {"B": 2, "T": 3}
    assert CONTRACT.batch == "B"
    assert TensorContract.from_document(CONTRACT.document()) == CONTRACT


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"ids": None}, "names"),
        ({"other": np.zeros(1)}, "names"),
        ({"ids": np.zeros((2, 3), dtype=np.int32)}, "dtype"),
        ({"ids": np.zeros(3, dtype=np.int64)}, "rank"),
        ({"ids": np.full((2, 3), 10, dtype=np.int64)}, "index range"),
        ({"ids": np.full((2, 3), -1, dtype=np.int64)}, "index range"),
        ({"mask": np.ones((2, 4), dtype=np.int64)}, "dimension 1"),
        ({"pairs": np.zeros((2, 6, 4), dtype=np.float32)}, "dimension 1"),
        ({"pairs": np.zeros((2, 7, 5), dtype=np.float32)}, "dimension 2"),
        ({"pairs": np.zeros((3, 7, 4), dtype=np.float32)}, "dimension 0"),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, Any], rule: str) -> None:
    inputs = {**good(), **change}
    with pytest.raises(InputRefused) as caught:
        CONTRACT.check({name: value for name, value in inputs.items() if value is not None})
    assert caught.value.evidence["rule"] == rule
    assert caught.value.failure_class is FailureClass.SHAPE_GUARD


@pytest.mark.parametrize(("batch", "length", "symbol"), [(9, 3, "B"), (1, 7, "T"), (1, 1, "T")])
def test_a_size_outside_its_bounds_is_refused(batch: int, length: int, symbol: str) -> None:
    with pytest.raises(InputRefused, match=f"bound of {symbol}"):
        CONTRACT.check(good(batch, length))


def test_open_ranges_are_closed_and_a_bound_below_the_least_size_is_refused() -> None:
    bounds = Bounds(max_batch=4, max_tokens=16)
    assert bounded(CONTRACT.inputs, {"T": (0, None)}, bounds) == {"B": (1, 4), "T": (1, 16)}
    with pytest.raises(BackendRefused, match="below the smallest"):
        bounded(CONTRACT.inputs, {"B": (5, None)}, bounds)


@given(st.integers(1, 8), st.integers(2, 6), st.sampled_from(["a", "b"]))
def test_fixture_inputs_satisfy_the_contract_and_repeat(batch: int, length: int, label: str) -> None:
    sizes = {"B": batch, "T": length}
    made = fixture_inputs(CONTRACT, sizes, label=label)
    assert CONTRACT.check(made) == sizes
    again = fixture_inputs(CONTRACT, sizes, label=label)
    assert all(np.array_equal(made[name], again[name]) for name in made)


def test_fixture_cases_cover_one_row_and_many() -> None:
    batches = [case.inputs["ids"].shape[0] for case in fixture_cases(CONTRACT)]
    assert batches == [1, 3, 8]
    assert typical_sizes(CONTRACT) == {"B": 3, "T": 6}

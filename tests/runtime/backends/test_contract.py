"""Every input that breaks the contract is refused by name and rule before a backend sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.backends.contract import Bounds, InputContract
from runtime.backends.errors import InputRefused
from traces.failures import FailureClass

CONTRACT = InputContract(
    bounds=Bounds(max_batch=4, max_tokens=8, max_context=16), vocab_size=50, max_positions=64, num_layers=2, kv_width=8
)
SLOTS = 32


def inputs(**changes: Any) -> dict[str, Any]:
    """Good inputs of batch 2, 3 tokens and 5 context slots, with some of them replaced."""
    good: dict[str, Any] = {
        "token_ids": np.zeros((2, 3), dtype=np.int64),
        "positions": np.zeros((2, 3), dtype=np.int64),
        "slots": np.zeros((2, 5), dtype=np.int64),
        "context_lengths": np.zeros(2, dtype=np.int64),
    }
    return {**good, **changes}


def ones(*shape: int, value: int = 0, dtype: Any = np.int64) -> Any:
    return np.full(shape, value, dtype=dtype)


BROKEN = {
    "dtype": ("token_ids", inputs(token_ids=ones(2, 3, dtype=np.int32))),
    "dtype of floats": ("positions", inputs(positions=ones(2, 3, dtype=np.float32))),
    "not an array": ("slots", inputs(slots=[[0]])),
    "rank": ("token_ids", inputs(token_ids=ones(6))),
    "rank of lengths": ("context_lengths", inputs(context_lengths=ones(2, 1))),
    "batch above its bound": ("token_ids", inputs(token_ids=ones(5, 3), positions=ones(5, 3))),
    "batch of nothing": ("token_ids", inputs(token_ids=ones(0, 3), positions=ones(0, 3))),
    "tokens above their bound": ("token_ids", inputs(token_ids=ones(2, 9), positions=ones(2, 9))),
    "context above its bound": ("slots", inputs(slots=ones(2, 17))),
    "context of nothing": ("slots", inputs(slots=ones(2, 0))),
    "positions of another shape": ("positions", inputs(positions=ones(2, 4))),
    "slots of another batch": ("slots", inputs(slots=ones(3, 5))),
    "lengths of another batch": ("context_lengths", inputs(context_lengths=ones(3))),
    "token outside the vocabulary": ("token_ids", inputs(token_ids=ones(2, 3, value=50))),
    "negative token": ("token_ids", inputs(token_ids=ones(2, 3, value=-1))),
    "position outside the model": ("positions", inputs(positions=ones(2, 3, value=64))),
    "slot outside the pool": ("slots", inputs(slots=ones(2, 5, value=SLOTS))),
    "negative slot": ("slots", inputs(slots=ones(2, 5, value=-1))),
    "length beyond the gathered slots": ("context_lengths", inputs(context_lengths=ones(2, value=6))),
    "negative length": ("context_lengths", inputs(context_lengths=ones(2, value=-1))),
}


def test_good_inputs_pass_at_both_ends_of_every_range() -> None:
    CONTRACT.check(**inputs(), num_slots=SLOTS)
    CONTRACT.check(
        token_ids=ones(4, 8, value=49),
        positions=ones(4, 8, value=63),
        slots=ones(4, 16, value=SLOTS - 1),
        context_lengths=ones(4, value=16),
        num_slots=SLOTS,
    )


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_a_shape_guard_failure_that_names_the_input(case: str) -> None:
    name, given = BROKEN[case]
    with pytest.raises(InputRefused) as caught:
        CONTRACT.check(**given, num_slots=SLOTS)
    assert caught.value.failure_class is FailureClass.SHAPE_GUARD
    assert caught.value.evidence["input"] == name
    assert caught.value.evidence["guard"]
    assert caught.value.evidence["input_signature"]


def test_the_document_reads_back_as_the_same_contract() -> None:
    assert InputContract.from_document(CONTRACT.document()) == CONTRACT

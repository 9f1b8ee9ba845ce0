"""A pool holds what was written where it was written, on every kind of table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from runtime.backends.errors import InputRefused
from runtime.backends.onnxruntime import OrtPool
from runtime.backends.pool import ArrayPool, TorchPool

LAYERS, SLOTS, WIDTH = 3, 10, 4


def make_pool(kind: str) -> Any:
    if kind == "torch":
        return TorchPool(num_layers=LAYERS, num_slots=SLOTS, width=WIDTH, dtype=torch.float32)
    if kind == "bfloat16":
        return TorchPool(num_layers=LAYERS, num_slots=SLOTS, width=WIDTH, dtype=torch.bfloat16)
    return {"array": ArrayPool, "onnxruntime": OrtPool}[kind](num_layers=LAYERS, num_slots=SLOTS, width=WIDTH)


def step_output(kind: str) -> tuple[Any, Any, np.ndarray[Any, Any]]:
    values = np.arange(LAYERS * 2 * 3 * WIDTH, dtype=np.float32).reshape(LAYERS, 2, 3, WIDTH)
    if kind in ("torch", "bfloat16"):
        tensor = torch.from_numpy(values).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
        return tensor, -tensor, values
    return values, -values, values


def indices(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize("kind", ["torch", "bfloat16", "array", "onnxruntime"])
def test_selected_tokens_land_in_their_slots_of_every_layer(kind: str) -> None:
    pool = make_pool(kind)
    new_k, new_v, values = step_output(kind)
    slots, rows, columns = indices(7, 2, 9), indices(1, 0, 1), indices(2, 0, 0)
    pool.write(slots, new_k, new_v, rows=rows, columns=columns)
    k, v = pool.read(slots)
    np.testing.assert_array_equal(k, values[:, rows, columns])
    np.testing.assert_array_equal(v, -values[:, rows, columns])
    untouched, _ = pool.read(indices(0, 1, 3, 4, 5, 6, 8))
    assert not untouched.any()


@pytest.mark.parametrize("kind", ["torch", "array"])
@pytest.mark.parametrize(
    ("slots", "rows", "columns"),
    [((10,), (0,), (0,)), ((-1,), (0,), (0,)), ((0,), (2,), (0,)), ((0,), (0,), (3,)), ((0, 1), (0,), (0,))],
)
def test_a_write_outside_pool_or_output_is_refused(
    kind: str, slots: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    pool = make_pool(kind)
    new_k, new_v, _ = step_output(kind)
    with pytest.raises(InputRefused):
        pool.write(indices(*slots), new_k, new_v, rows=indices(*rows), columns=indices(*columns))
    assert not pool.read(indices(*range(SLOTS)))[0].any()


def test_writing_nothing_changes_nothing() -> None:
    pool = make_pool("torch")
    new_k, new_v, _ = step_output("torch")
    pool.write(indices(), new_k, new_v, rows=indices(), columns=indices())
    assert not pool.read(indices(*range(SLOTS)))[0].any()


def test_a_pool_says_its_bytes() -> None:
    assert make_pool("torch").nbytes == 2 * LAYERS * SLOTS * WIDTH * 4
    assert make_pool("bfloat16").nbytes == make_pool("array").nbytes // 2


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(InputRefused):
        TorchPool(num_layers=1, num_slots=0, width=4, dtype=torch.float32)

"""How do requests become the rows of one call, and how is one of them computed again without the others?

The bits of a row depend on the padded shape of its call and on its place in it.  So a replay puts the request's own
rows at their recorded place and stand-ins, which no other request's data is in, everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.one_shot import OneShotExecutor, fixture_inputs
from runtime.backends.tensor_contract import Arrays, TensorContract

STAND_IN = "stand-in"


def of_request(contract: TensorContract) -> TensorContract:
    """Give the contract of one request: it may have fewer rows than the smallest call, which is padded."""
    if contract.batch is None:
        return contract
    high = contract.symbols[contract.batch][1]
    return replace(contract, symbols={**contract.symbols, contract.batch: (1, high)})


def rows_of(contract: TensorContract, sizes: Mapping[str, int]) -> int:
    """Count a request's rows; a model without a batch dimension takes one request a call."""
    return 1 if contract.batch is None else sizes[contract.batch]


def shape_of(contract: TensorContract, sizes: Mapping[str, int]) -> str:
    """Name every size but the batch: only requests of one name can share a call."""
    return ",".join(f"{name}={size}" for name, size in sorted(sizes.items()) if name != contract.batch)


def sizes_of(shape: str) -> dict[str, int]:
    """Read what `shape_of` wrote."""
    return {name: int(size) for name, size in (part.split("=") for part in shape.split(",") if part)}


def padded_rows(contract: TensorContract, rows: int) -> int:
    """Give the rows of the call: a program may take no fewer than its smallest batch."""
    return rows if contract.batch is None else max(rows, contract.symbols[contract.batch][0])


def most_rows(contract: TensorContract) -> int:
    """Give the most rows of one call."""
    return 1 if contract.batch is None else contract.symbols[contract.batch][1]


def place(
    contract: TensorContract, requests: Sequence[tuple[int, Arrays]], *, padded: int, shape: str
) -> dict[str, NDArray[Any]]:
    """Build a call's inputs: each request's rows from its first row on, stand-ins in every row that is left."""
    if contract.batch is None:
        return dict(requests[0][1])
    filled = fixture_inputs(contract, {**sizes_of(shape), contract.batch: padded}, label=STAND_IN)
    for offset, inputs in requests:
        for name, value in inputs.items():
            filled[name][offset : offset + value.shape[0]] = value
    return filled


def cut(contract: TensorContract, outputs: Arrays, *, offset: int, rows: int) -> dict[str, NDArray[Any]]:
    """Take one request's rows out of a call's outputs."""
    if contract.batch is None:
        return dict(outputs)
    return {name: np.ascontiguousarray(value[offset : offset + rows]) for name, value in outputs.items()}


def run_again(
    executor: OneShotExecutor, inputs: Arrays, *, offset: int, padded: int, shape: str
) -> dict[str, NDArray[Any]]:
    """Compute one recorded request in the shape and at the place that it had, among stand-ins."""
    contract = executor.contract
    rows = rows_of(contract, of_request(contract).check(inputs))
    call = place(contract, [(offset, inputs)], padded=padded, shape=shape)
    return cut(contract, executor.run(call), offset=offset, rows=rows)

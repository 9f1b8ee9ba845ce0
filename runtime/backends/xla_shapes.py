"""In which fixed shapes does a one-shot model run in XLA?  A few batch sizes, padded up to; every other size exactly.

Rows of a batch answer for themselves, so a call may be padded with rows.  Nothing says that of another dimension: a
longer sequence is another question.  Where one is free, its sizes are compiled at first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.backends.errors import BackendRefused
from runtime.backends.one_shot import typical_sizes
from runtime.backends.tensor_contract import TensorContract

BATCHES = (1, 8)
"""Batch sizes below the bound that are compiled where none are declared."""


@dataclass(frozen=True, order=True)
class FixedShape:
    """A size for every symbol of a program."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Name the shape, for files and records."""
        return "_".join(f"{symbol}{size}" for symbol, size in self.sizes) or "fixed"

    def values(self) -> dict[str, int]:
        """Give the size of each symbol."""
        return dict(self.sizes)


def shape_of_call(contract: TensorContract, sizes: Mapping[str, int], batches: Sequence[int]) -> FixedShape:
    """Give the shape in which a call of these sizes runs: the smallest batch that holds it, all else as it is."""
    found = dict(sizes)
    if contract.batch is not None:
        rows = sizes[contract.batch]
        found[contract.batch] = next(batch for batch in batches if batch >= rows)
    return FixedShape(tuple(sorted(found.items())))


def batch_plan(contract: TensorContract, declared: Sequence[int] | None) -> tuple[int, ...]:
    """Choose the batch sizes to compile: the declared ones within the bounds, or few that reach them."""
    if contract.batch is None:
        return ()
    low, high = contract.symbols[contract.batch]
    wanted = declared if declared is not None else BATCHES
    return (*sorted({max(low, size) for size in wanted if size < high} - {high}), high)


def free_symbols(contract: TensorContract) -> tuple[str, ...]:
    """Name the symbols beside the batch that may take more than one size."""
    return tuple(
        name for name, (low, high) in sorted(contract.symbols.items()) if name != contract.batch and low < high
    )


def shapes_ahead(contract: TensorContract, batches: Sequence[int]) -> tuple[FixedShape, ...]:
    """List every shape of a program whose batch alone may vary; BackendRefused where more may."""
    free = free_symbols(contract)
    if free:
        raise BackendRefused(
            f"XLA compiles exact shapes, and {', '.join(free)} may take many sizes: they cannot all be compiled ahead",
            fix="prepare with specialization=lazy, or export the model with these dimensions fixed",
            evidence={"validation_output": ", ".join(free), "operator_details": "specialization=ahead"},
        )
    return typical_shapes(contract, batches)


def typical_shapes(contract: TensorContract, batches: Sequence[int]) -> tuple[FixedShape, ...]:
    """List the shapes of each batch size, every other symbol at its usual size."""
    sizes = typical_sizes(contract)
    chosen = [{**sizes, contract.batch: batch} for batch in batches] if contract.batch is not None else [sizes]
    return tuple(FixedShape(tuple(sorted(found.items()))) for found in chosen)

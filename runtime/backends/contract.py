"""Which inputs may reach a backend?  Dtype, rank, bounds, relations and index ranges, checked before any call.

No backend enforces the whole contract: the same out-of-range index raises in one, aborts the process in another and is
answered with foreign memory in a third, and the bounds declared at export vanish from most formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.errors import InputRefused
from runtime.models.config import ModelConfig

Integers = NDArray[np.int64]
StepInputs = tuple[Integers, Integers, Integers, Integers]
"""Token ids, positions, slots and context lengths, as `Executor.step` takes them."""
_INT64 = np.dtype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Largest sizes of the three dynamic dimensions; the smallest size of each is 1."""

    max_batch: int = 64
    """B, rows of one call."""
    max_tokens: int = 512
    """T, new tokens of each row."""
    max_context: int = 1024
    """S, pool slots gathered for each row."""

    def symbols(self) -> dict[str, list[int]]:
        """Give the inclusive range of each symbol, as recorded in packages."""
        return {"B": [1, self.max_batch], "T": [1, self.max_tokens], "S": [1, self.max_context]}


@dataclass(frozen=True, kw_only=True)
class InputContract:
    """Everything that must hold of a step's inputs, from the package's manifest and never from the backend."""

    bounds: Bounds
    vocab_size: int
    max_positions: int
    num_layers: int
    kv_width: int

    @classmethod
    def of(cls, config: ModelConfig, bounds: Bounds) -> InputContract:
        """Derive the contract of a decoder."""
        return cls(
            bounds=bounds,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            num_layers=config.num_layers,
            kv_width=config.kv_width,
        )

    def document(self) -> dict[str, Any]:
        """Describe the contract for a manifest: integers and strings only."""
        flat = asdict(self)
        flat.pop("bounds")
        return {
            "symbols": self.bounds.symbols(),
            **flat,
            "inputs": {
                "token_ids": {"dtype": "int64", "shape": ["B", "T"], "range": [0, self.vocab_size - 1]},
                "positions": {"dtype": "int64", "shape": ["B", "T"], "range": [0, self.max_positions - 1]},
                "k_pool": {"dtype": "precision", "shape": [f"{self.num_layers}*P", str(self.kv_width)]},
                "v_pool": {"dtype": "precision", "shape": [f"{self.num_layers}*P", str(self.kv_width)]},
                "slots": {"dtype": "int64", "shape": ["B", "S"], "range": [0, "P-1"]},
                "context_lengths": {"dtype": "int64", "shape": ["B"], "range": [0, "S"]},
            },
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> InputContract:
        """Read what `document` wrote."""
        symbols = document["symbols"]
        return cls(
            bounds=Bounds(max_batch=symbols["B"][1], max_tokens=symbols["T"][1], max_context=symbols["S"][1]),
            vocab_size=document["vocab_size"],
            max_positions=document["max_positions"],
            num_layers=document["num_layers"],
            kv_width=document["kv_width"],
        )

    def check(
        self,
        token_ids: Integers,
        positions: Integers,
        slots: Integers,
        context_lengths: Integers,
        *,
        num_slots: int,
        last: Integers | None = None,
    ) -> None:
        """Refuse inputs that break the contract with `InputRefused`, naming input, rule, expected and actual."""
        _check_array("token_ids", token_ids, 2)
        _check_array("positions", positions, 2)
        _check_array("slots", slots, 2)
        _check_array("context_lengths", context_lengths, 1)
        batch, tokens = token_ids.shape
        context = slots.shape[1]
        _check_size("B", "token_ids", batch, self.bounds.max_batch)
        _check_size("T", "token_ids", tokens, self.bounds.max_tokens)
        _check_size("S", "slots", context, self.bounds.max_context)
        _check_relation("positions", positions.shape, (batch, tokens))
        _check_relation("slots", slots.shape, (batch, context))
        _check_relation("context_lengths", context_lengths.shape, (batch,))
        _check_range("token_ids", token_ids, self.vocab_size - 1)
        _check_range("positions", positions, self.max_positions - 1)
        _check_range("slots", slots, num_slots - 1)
        _check_range("context_lengths", context_lengths, context)
        if last is not None:
            _check_array("last", last, 1)
            _check_relation("last", last.shape, (batch,))
            _check_range("last", last, tokens - 1)


def refuse(name: str, rule: str, expected: object, actual: object) -> InputRefused:
    """Make the error of a broken rule; decoders and one-shot models give the same one."""
    return InputRefused(
        f"step input {name}: {rule} is {actual}, expected {expected}",
        fix="keep calls inside the package's contract (`replaylab packages show DIGEST`)",
        evidence={
            "input_signature": f"{name}: {rule} {actual}",
            "guard": f"{name}: {rule} {expected}",
            "input": name,
            "rule": rule,
            "expected": str(expected),
            "actual": str(actual),
        },
    )


def _check_array(name: str, value: Integers, rank: int) -> None:
    kind = getattr(value, "dtype", None)
    if kind != _INT64:
        raise refuse(name, "dtype", "int64", kind if kind is not None else type(value).__name__)
    if value.ndim != rank:
        raise refuse(name, "rank", rank, value.ndim)


def _check_size(symbol: str, name: str, size: int, most: int) -> None:
    if not 1 <= size <= most:
        raise refuse(name, f"bound of {symbol}", f"1..{most}", size)


def _check_relation(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise refuse(name, "relation of dimensions", expected, shape)


def _check_range(name: str, value: Integers, most: int) -> None:
    # As unsigned numbers, negative indices are huge: one reduction checks both ends.
    if int(value.view(np.uint64).max()) > most:
        raise refuse(name, "index range", f"0..{most}", f"{int(value.min())}..{int(value.max())}")

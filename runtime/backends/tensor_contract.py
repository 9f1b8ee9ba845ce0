"""Which tensors may reach a one-shot model?  Names, dtype, rank, bounds, relations and index ranges, before any call.

The counterpart of `contract.py` for programs whose inputs are not a decoder's.  One symbol may stand in several places:
that is a relation, and both places must have the same size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.contract import Bounds, refuse
from runtime.backends.errors import BackendRefused

Arrays = Mapping[str, NDArray[Any]]
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""What NumPy can hold; bfloat16 inputs and outputs are refused when a program is captured."""
DERIVED = re.compile(r"^(?:(\d+)\*)?([A-Za-z_]\w*)(?: ?\+ ?(\d+))?$")
"""The forms of a dimension that depends on a symbol: `s`, `2*s`, `s + 1`, `2*s + 1`."""


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """What holds of one tensor."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    """A number, a symbol, or a multiple of a symbol plus a number."""
    index_range: tuple[int, int] | None = None
    """Inclusive, for integers that select rows of a table; None where the graph tells no range."""

    def document(self) -> dict[str, Any]:
        """Describe the rule for a manifest."""
        written: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        return written if self.index_range is None else {**written, "range": list(self.index_range)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> TensorRule:
        """Read what `document` wrote."""
        found = document.get("range")
        return cls(
            name=document["name"],
            dtype=document["dtype"],
            shape=tuple(document["shape"]),
            index_range=(found[0], found[1]) if found else None,
        )


@dataclass(frozen=True, kw_only=True)
class TensorContract:
    """Everything that must hold of a one-shot call's inputs, from the package's manifest and never from the backend."""

    inputs: tuple[TensorRule, ...]
    outputs: tuple[TensorRule, ...]
    symbols: Mapping[str, tuple[int, int]]
    """Inclusive range of each symbol of the inputs."""

    @property
    def batch(self) -> str | None:
        """The symbol that leads every input and every output: requests can share a call along it.  None without one."""
        leading = {rule.shape[0] if rule.shape else "" for rule in (*self.inputs, *self.outputs)}
        only = leading.pop() if len(leading) == 1 else ""
        return only if only in self.symbols else None

    def document(self) -> dict[str, Any]:
        """Describe the contract for a manifest: integers and strings only."""
        return {
            "kind": "one_shot",
            "batch": self.batch,
            "symbols": {name: list(found) for name, found in sorted(self.symbols.items())},
            "inputs": [rule.document() for rule in self.inputs],
            "outputs": [rule.document() for rule in self.outputs],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> TensorContract:
        """Read what `document` wrote."""
        return cls(
            inputs=tuple(TensorRule.from_document(entry) for entry in document["inputs"]),
            outputs=tuple(TensorRule.from_document(entry) for entry in document["outputs"]),
            symbols={name: (found[0], found[1]) for name, found in document["symbols"].items()},
        )

    def check(self, inputs: Arrays) -> dict[str, int]:
        """Refuse inputs that break the contract with `InputRefused`; returns the size of each symbol."""
        wanted = [rule.name for rule in self.inputs]
        if set(inputs) != set(wanted):
            raise refuse("set", "names", ", ".join(wanted), ", ".join(sorted(inputs)) or "none")
        sizes: dict[str, int] = {}
        for rule in self.inputs:
            self._check_tensor(rule, inputs[rule.name], sizes)
        for symbol, size in sizes.items():
            low, high = self.symbols[symbol]
            if not low <= size <= high:
                raise refuse(self._first(symbol), f"bound of {symbol}", f"{low}..{high}", size)
        return sizes

    def shape(self, rule: TensorRule, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """Give a tensor's shape at the sizes of the symbols; None where it depends on values."""
        found = [_size(entry, sizes) for entry in rule.shape]
        return None if None in found else tuple(entry for entry in found if entry is not None)

    def _check_tensor(self, rule: TensorRule, value: NDArray[Any], sizes: dict[str, int]) -> None:
        kind = getattr(value, "dtype", None)
        if str(kind) != rule.dtype:
            raise refuse(rule.name, "dtype", rule.dtype, kind if kind is not None else type(value).__name__)
        if value.ndim != len(rule.shape):
            raise refuse(rule.name, "rank", len(rule.shape), value.ndim)
        for axis, entry in enumerate(rule.shape):
            _bind(rule.name, entry, value.shape[axis], axis, sizes)
        if rule.index_range is not None and value.size:
            low, high = rule.index_range
            least, most = int(value.min()), int(value.max())
            if least < low or most > high:
                raise refuse(rule.name, "index range", f"{low}..{high}", f"{least}..{most}")

    def _first(self, symbol: str) -> str:
        return next(rule.name for rule in self.inputs if any(_symbol(entry) == symbol for entry in rule.shape))


def bounded(
    rules: Iterable[TensorRule], ranges: Mapping[str, tuple[int, int | None]], bounds: Bounds
) -> dict[str, Any]:
    """Close the ranges of symbols: at least 1, at most the package's own bound.

    A symbol that leads an input takes `max_batch`, every other one `max_tokens`: a runtime must not accept sizes
    without end, and most files declare none.
    """
    leading: set[str] = set()
    others: set[str] = set()
    for rule in rules:
        for axis, entry in enumerate(rule.shape):
            symbol = _symbol(entry)
            if symbol is not None:
                (others if axis else leading).add(symbol)
    closed: dict[str, tuple[int, int]] = {}
    for symbol in sorted(leading | others):
        low, high = ranges.get(symbol, (1, None))
        most = bounds.max_batch if symbol in leading else bounds.max_tokens
        closed[symbol] = (max(1, low), most if high is None else min(high, most))
        if closed[symbol][0] > closed[symbol][1]:
            raise BackendRefused(
                f"the bound {most} of {symbol} is below the smallest size {low} that the program takes",
                fix="raise --max-batch or --max-tokens",
                evidence={"validation_output": f"{symbol}: {low}..{high}, bound {most}"},
                stage="a01",
            )
    return closed


def _symbol(entry: str) -> str | None:
    match = None if entry.isdigit() else DERIVED.match(entry)
    return match.group(2) if match else (None if entry.isdigit() else entry)


def _size(entry: str, sizes: Mapping[str, int]) -> int | None:
    if entry.isdigit():
        return int(entry)
    match = DERIVED.match(entry)
    if match is None:
        return sizes.get(entry)
    known = sizes.get(match.group(2))
    return None if known is None else int(match.group(1) or 1) * known + int(match.group(3) or 0)


def _bind(name: str, entry: str, size: int, axis: int, sizes: dict[str, int]) -> None:
    """Hold one dimension to its rule, learning the symbol's size where it appears first."""
    expected = _size(entry, sizes)
    if expected is None:
        match = DERIVED.match(entry)
        times, plus = (int(match.group(1) or 1), int(match.group(3) or 0)) if match else (1, 0)
        if size < plus or (size - plus) % times:
            raise refuse(name, f"dimension {axis}", entry, size)
        sizes[match.group(2) if match else entry] = (size - plus) // times
    elif expected != size:
        raise refuse(name, f"dimension {axis}", f"{entry} = {expected}", size)


def narrowest(values: NDArray[Any]) -> NDArray[Any]:
    """Give an array that every backend can read in place: contiguous and writable."""
    return values if values.flags.c_contiguous and values.flags.writeable else np.array(values, order="C")

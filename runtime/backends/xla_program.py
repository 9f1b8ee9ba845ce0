"""What is a portable XLA program, and what does its module say?

One StableHLO artefact with symbolic sizes (`jax.export`), weights as arguments.  Its bounds stand in the module as
shape assertions, which XLA checks when it compiles a shape; the document beside it names the order of the arguments.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

DOCUMENT = "replaylab.xla-program/1"
TYPE = re.compile(r"(?:x|tensor<)(f64|f32|f16|bf16|i64|i32|i16|i8|i1|ui64|ui32|ui8)>")
OPERATION = re.compile(r"\b(stablehlo\.\w+|call) ")
BOUND = re.compile(r"symbolic shape constraint (\w+) (>=|<=) (\d+)\.")


@dataclass(frozen=True)
class Argument:
    """One input: its element type and its sizes, each a factor times a symbol, or a factor alone."""

    name: str
    dtype: str
    sizes: tuple[tuple[int, str | None], ...]

    def shape(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """Give the shape under values of the symbols."""
        return tuple(factor * (values[symbol] if symbol else 1) for factor, symbol in self.sizes)

    def text(self) -> list[str]:
        """Write the sizes as `jax.export` reads them."""
        return [
            str(factor) if not symbol else symbol if factor == 1 else f"{factor}*{symbol}"
            for factor, symbol in self.sizes
        ]


@dataclass(frozen=True, kw_only=True)
class PortableProgram:
    """StableHLO with symbolic sizes, and what a caller must know to feed it."""

    blob: bytes
    """What `jax.export` serialized: a flatbuffer, no pickle."""
    held: tuple[str, ...]
    """Names of the stored tensors that are the leading arguments, in order."""
    inputs: tuple[Argument, ...]
    """The arguments that follow."""
    symbols: Mapping[str, tuple[int, int]]
    """Inclusive range of each symbol."""

    def document(self) -> dict[str, Any]:
        """Describe everything but the blob."""
        return {
            "document": DOCUMENT,
            "held": list(self.held),
            "inputs": [asdict(entry) for entry in self.inputs],
            "symbols": {name: list(interval) for name, interval in sorted(self.symbols.items())},
        }

    @classmethod
    def read(cls, blob: bytes, text: str) -> PortableProgram:
        """Read what `document` wrote, as JSON text."""
        raw = json.loads(text)
        inputs = [
            Argument(entry["name"], entry["dtype"], tuple((factor, symbol) for factor, symbol in entry["sizes"]))
            for entry in raw["inputs"]
        ]
        symbols = {name: (low, high) for name, (low, high) in raw["symbols"].items()}
        return cls(blob=blob, held=tuple(raw["held"]), inputs=tuple(inputs), symbols=symbols)

    def shapes(self, values: Mapping[str, int]) -> list[Any]:
        """Give shape and type of every input under values of the symbols."""
        return [shape_of(entry.shape(values), entry.dtype) for entry in self.inputs]


@dataclass(frozen=True)
class ModuleReport:
    """What a StableHLO module holds."""

    operations: dict[str, int]
    types: dict[str, int]
    """How many results have each element type."""
    bounds: dict[str, list[int]]
    """Range of each symbol as the module asserts it."""
    calling_convention: int
    platforms: tuple[str, ...]
    size: int


def read_module(blob: bytes) -> ModuleReport:
    """Parse a portable program and count what it holds; the parser verifies the module."""
    read = jax.export.deserialize(bytearray(blob))
    text = read.mlir_module()
    found: dict[str, dict[str, int]] = {}
    for name, sign, bound in BOUND.findall(text):
        found.setdefault(name, {})[sign] = int(bound)
    return ModuleReport(
        operations=dict(sorted(Counter(OPERATION.findall(text)).items())),
        types=dict(sorted(Counter(TYPE.findall(text)).items())),
        bounds={name: [limits[">="], limits["<="]] for name, limits in sorted(found.items()) if len(limits) == 2},
        calling_convention=int(read.calling_convention_version),
        platforms=tuple(read.platforms),
        size=len(read.mlir_module_serialized),
    )


def dialect() -> dict[str, str]:
    """Name the StableHLO version and the oldest one that this library still reads."""
    from jaxlib.mlir.dialects import stablehlo

    return {
        "stablehlo": str(stablehlo.get_current_version()),
        "oldest_readable": str(stablehlo.get_minimum_version()),
        "calling_conventions": f"{jax.export.minimum_supported_calling_convention_version}"
        f"..{jax.export.maximum_supported_calling_convention_version}",
    }


def shape_of(sizes: tuple[Any, ...], dtype: str) -> Any:
    """Describe an array without its values; `dtype` in torch's words."""
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

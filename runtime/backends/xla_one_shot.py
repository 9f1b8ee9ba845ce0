"""How does a one-shot model run in XLA?  An executable a shape; a batch is padded with rows and cut back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends.one_shot import OneShotSpec
from runtime.backends.one_shot_executor import LoadedOneShot
from runtime.backends.protocol import CompileEvent
from runtime.backends.xla import AHEAD, LAZY, XlaProgram, load_program
from runtime.backends.xla_shapes import FixedShape, batch_plan, shape_of_call, shapes_ahead

BATCHES_FLAG = "batches"
"""The compiler manifest's flag that lists the batch sizes."""


class XlaOneShot(LoadedOneShot[XlaProgram]):
    """Compiled shapes of one program."""

    backend = "xla"
    failures: ClassVar[tuple[type[Exception], ...]] = (RuntimeError, ValueError)

    def __init__(self, loaded: XlaProgram, spec: OneShotSpec, batches: Sequence[int]) -> None:
        super().__init__(loaded, spec)
        self._batches = tuple(batches)

    def call(self, loaded: XlaProgram, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the smallest compiled batch that holds the call, its last row repeated in the place of missing ones."""
        contract = self.contract
        sizes = contract.check({rule.name: array for rule, array in zip(contract.inputs, arrays, strict=True)})
        shape = shape_of_call(contract, sizes, self._batches)
        if contract.batch is None:
            return loaded.call(shape, arrays)
        rows, padded = sizes[contract.batch], shape.values()[contract.batch]
        outputs = loaded.call(shape, [_padded(array, padded - rows) for array in arrays])
        return [np.ascontiguousarray(value[:rows]) for value in outputs]

    def compile_events(self) -> tuple[CompileEvent, ...]:
        """Give every shape compiled since the load."""
        return self.loaded.specializations.events()

    def compiles_lazily(self) -> bool:
        """Say whether shapes are compiled at first use."""
        return self._spec.flags.get("specialization", AHEAD) == LAZY


def load_xla_one_shot(package: Path, spec: OneShotSpec) -> XlaOneShot:
    """Load a verified package folder: weights, and either all executables or the program to compile them from."""
    text = spec.flags.get(BATCHES_FLAG, "")
    batches = batch_plan(spec.contract, [int(size) for size in text.split(",")] if text else None)
    lazily = spec.flags.get("specialization", AHEAD) == LAZY
    ahead: Sequence[FixedShape] = () if lazily else shapes_ahead(spec.contract, batches)
    program = load_program(package, spec.flags, ahead=ahead, values=lambda shape: shape.values(), threads=spec.threads)
    return XlaOneShot(program, spec, batches)


def _padded(array: NDArray[Any], rows: int) -> NDArray[Any]:
    return array if not rows else np.concatenate([array, np.repeat(array[-1:], rows, axis=0)])

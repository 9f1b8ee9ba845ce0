"""How does a saved program run in eager torch?  The reference that the other backends are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray

from runtime.backends.one_shot import OneShotSpec
from runtime.backends.one_shot_executor import LoadedOneShot, owned
from runtime.backends.saved_program import FlatCall, call_program, load_program
from runtime.backends.torch_executor import hold_threads

PROGRAM = "program.pt2"


class EagerOneShot(LoadedOneShot[FlatCall]):
    """The captured program, interpreted operator by operator."""

    backend = "eager"
    failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)
    """Operators raise RuntimeError and IndexError, the program's own guards AssertionError."""

    def call(self, loaded: FlatCall, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the program without gradients."""
        hold_threads(self.threads)
        with torch.inference_mode():
            outputs = loaded([torch.from_numpy(array) for array in arrays])
        return [owned(value.numpy()) for value in outputs]


def load_eager_one_shot(package: Path, spec: OneShotSpec) -> EagerOneShot:
    """Read `program.pt2` of a verified package folder."""
    hold_threads(spec.threads)
    return EagerOneShot(call_program(load_program((package / PROGRAM).read_bytes(), PROGRAM)), spec)

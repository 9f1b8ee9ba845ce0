"""How does a one-shot model run in ExecuTorch?  The only method of a program, called with flat tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from runtime.backends.executorch import PROGRAM, WHOLE, called_once, open_program
from runtime.backends.one_shot import OneShotSpec, fixture_inputs, typical_sizes
from runtime.backends.one_shot_executor import LoadedOneShot, owned
from runtime.backends.torch_executor import hold_threads


class ExecutorchOneShot(LoadedOneShot[Any]):
    """A loaded program; a corrupted one can end the process, so digests and inputs are checked before every call."""

    backend = "executorch"

    def call(self, loaded: Any, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the program's method."""
        hold_threads(self.threads)
        return [owned(value.numpy()) for value in loaded.run_method(WHOLE, tuple(map(torch.from_numpy, arrays)))]


def load_executorch_one_shot(package: Path, spec: OneShotSpec) -> ExecutorchOneShot:
    """Load `step.pte` of a verified package folder and run it once."""
    executor = ExecutorchOneShot(open_program(package / PROGRAM, threads=spec.threads, flags=spec.flags), spec)
    called_once(lambda: executor.run(fixture_inputs(spec.contract, typical_sizes(spec.contract), label="load")))
    return executor

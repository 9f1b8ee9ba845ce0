"""How does a one-shot model run as compiled code?  An AOTInductor package, called with flat tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from runtime.backends.inductor import PACKAGE, check_machine, checks_switched_on, open_package
from runtime.backends.one_shot import OneShotSpec, fixture_inputs, typical_sizes
from runtime.backends.one_shot_executor import LoadedOneShot, owned
from runtime.backends.torch_executor import hold_threads


class InductorOneShot(LoadedOneShot[Any]):
    """Machine code made ahead of time; a fault in it can end the process, so inputs are checked before every call."""

    backend = "inductor"

    def call(self, loaded: Any, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the compiled program."""
        hold_threads(self.threads)
        return [owned(value.numpy()) for value in loaded.run([torch.from_numpy(array) for array in arrays])]


def load_inductor_one_shot(package: Path, spec: OneShotSpec) -> InductorOneShot:
    """Load the compiled program of a verified package folder, its own input checks switched on as a second wall."""
    hold_threads(spec.threads)
    compiled = open_package(package / PACKAGE)
    check_machine(dict(compiled.get_metadata()))
    executor = InductorOneShot(compiled, spec)
    with checks_switched_on():
        executor.run(fixture_inputs(spec.contract, typical_sizes(spec.contract), label="checks"))
    return executor

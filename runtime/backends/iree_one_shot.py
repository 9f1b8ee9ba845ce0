"""How does a one-shot model run in IREE?  One function of a module, over arrays that the device reads in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from runtime.backends.errors import BackendRefused
from runtime.backends.iree import FUNCTION, MODULE, LoadedModule, open_module
from runtime.backends.one_shot import OneShotSpec
from runtime.backends.one_shot_executor import LoadedOneShot


class IreeOneShot(LoadedOneShot[LoadedModule]):
    """One module; a bad index in it would end the process, so inputs are checked before every call."""

    backend = "iree"
    failures: ClassVar[tuple[type[Exception], ...]] = (RuntimeError, ValueError)

    def call(self, loaded: LoadedModule, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the module's function; `arrays` outlive the views that are made of them."""
        return loaded.call(FUNCTION, [loaded.view(array) for array in arrays])


def load_iree_one_shot(package: Path, spec: OneShotSpec) -> IreeOneShot:
    """Load `step.vmfb` of a verified package folder and see that it has its one function."""
    loaded = open_module(package / MODULE, threads=spec.threads)
    if FUNCTION not in loaded.module.function_names:
        raise BackendRefused(f"the module lacks the function {FUNCTION}", fix="prepare the model again")
    return IreeOneShot(loaded, spec)

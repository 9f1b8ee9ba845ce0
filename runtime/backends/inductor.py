"""How does the functional step run as compiled code?  An AOTInductor package over torch pools."""

from __future__ import annotations

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.backends.errors import BackendRefused
from runtime.backends.executor import StepInputs
from runtime.backends.linears import check_process
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput
from runtime.backends.torch_executor import TorchExecutor, hold_threads

PACKAGE = "step.pt2"
CHECK_VARIABLE = "AOTI_RUNTIME_CHECK_INPUTS"


class InductorExecutor(TorchExecutor[Any]):
    """Machine code made ahead of time; a fault in it can end the process, so inputs are checked before every call."""

    backend = "inductor"

    def run(self, loaded: Any, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Run the compiled step."""
        tensors = self.tensors(inputs, pool)
        hold_threads(self.threads)
        logits, new_k, new_v = loaded.run(list(tensors))
        return StepOutput(logits.numpy(), new_k, new_v)

    def metadata(self) -> dict[str, str]:
        """Read back what was written into the compiled package when it was built."""
        return dict(self.loaded.get_metadata())


def load_inductor(package: Path, spec: LoadSpec) -> InductorExecutor:
    """Load `step.pt2` of a verified package folder, with the compiled input checks switched on as a second wall."""
    hold_threads(spec.threads)
    if spec.batch_invariant:
        check_process(spec.flags)
    executor = InductorExecutor(open_package(package / PACKAGE), spec)
    check_machine(executor.metadata())
    with checks_switched_on():
        pool = executor.new_pool(2)  # the smallest that the program admits
        one, none = np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
        executor.step(one, one, one, none, pool)
    return executor


def open_package(path: Path) -> Any:
    """Load a compiled package; `BackendRefused` where it cannot be.

    What torch._inductor.aoti_load_package does, without importing the compiler (a second, and 100 MB) into a server.
    """
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        return loader(str(path), "model", False, 1, -1)
    except Exception as error:  # the loader raises RuntimeError, OSError and zip errors
        text = str(error).splitlines()[0][:500] if str(error) else type(error).__name__
        raise BackendRefused(
            f"the compiled package cannot be loaded: {text}",
            fix="prepare the model again on this machine",
            evidence={"provider_log": text, "runtime_version": str(torch.__version__)},
        ) from error


@contextmanager
def checks_switched_on() -> Generator[None]:
    """Have the compiled checks enabled during the first call of a package.

    The code reads the variable once, at its first call, so the process's environment, which is a pin, stays as it was.
    Without the checks a wrong static dimension answers wrong numbers.
    """
    before = os.environ.get(CHECK_VARIABLE)
    os.environ[CHECK_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CHECK_VARIABLE]
        else:
            os.environ[CHECK_VARIABLE] = before


def check_machine(metadata: dict[str, str]) -> None:
    """Refuse code for another platform: the loader itself does not compare."""
    found = (metadata.get("AOTI_PLATFORM"), metadata.get("AOTI_MACHINE"))
    here = (platform.system().lower(), platform.machine())
    if found != here:
        raise BackendRefused(
            f"the package holds code for {found[0]} {found[1]}, this is {here[0]} {here[1]}",
            fix="prepare the model again on this machine",
            evidence={"provider_log": str(metadata), "validation_output": f"expected {here}, found {found}"},
        )

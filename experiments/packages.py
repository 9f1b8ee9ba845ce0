"""Which model and which package does an experiment run?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.prepare.pipeline import PreparedPackage


def reference_model() -> Path:
    """Return the folder of the reference model that comes with the project."""
    from importlib.resources import files

    return Path(str(files("runtime.models.reference")))


def prepare_package(
    model: Path,
    *,
    backend: str,
    precision: str,
    ledger: Path,
    flags: Mapping[str, str] | None = None,
    threads: int = 1,
    name: str | None = None,
    on_stage: Callable[[], None] = lambda: None,
) -> PreparedPackage:
    """Take `model` through the nine stages into the ledger's store and return the package.

    Args:
        model: a checkpoint folder.
        backend: eager, onnxruntime or inductor.
        precision: float32 or bfloat16.
        ledger: takes the recording, and the package into its store.
        flags: settings of the backend.
        threads: compute threads, a pin.
        name: an alias for the package.
        on_stage: called after each of the nine stages.
    Raises ClassifiedError with class and stage when the model or the backend refuses.
    """
    from runtime.backends.protocol import BuildOptions
    from runtime.prepare.recorded import prepare_recorded

    return prepare_recorded(
        model,
        backend=backend,
        options=BuildOptions(precision=precision, threads=threads, flags=dict(flags or {})),
        ledger=ledger,
        name=name,
        component="experiment",
        on_finish=lambda report: on_stage(),
    )

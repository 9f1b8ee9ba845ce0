"""How does an experiment come by a prepared package?  The nine stages, recorded as a run of their own."""

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
    from uuid_utils import uuid7

    from runtime.backends.protocol import BuildOptions
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.store import PackageStore
    from traces.recorder import Recorder

    options = BuildOptions(precision=precision, threads=threads, flags=dict(flags or {}))
    store = PackageStore(ledger)
    with Recorder(ledger, run_id=f"run_{uuid7().hex}", component="prepare") as recorder:
        started = {"kind": "preparation", "model": model.resolve().name, "backend": backend}
        recorder.commit("run.started", payload=started, track="A")
        status = "error"
        try:
            prepared = prepare(
                model,
                backend=backend,
                store=store,
                recorder=recorder,
                options=options,
                on_finish=lambda report: on_stage(),
            )
            status = "ok"
        finally:
            recorder.commit("run.completed", payload={}, track="A", status=status)
    if name is not None:
        store.set_alias(name, prepared.digest)
    return prepared

"""How is a preparation left in the ledger?  The nine stages as a run of their own, with a beginning and an end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from uuid_utils import uuid7

from runtime.backends.protocol import BuildOptions
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.stage import StageReport
from runtime.prepare.store import PackageStore
from runtime.probe import probe
from traces.failures import ClassifiedError
from traces.recorder import Recorder
from traces.stages import Stage


def prepare_recorded(
    model: Path,
    *,
    backend: str,
    options: BuildOptions,
    ledger: Path,
    name: str | None = None,
    component: str = "prepare",
    on_start: Callable[[Stage], None] = lambda stage: None,
    on_finish: Callable[[StageReport], None] = lambda report: None,
) -> PreparedPackage:
    """Take `model` through the nine stages into the ledger's store, recorded as a run of kind preparation.

    Args:
        model: a checkpoint folder.
        backend: one of `runtime.backends.registry.BACKENDS`.
        options: precision, flags, bounds, threads.
        ledger: takes the recording, and the package into its store.
        name: an alias, set once the package is ready.
        component: who asked, for the record.
        on_start: called before each stage.
        on_finish: called after each stage.
    Raises ClassifiedError with class and stage when the model or the backend refuses.
    """
    store = PackageStore(ledger)
    started = {
        "kind": "preparation",
        "model": model.resolve().name,
        "backend": backend,
        "precision": options.precision,
    }
    with Recorder(ledger, run_id=f"run_{uuid7().hex}", component=component) as recorder:
        hardware = recorder.put_blob(probe(threads=options.threads).canonical())
        recorder.commit("run.started", payload=started, track="A", input_ref=hardware)
        try:
            prepared = prepare(
                model,
                backend=backend,
                store=store,
                recorder=recorder,
                options=options,
                on_start=on_start,
                on_finish=on_finish,
            )
            _make_ready(recorder, store, name, prepared)
        except BaseException as error:
            _end_failed(recorder, store, name, error)
            raise
        recorder.commit(
            "run.completed",
            payload={"package": prepared.digest},
            track="A",
            status="ok",
            result_ref=recorder.put_blob(prepared.preparation.canonical()),
        )
    return prepared


def _end_failed(recorder: Recorder, store: PackageStore, name: str | None, error: BaseException) -> None:
    """Record the decision against the package, where the failure is a classified one, and the run's end."""
    failed = error if isinstance(error, ClassifiedError) else None
    if failed is not None:
        _refuse(recorder, store, name, failed)
    recorder.commit(
        "run.completed",
        payload={"error": type(error).__name__},
        track="A",
        status="error",
        failure_class=failed.failure_class if failed else None,
        error_type=failed.error_type if failed else None,
    )


def _make_ready(recorder: Recorder, store: PackageStore, name: str | None, prepared: PreparedPackage) -> None:
    """Point the name at the package, and record which package it had before."""
    before = store.aliases().get(name) if name is not None else None
    if name is not None:
        store.set_alias(name, prepared.digest)
    decided = {"decision": "ready", "name": name, "package": prepared.digest, "before": before}
    recorder.commit("readiness.decided", payload=decided, track="A", stage=Stage.WARM.value, status="ok")


def _refuse(recorder: Recorder, store: PackageStore, name: str | None, error: ClassifiedError) -> None:
    """Record why the name keeps the package that it has: class, stage, phase and evidence."""
    recorder.commit(
        "readiness.decided",
        payload=error.to_payload()
        | {"decision": "refused", "name": name, "kept": store.aliases().get(name) if name is not None else None},
        track="A",
        stage=error.stage,
        status="error",
        failure_class=error.failure_class,
        error_type=error.error_type,
    )

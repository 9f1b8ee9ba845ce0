"""In which order does a model become a package?  Nine stages, one loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from manifests.preparation import PreparationManifest
from runtime.backends.protocol import BuildOptions
from runtime.backends.registry import backend_named
from runtime.models.source import identify
from runtime.prepare import analyze, capture, load, lower, optimize, package, partition, represent, warm
from runtime.prepare.manifest import PackageManifest
from runtime.prepare.sources import remember_source
from runtime.prepare.stage import Journal, StageRecorder, StageReport, failing_at
from runtime.prepare.store import PackageStore
from traces.failures import ClassifiedError
from traces.stages import Stage


@dataclass(frozen=True)
class PreparedPackage:
    """What a preparation gives back."""

    digest: str
    path: Path
    manifest: PackageManifest
    preparation: PreparationManifest
    """All nine stages, for rebuilding and comparing."""
    reports: tuple[StageReport, ...]
    """The same with times and measured fields."""


def prepare(
    model_folder: Path,
    *,
    backend: str,
    store: PackageStore,
    recorder: StageRecorder | None = None,
    precision: str | None = None,
    options: BuildOptions | None = None,
    on_start: Callable[[Stage], None] | None = None,
    on_finish: Callable[[StageReport], None] | None = None,
) -> PreparedPackage:
    """Take a model through the nine stages into the store.

    `model_folder` is a checkpoint folder, a saved program (`.pt2`), an ONNX file or a folder with one of the latter.
    `precision` overrides the options' own.  Nothing that is already in the store is touched by a failure; a package
    that fails after stage 7 stays as evidence, marked as refused, and can be neither loaded nor named.
    Errors: `ClassifiedError` with class, stage and evidence.
    """
    wanted = options or BuildOptions()
    wanted = replace(wanted, precision=precision or wanted.precision)
    chosen = backend_named(backend)
    journal = Journal(recorder, on_start, on_finish)
    with tempfile.TemporaryDirectory(prefix="replaylab-prepare-") as work, ExitStack() as resources:
        source = journal.entering(Stage.CAPTURE, lambda: identify(model_folder))
        remember_source(store, source.digest, model_folder)  # a preparation that fails can be run again too
        wanted = wanted if source.kind.one_shot else chosen.complete(wanted)
        value: Any = capture.Source(model_folder, source.digest, chosen, wanted, Path(work), resources)
        packaged: Any = None
        try:
            for stage, step in steps(store, journal):
                with failing_at(stage):
                    value = journal.run(stage, value, step)
                packaged = value if stage is Stage.PACKAGE else packaged
        except ClassifiedError as error:
            if packaged is not None:
                store.decide(packaged.digest, "refused", error.to_payload() | {"stage": error.stage})
            raise
    preparation = describe_preparation(packaged.manifest, source.digest, journal)
    store.write_baseline(packaged.digest, baseline_document(journal))
    store.write_preparation(packaged.digest, preparation)
    store.decide(packaged.digest, "ready")
    return PreparedPackage(packaged.digest, packaged.path, packaged.manifest, preparation, tuple(journal.reports))


def steps(store: PackageStore, journal: Journal) -> tuple[tuple[Stage, Callable[[Any], Any]], ...]:
    """Give the nine stages in the specification's order."""
    return (
        (Stage.CAPTURE, capture.run),
        (Stage.REPRESENT, represent.run),
        (Stage.ANALYZE, analyze.run),
        (Stage.OPTIMIZE, optimize.run),
        (Stage.PARTITION, partition.run),
        (Stage.LOWER, lower.run),
        (Stage.PACKAGE, partial(package.run, store=store, journal=journal)),
        (Stage.LOAD, partial(load.run, store=store)),
        (Stage.WARM, partial(warm.run, store=store)),
    )


def describe_preparation(manifest: PackageManifest, source_digest: str, journal: Journal) -> PreparationManifest:
    """Bind all nine stages into the document that a rebuild is compared with."""
    return PreparationManifest(
        source_digest=source_digest,
        options=dict(manifest.options),
        artifact=manifest.artifact,
        compiler=manifest.compiler,
        stages=journal.stages(),
    )


def baseline_document(journal: Journal) -> dict[str, Any]:
    """Keep every stage's duration and full record, as measured on this machine."""
    return {
        "document": "replaylab.baseline/1",
        "stages": [
            {
                "stage": report.stage.value,
                "name": report.stage.word,
                "duration_us": report.duration_us,
                "output_digest": report.manifest.output_digest,
                "record": dict(report.record),
            }
            for report in journal.reports
        ],
    }

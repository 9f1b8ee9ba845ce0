"""What did one preparation do, as the ledger has it?  What each of nine stages gave, or where it failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from manifests.errors import ManifestError
from manifests.hardware import HardwareManifest
from manifests.preparation import PreparationManifest
from replay.catalog import kind_of
from replay.errors import IncompleteRecord
from traces.failures import ClassifiedError
from traces.stages import PREPARATION_STAGES, Stage

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class RecordedStage:
    """One stage of a preparation.

    emitted   what the stage handed on, as its digest names it; None where the evidence was erased
    record    the specification's Record fields, measured ones included
    failure   of a stage that failed: class, type, message, fix, evidence
    """

    stage: Stage
    duration_us: int | None
    output_digest: str | None
    emitted: Mapping[str, Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])
    failure: Mapping[str, Any] | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay show PREPARATION --json` prints."""
        return {
            "stage": self.stage.value,
            "name": self.stage.word,
            "status": "ok" if self.failure is None else "failed",
            "duration_us": self.duration_us,
            "output_digest": self.output_digest,
            "emitted": None if self.emitted is None else dict(self.emitted),
            "record": dict(self.record),
            "failure": None if self.failure is None else dict(self.failure),
        }


@dataclass(frozen=True, kw_only=True)
class RecordedPreparation:
    """One preparation, finished or failed.

    options   as `runtime.prepare.capture.options_document` wrote them
    manifest  artifact, compiler and the nine stages without times; None where the preparation failed
    hardware  the machine and environment it ran in; None in a recording that lacks it
    stages    in order, up to the one that failed
    """

    run_id: str
    model: str
    model_digest: str
    backend: str
    options: Mapping[str, Any]
    stages: tuple[RecordedStage, ...]
    package: str | None = None
    manifest: PreparationManifest | None = None
    hardware: HardwareManifest | None = None
    parent: str | None = None
    verdict: Mapping[str, Any] | None = None

    @property
    def failed(self) -> RecordedStage | None:
        """The stage that failed, if one did."""
        return next((one for one in self.stages if one.failure is not None), None)

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay show PREPARATION --json` prints."""
        return {
            "run": self.run_id,
            "kind": "preparation" if self.parent is None else "replay",
            "parent": self.parent,
            "model": self.model,
            "model_digest": self.model_digest,
            "backend": self.backend,
            "options": dict(self.options),
            "package": self.package,
            "compiler": None if self.manifest is None else self.manifest.compiler.to_document(),
            "hardware": None if self.hardware is None else self.hardware.to_document(),
            "stages": [one.to_document() for one in self.stages],
            "verdict": None if self.verdict is None else dict(self.verdict),
        }


def is_preparation(ledger: Ledger, run_id: str) -> bool:
    """Tell whether a run prepared a model, for the first time or again."""
    started = ledger.events(run_id=run_id, event_type="run.started")
    return any(kind_of(event) == "preparation" or event.payload.get("of") == "preparation" for event in started)


def load_preparation(ledger: Ledger, run_id: str) -> RecordedPreparation:
    """Read a preparation's run; IncompleteRecord where it ended before its first stage began."""
    events = list(ledger.events(run_id=run_id))
    begun = next((event for event in events if event.event_type == "run.started"), None)
    source = _source(ledger, events)
    if begun is None or source is None:
        raise IncompleteRecord(
            f"run {run_id} did not get as far as its first stage, so nothing says what was prepared",
            missing="stage a01",
            fix="Prepare again: replaylab prepare MODEL",
        )
    ended = next((event for event in events if event.event_type == "run.completed"), None)
    judged = next((event for event in events if event.event_type == "replay.verdict"), None)
    return RecordedPreparation(
        run_id=run_id,
        model=str(begun.payload.get("model", "")),
        model_digest=source["model"],
        backend=source["backend"],
        options=source["options"],
        stages=tuple(filter(None, (_stage(ledger, events, one.stage) for one in PREPARATION_STAGES))),
        package=None if ended is None else ended.payload.get("package"),
        manifest=_manifest(ledger, ended),
        hardware=hardware_of(ledger, begun),
        parent=begun.payload.get("parent_run"),
        verdict=None if judged is None else read_document(ledger, judged.result_ref) or dict(judged.payload),
    )


def read_document(ledger: Ledger, reference: str | None) -> dict[str, Any] | None:
    """Read a JSON document from the evidence; None where there is none or it was erased."""
    if reference is None:
        return None
    try:
        return dict(json.loads(ledger.read_blob(reference)))
    except ClassifiedError:
        return None


def _source(ledger: Ledger, events: list[TraceEvent]) -> dict[str, Any] | None:
    for event in events:
        if event.event_type == "stage.started" and event.stage is Stage.CAPTURE:
            return read_document(ledger, event.input_ref)
    return None


def _stage(ledger: Ledger, events: list[TraceEvent], stage: Stage) -> RecordedStage | None:
    for event in events:
        if event.stage is not stage:
            continue
        if event.event_type == "stage.completed":
            return RecordedStage(
                stage=stage,
                duration_us=event.duration_us,
                output_digest=event.payload.get("output_digest"),
                emitted=read_document(ledger, event.result_ref),
                record=event.payload.get("record", {}),
            )
        if event.event_type == "stage.failed":
            failure = {"failure_class": str(event.failure_class), "error_type": event.error_type, **event.payload}
            return RecordedStage(stage=stage, duration_us=event.duration_us, output_digest=None, failure=failure)
    return None


def _manifest(ledger: Ledger, ended: TraceEvent | None) -> PreparationManifest | None:
    if ended is None or ended.status != "ok" or ended.result_ref is None:
        return None
    try:
        return PreparationManifest.from_bytes(ledger.read_blob(ended.result_ref))
    except (ClassifiedError, ManifestError):
        return None


def hardware_of(ledger: Ledger, begun: TraceEvent) -> HardwareManifest | None:
    """Read the machine and environment that a run's first event points to; None where it does not, or was erased."""
    if begun.input_ref is None:
        return None
    try:
        return HardwareManifest.from_bytes(ledger.read_blob(begun.input_ref))
    except (ClassifiedError, ManifestError):
        return None

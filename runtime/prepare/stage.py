"""What stands at the boundary of every preparation stage?  What it received, what it emitted, what it recorded.

`stage.started` carries the digest of what the stage receives, `stage.completed` the digest of what it emits and exactly
the fields that the specification lists under *Record*, `stage.failed` the classified failure with its evidence.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pydantic import ValidationError

from manifests.canonical import canonical_bytes, digest
from manifests.errors import ManifestError
from manifests.preparation import StageManifest
from runtime.backends.errors import CAPACITY_SIGNS, CapacityExhausted, ExecutionFailed
from runtime.prepare.errors import MetadataIncomplete, RecordIncomplete
from traces.failures import ClassifiedError
from traces.stages import Stage, describe

MEASURED = frozenset(
    {
        "optimization_us",
        "build_us",
        "load_us",
        "resident_memory_bytes",
        "device_allocation_bytes",
        "first_run_us",
        "steady_state_us",
    }
)
"""Record fields that differ from build to build: they stand in events, never in what is digested."""


SPACE_SIGNS = (*CAPACITY_SIGNS, "File too large", "Disk quota exceeded")
"""Texts by which libraries that wrap the system's number say the same."""
OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers by which the system says that a file could not grow."""


class Document(Protocol):
    """What passes between stages: a value that can describe itself without times or fresh ids."""

    def document(self) -> Mapping[str, Any]:
        """Describe the value for its digest."""
        ...


Received = TypeVar("Received", bound=Document)
Emitted = TypeVar("Emitted", bound=Document)
Found = TypeVar("Found")
EmittedCovariant = TypeVar("EmittedCovariant", bound=Document, covariant=True)


@dataclass(frozen=True)
class StageOutcome(Generic[EmittedCovariant]):
    """What a stage's function returns."""

    emitted: EmittedCovariant
    record: Mapping[str, Any]
    """Exactly the specification's Record fields."""


class StageRecorder(Protocol):
    """The part of `traces.recorder.Recorder` that stages need."""

    def commit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        """Record a mandatory event; returns when it is durable."""
        ...

    def put_blob(self, data: bytes) -> str:
        """Store evidence by content and return its reference."""
        ...


@dataclass(frozen=True)
class StageReport:
    """One finished stage, for progress, tables and the preparation manifest."""

    stage: Stage
    duration_us: int
    manifest: StageManifest
    record: Mapping[str, Any]
    """The full record, measured fields included."""


@dataclass
class Journal:
    """The stages of one preparation as they finish; every report is recorded before the next stage begins."""

    recorder: StageRecorder | None
    on_start: Callable[[Stage], None] | None = None
    on_finish: Callable[[StageReport], None] | None = None
    reports: list[StageReport] = field(default_factory=list[StageReport])

    def entering(self, stage: Stage, find: Callable[[], Found]) -> Found:
        """Find what a stage will receive; a failure to do so is that stage's failure."""
        start = time.perf_counter_ns()
        try:
            return find()
        except Exception as error:
            failure = classify(error, stage)
            if self.recorder is not None:
                self.recorder.commit("stage.started", payload={"input_digest": None}, stage=stage.value)
            self._failed(stage, failure, start)
            if failure is error:
                raise
            raise failure from error

    def run(self, stage: Stage, received: Received, work: Callable[[Received], StageOutcome[Emitted]]) -> Emitted:
        """Run one stage between its recorded boundaries.

        A stage whose record cannot be committed fails with `TelemetryPersistenceError`, so readiness fails closed.
        """
        input_digest = self._started(stage, received)
        start = time.perf_counter_ns()
        try:
            outcome = work(received)
            report = self._report(stage, input_digest, outcome, start)
        except Exception as error:
            failure = classify(error, stage)
            self._failed(stage, failure, start)
            if failure is error:
                raise
            raise failure from error
        if self.recorder is not None:
            emitted = canonical_bytes(dict(outcome.emitted.document()))
            self.recorder.commit(
                "stage.completed",
                payload={"record": dict(report.record), "output_digest": report.manifest.output_digest},
                stage=stage.value,
                duration_us=report.duration_us,
                status="ok",
                result_ref=self.recorder.put_blob(emitted),
            )
        self.reports.append(report)
        if self.on_finish is not None:
            self.on_finish(report)
        return outcome.emitted

    def stages(self) -> tuple[StageManifest, ...]:
        """Give the stages so far, in order, without times."""
        return tuple(report.manifest for report in self.reports)

    def _started(self, stage: Stage, received: Document) -> str:
        data = canonical_bytes(dict(received.document()))
        input_digest = digest(data)
        if self.on_start is not None:
            self.on_start(stage)
        if self.recorder is not None:
            self.recorder.commit(
                "stage.started",
                payload={"input_digest": input_digest},
                stage=stage.value,
                input_ref=self.recorder.put_blob(data),
            )
        return input_digest

    def _report(self, stage: Stage, input_digest: str, outcome: StageOutcome[Emitted], start: int) -> StageReport:
        expected = set(describe(stage).record)
        if set(outcome.record) != expected:
            raise RecordIncomplete(
                f"stage {stage.word} recorded other fields than the specification lists: "
                f"{', '.join(sorted(set(outcome.record) ^ expected))}",
                fix="record what the toolchain cannot tell as unknown with the reason",
                evidence={"record_type": "stage.completed", "retry_state": "none"},
                stage=stage.value,
            )
        manifest = StageManifest(
            stage=stage.value,
            name=stage.word,
            input_digest=input_digest,
            output_digest=digest(canonical_bytes(dict(outcome.emitted.document()))),
            record={name: value for name, value in outcome.record.items() if name not in MEASURED},
        )
        return StageReport(stage, (time.perf_counter_ns() - start) // 1000, manifest, outcome.record)

    def _failed(self, stage: Stage, error: ClassifiedError, start: int) -> None:
        if self.recorder is not None:
            self.recorder.commit(
                "stage.failed",
                payload=error.to_payload(),
                stage=stage.value,
                duration_us=(time.perf_counter_ns() - start) // 1000,
                status="error",
                failure_class=error.failure_class.value,
                error_type=error.error_type,
            )


@contextmanager
def failing_at(stage: Stage) -> Generator[None]:
    """Say of failures that name no stage that they are of this one."""
    try:
        yield
    except ClassifiedError as error:
        error.stage = error.stage or stage.value
        raise


def classify(error: Exception, stage: Stage) -> ClassifiedError:
    """Give a stage's error its class: its own, capacity for memory and disk, else a failed execution of the stage."""
    if isinstance(error, ClassifiedError):
        error.stage = error.stage or stage.value
        return error
    text = f"{type(error).__name__}: {error}"[:500]
    if isinstance(error, ManifestError | ValidationError):
        return MetadataIncomplete(
            f"stage {stage.word} has metadata that do not fit: {error}",
            fix="record what the manifest asks for; a field that a toolchain cannot tell is unknown with its reason",
            evidence={"validation_output": text},
            stage=stage.value,
        )
    full = isinstance(error, OSError) and error.errno in OUT_OF_SPACE
    if isinstance(error, MemoryError) or full or any(sign in text for sign in SPACE_SIGNS):
        return CapacityExhausted(
            f"stage {stage.word} ran out of memory or disk",
            fix="free space under the ledger and the temporary folder",
            evidence={"memory_pressure": text, "reservation_failure": stage.word},
            stage=stage.value,
        )
    return ExecutionFailed(
        f"stage {stage.word} failed: {text}",
        fix="the cause stands in the message; if it is not the model or the disk, it is a defect of Replaylab",
        evidence={"error_class": type(error).__name__, "provider": "preparation"},
        stage=stage.value,
    )

"""What is recorded at the boundary of a request stage?  What it received, what it emitted, or how it failed.

`stage.started` names the document that the stage received, `stage.completed` the document that it emitted and the facts
that the specification lists; both documents are stored as evidence and hold no times and no fresh ids, so that a replay
compares their digests. `stage.failed` carries the classified error. A missing end is itself evidence.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from manifests.canonical import canonical_bytes, digest
from runtime.errors import ProviderFailed, RequestCancelled
from runtime.serve.services import Services, StageDocument, request_columns, span_id
from traces.failures import ClassifiedError, TelemetryPersistenceError
from traces.stages import Stage, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """What leaves a stage."""

    document: dict[str, Any]
    """Canonical JSON, a deterministic function of inputs and effects."""
    record: dict[str, Any]
    """The specification's facts for this stage; times may stand here."""
    columns: dict[str, Any] = field(default_factory=dict[str, Any])
    """Event columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When a stage ran, where that is known from elsewhere."""

    ts_us: int
    mono_us: int
    duration_us: int

    def after(self, duration_us: int) -> Span:
        """Return the span of `duration_us` that begins where this one ends."""
        return Span(
            ts_us=self.ts_us + self.duration_us, mono_us=self.mono_us + self.duration_us, duration_us=duration_us
        )


class RequestTrace:
    """The trace of one request: binds its columns, runs its stages, keeps their documents and times."""

    def __init__(self, services: Services) -> None:
        identity = services.identity
        self._services = services
        self._trace_id = identity.trace_id
        self._columns: dict[str, Any] = request_columns(identity)
        self._passes: Counter[Stage] = Counter()
        self._pending: list[asyncio.Future[Any]] = []
        self._open: tuple[str, int] | None = None
        self.root_span = span_id(identity.trace_id, "request")
        self.started = services.stamp()
        self.documents: list[StageDocument] = []
        self.times_us: dict[str, int] = {}
        """Stage word to microseconds spent, over all passes."""

    def bind(self, **columns: Any) -> None:
        """Add columns that every later event of this request carries."""
        self._columns.update(columns)

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        """Record an optional event of this request."""
        self._services.recorder.emit(event_type, payload=payload or {}, **self._whole(columns))

    async def commit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        """Record a mandatory event; returns only when it is durable."""
        self._leave_as_recorded()
        await self._services.recorder.commit_async(event_type, payload=payload or {}, **self._whole(columns))

    def commit_later(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        """Begin to record a mandatory event; `settled` waits for it, and must before anything acts on it."""
        whole = self._whole(columns)
        self._pending.append(
            asyncio.ensure_future(self._services.recorder.commit_async(event_type, payload=payload or {}, **whole))
        )

    async def settled(self) -> None:
        """Return when every mandatory event so far is durable; raises TelemetryPersistenceError."""
        self._leave_as_recorded()
        pending, self._pending = self._pending, []
        results = await asyncio.gather(*pending, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def put(self, document: Any) -> tuple[str, str]:
        """Store a document as evidence; returns its reference and its digest."""
        data = canonical_bytes(document)
        return self._services.recorder.put_blob(data), digest(data)

    async def stage(self, stage: Stage, received: dict[str, Any], work: Callable[[], Awaitable[Emitted]]) -> Emitted:
        """Run one stage between its recorded boundaries; raises ClassifiedError, or CancelledError."""
        opened = self.open(stage, received)
        try:
            emitted = await work()
            self.close(opened, emitted)
        except asyncio.CancelledError:
            self.fail(opened, cancelled_by_caller(stage))
            raise
        except ClassifiedError as error:
            self.fail(opened, error)
            raise
        except Exception as error:  # a fault of our own: contained, classified, told
            failure = unexpected_fault(stage, error)
            self.fail(opened, failure)
            raise failure from error
        return emitted

    def open(self, stage: Stage, received: dict[str, Any], *, span: Span | None = None) -> OpenStage:
        """Record that a stage began with this document."""
        ordinal = self._passes[stage]
        self._passes[stage] += 1
        reference, name = self.put(received)
        ts_us, mono_us = self._services.stamp() if span is None else (span.ts_us, span.mono_us)
        opened = OpenStage(stage=stage, ordinal=ordinal, input_digest=name, ts_us=ts_us, mono_us=mono_us)
        self._open = (stage.value, ordinal)
        self._tell(opened, "stage.started", {}, input_ref=reference, ts_us=ts_us, mono_us=mono_us)
        self._services.on_stage(stage.word, "started")
        return opened

    def close(self, opened: OpenStage, emitted: Emitted, *, span: Span | None = None) -> None:
        """Record that a stage ended with this document."""
        expected = describe(opened.stage).record
        if set(emitted.record) != set(expected):
            raise ValueError(f"the {opened.stage.word} stage must record {sorted(expected)}")
        reference, name = self.put(emitted.document)
        self._tell(
            opened,
            "stage.completed",
            {"record": emitted.record},
            result_ref=reference,
            status="ok",
            **(emitted.columns | self._end(opened, span)),
        )
        self._keep(opened, name, emitted.document)
        self._services.on_stage(opened.stage.word, "completed")

    def fail(self, opened: OpenStage, error: ClassifiedError, *, span: Span | None = None) -> None:
        """Record that a stage failed, as far as anything can still be recorded."""
        error.stage = error.stage or opened.stage.value
        status = "cancelled" if error.failure_class == "timeout_cancellation" else "error"
        self._keep(opened, None, None)
        with contextlib.suppress(TelemetryPersistenceError):  # the failure itself still reaches the caller
            self._tell(
                opened,
                "stage.failed",
                error.to_payload(),
                status=status,
                failure_class=error.failure_class,
                error_type=error.error_type,
                **self._end(opened, span),
            )
        self._services.on_stage(opened.stage.word, "failed")

    def _tell(self, opened: OpenStage, event_type: str, payload: dict[str, Any], **columns: Any) -> None:
        self.emit(
            event_type,
            payload=payload | {"ordinal": opened.ordinal},
            stage=opened.stage,
            attempt=opened.ordinal + 1,
            span_id=span_id(self._trace_id, opened.stage.value, opened.ordinal),
            parent_span_id=self.root_span,
            **columns,
        )

    def _end(self, opened: OpenStage, span: Span | None) -> dict[str, int]:
        if span is None:
            ts_us, mono_us = self._services.stamp()
            duration_us = mono_us - opened.mono_us
        else:
            ts_us, mono_us, duration_us = (
                span.ts_us + span.duration_us,
                span.mono_us + span.duration_us,
                span.duration_us,
            )
        word = opened.stage.word
        self.times_us[word] = self.times_us.get(word, 0) + duration_us
        return {"ts_us": ts_us, "mono_us": mono_us, "duration_us": duration_us}

    def _leave_as_recorded(self) -> None:
        """In a replay: end where the recorded caller went away while evidence was being stored."""
        if self._open is not None and self._open == self._services.cancelled_in:
            raise asyncio.CancelledError

    def _keep(self, opened: OpenStage, result_digest: str | None, document: dict[str, Any] | None) -> None:
        self._open = None
        self.documents.append(
            StageDocument(
                stage=opened.stage.value,
                ordinal=opened.ordinal,
                input_digest=opened.input_digest,
                result_digest=result_digest,
                document=document,
            )
        )

    def _whole(self, columns: dict[str, Any]) -> dict[str, Any]:
        return self._columns | columns


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStage:
    """A stage that has begun and not yet ended."""

    stage: Stage
    ordinal: int
    input_digest: str
    ts_us: int
    mono_us: int


def cancelled_by_caller(stage: Stage) -> RequestCancelled:
    """Build the failure of a request whose caller went away."""
    return RequestCancelled(
        "The caller cancelled the request.",
        reason="cancelled",
        stage=stage.value,
        evidence={"cancellation_origin": "caller"},
    )


def unexpected_fault(stage: Stage, error: Exception) -> ProviderFailed:
    """Classify a fault of our own; its text stays in the process, only its type is told."""
    return ProviderFailed(
        f"The {stage.word} stage failed unexpectedly ({type(error).__name__}).",
        reason="unexpected_fault",
        stage=stage.value,
        evidence={"error_class": type(error).__name__, "device_state": None},
        fix="This is a fault of the runtime; report it with the trace id.",
    )

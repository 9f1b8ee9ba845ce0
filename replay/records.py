"""What does the ledger say about a recorded request, in the forms that replay needs and that eval judges?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.records import (
    DecisionRecord,
    FailureRecord,
    GenerationRecord,
    RequestRecord,
    SpanRecord,
    StageRecord,
    ToolCallRecord,
)
from manifests.canonical import digest
from manifests.run import Pins
from replay.errors import IncompleteRecord
from traces.evidence import hex_digest

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class RecordedRequest:
    """One request as its run recorded it.

    events        all its events, in recorded order
    manifest      its last `request.manifest` event; None when it was refused before any pin was known
    pins          the eight documents it ran under; None with `manifest`
    envelope      the request as it was accepted: canonical JSON without any secret; None when it was never accepted
    """

    run_id: str
    request_ref: str
    events: tuple[TraceEvent, ...]
    pins: Pins | None
    envelope: bytes | None

    @property
    def accepted(self) -> TraceEvent | None:
        """The event of its acceptance."""
        return self._last("request.accepted")

    @property
    def terminal(self) -> TraceEvent | None:
        """The event of its end; None when it never ended."""
        return self._last("request.terminal")

    @property
    def manifest_digest(self) -> str | None:
        """Name of the pins it ran under."""
        manifest = self._last("request.manifest")
        return manifest.manifest_digest if manifest else None

    def of_type(self, event_type: str) -> tuple[TraceEvent, ...]:
        """Its events of one type, in order."""
        return tuple(event for event in self.events if event.event_type == event_type)

    def _last(self, event_type: str) -> TraceEvent | None:
        found = self.of_type(event_type)
        return found[-1] if found else None


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """One run: its requests in order of arrival and the events that belong to no request (steps, packages).

    whole  whether all requests and all engine steps were read
    """

    run_id: str
    started: TraceEvent
    requests: Mapping[str, RecordedRequest]
    shared: tuple[TraceEvent, ...]
    whole: bool = True

    def shared_of_type(self, event_type: str) -> tuple[TraceEvent, ...]:
        """Events of one type that belong to no single request, in order."""
        return tuple(event for event in self.shared if event.event_type == event_type)


def load_run(ledger: Ledger, run_id: str, *, only: Sequence[str] | None = None) -> RecordedRun:
    """Read one run; IncompleteRecord when its start was never recorded.

    only: requests to read; neither the others nor the engines' steps are read then, however long the run was.
    """
    events = ledger.events(run_id=run_id) if only is None else ledger.events_of(run_id, only)
    started = next((event for event in events if event.event_type == "run.started"), None)
    if started is None:
        raise IncompleteRecord(f"run {run_id} has no recorded start", missing="run.started")
    grouped: dict[str, list[TraceEvent]] = {}
    shared: list[TraceEvent] = []
    for event in events:
        if event.request_ref is None:
            shared.append(event)
        else:
            grouped.setdefault(event.request_ref, []).append(event)
    requests = {ref: recorded_request(ledger.read_blob, run_id, ref, found) for ref, found in grouped.items()}
    return RecordedRun(run_id=run_id, started=started, requests=requests, shared=tuple(shared), whole=only is None)


def load_request(ledger: Ledger, run_id: str, request_ref: str) -> RecordedRequest:
    """Read one request of one run."""
    events = ledger.events(run_id=run_id, request_ref=request_ref)
    if not events:
        raise IncompleteRecord(f"run {run_id} has no events of {request_ref}", missing="request")
    return recorded_request(ledger.read_blob, run_id, request_ref, events)


def recorded_request(
    read_blob: Callable[[str], bytes], run_id: str, request_ref: str, events: Sequence[TraceEvent]
) -> RecordedRequest:
    """Return one request from its events, with the documents that name its input and its pins."""
    manifest = next((event for event in reversed(events) if event.event_type == "request.manifest"), None)
    accepted = next((event for event in events if event.event_type == "request.accepted"), None)
    pins = None
    if manifest is not None and manifest.result_ref is not None:
        pins = Pins.from_documents(json.loads(read_blob(manifest.result_ref)))
    envelope = read_blob(accepted.input_ref) if accepted is not None and accepted.input_ref else None
    return RecordedRequest(run_id=run_id, request_ref=request_ref, events=tuple(events), pins=pins, envelope=envelope)


def to_request_record(request: RecordedRequest, generations: Sequence[GenerationRecord] = ()) -> RequestRecord:
    """Return what eval judges; `generations` come from the engine's own records."""
    terminal, accepted = request.terminal, request.accepted
    return RequestRecord(
        request_ref=request.request_ref,
        run_id=request.run_id,
        stages=stage_records(request.events),
        generations=tuple(generations),
        tool_calls=tool_call_records(request.events),
        policy_decisions=decision_records(request.events),
        failure=_failure(terminal),
        terminal_status=terminal.status if terminal else None,
        response_digest=name_of(terminal.result_ref) if terminal else None,
        spans=span_records(request.events),
        manifest_digest=request.manifest_digest,
        arrival_us=accepted.mono_us if accepted else None,
    )


def stage_records(events: Iterable[TraceEvent]) -> tuple[StageRecord, ...]:
    """Pair the beginnings and ends of stages, in the order of their beginnings."""
    open_stages: dict[tuple[str, int], TraceEvent] = {}
    ends: dict[tuple[str, int], TraceEvent] = {}
    for event in events:
        if event.stage is None or not event.event_type.startswith("stage."):
            continue
        key = (event.stage.value, event.attempt or 1)
        if event.event_type == "stage.started":
            open_stages[key] = event
        else:
            ends[key] = event
    return tuple(_stage(key, started, ends.get(key)) for key, started in open_stages.items())


def span_records(events: Iterable[TraceEvent]) -> tuple[SpanRecord, ...]:
    """Return the intervals of the stages that ended, on the run's monotonic clock."""
    spans: list[SpanRecord] = []
    for event in events:
        if event.stage is None or event.event_type not in ("stage.completed", "stage.failed"):
            continue
        spans.append(
            SpanRecord(
                name=event.stage.word,
                start_us=event.mono_us - (event.duration_us or 0),
                end_us=event.mono_us,
                stage=event.stage.value,
                span_id=event.span_id,
                parent_span_id=event.parent_span_id,
            )
        )
    return tuple(sorted(spans, key=lambda span: (span.start_us, span.end_us)))


def tool_call_records(events: Iterable[TraceEvent]) -> tuple[ToolCallRecord, ...]:
    """Return the proposed tool calls in order: what was decided about each, and what its tool effects gave.

    A call's result is everything that tools answered while its stage ran.  Reading who owns an account comes before
    the decision about a ticket, which is then a consequence of that answer and is not told as a decision of its own.
    """
    calls: list[ToolCallRecord] = []
    answers: list[str] = []
    decided: TraceEvent | None = None
    independent = True
    for event in events:
        tooling = event.stage is not None and event.stage.word == "tooling"
        if tooling and event.event_type == "stage.started":
            answers, decided = [], None
        elif event.event_type == "effect.performed" and event.payload.get("kind") == "tool":
            if event.payload.get("phase") == "performed":
                answers.append(name_of(event.result_ref) or "unknown")
        elif event.event_type == "tool.authorized":
            decided, independent = event, not answers
        elif tooling and event.event_type in ("stage.completed", "stage.failed") and decided is not None:
            calls.append(_tool_call(decided, answers, independent=independent))
    return tuple(calls)


def decision_records(events: Iterable[TraceEvent]) -> tuple[DecisionRecord, ...]:
    """Return the policy decisions in order."""
    return tuple(
        DecisionRecord(
            name=str(event.payload.get("rule") or event.payload.get("name") or event.component),
            decision=event.policy_decision or str(event.payload.get("decision", "unknown")),
            version=event.policy_version,
            stage=event.stage.value if event.stage else None,
        )
        for event in events
        if event.event_type == "policy.decided"
    )


def name_of(reference: str | None) -> str | None:
    """Return the digest that an evidence reference names."""
    return None if reference is None else f"sha256:{hex_digest(reference)}"


def _stage(key: tuple[str, int], started: TraceEvent, end: TraceEvent | None) -> StageRecord:
    record: Mapping[str, Any] = end.payload.get("record", {}) if end else {}
    decision = record.get("disposition") or record.get("admission") or record.get("status")
    return StageRecord(
        stage=key[0],
        status=end.status if end else None,
        input_digest=name_of(started.input_ref),
        output_digest=name_of(end.result_ref) if end else None,
        decision=None if decision is None else str(decision),
        attempt=key[1],
        start_us=end.mono_us - end.duration_us if end and end.duration_us is not None else started.mono_us,
        end_us=end.mono_us if end else None,
    )


def _tool_call(decided: TraceEvent, answers: list[str], *, independent: bool) -> ToolCallRecord:
    return ToolCallRecord(
        name=decided.tool_name or "unknown",
        arguments_digest=name_of(decided.payload.get("arguments_ref")),
        result_digest=digest(answers) if answers else None,
        decision=decided.policy_decision if independent else None,
        side_effect=decided.side_effect or "none",
        attempt=decided.attempt or 1,
    )


def _failure(terminal: TraceEvent | None) -> FailureRecord | None:
    if terminal is None or terminal.failure_class is None:
        return None
    return FailureRecord(
        failure_class=terminal.failure_class.value,
        stage=terminal.payload.get("stage"),
        retry_decision=terminal.retry_decision,
        error_type=terminal.error_type,
        evidence=terminal.payload.get("evidence", {}),
    )

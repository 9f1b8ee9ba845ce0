"""What happened to one request?  Its recorded events, put in order for reading.

Pure functions of events and evidence: no ledger, no widgets.  A stage that began and never ended is kept as such,
because a missing end is evidence too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from dashboards.one_shot import ENDED, OneShot, read_one_shot
from dashboards.rows import SpanRow
from dashboards.words import stage_label
from eval.latency import decompose
from eval.records import SpanRecord
from traces.envelope import TraceEvent
from traces.failures import ClassifiedError
from traces.stages import Stage, describe

ReadBlob = Callable[[str], bytes]
"""Returns evidence by reference; raises ClassifiedError when it is gone or damaged."""

ENDS = ("stage.completed", "stage.failed")


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One pass of one stage."""

    stage: Stage
    ordinal: int
    """Which pass of this stage, from 1: a request with a tool call decodes twice."""
    status: str
    """``ok``, ``error``, or ``running`` when no end was recorded."""
    start_us: int
    """Microseconds since acceptance."""
    end_us: int | None
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the specification asks this stage to record."""
    input_ref: str | None = None
    result_ref: str | None = None
    failure_class: str | None = None
    error_type: str | None = None
    retry_decision: str | None = None
    message: str | None = None

    @property
    def title(self) -> str:
        """The specification's heading."""
        return describe(self.stage).title

    @property
    def duration_us(self) -> int | None:
        """Inclusive time; None while no end is known."""
        return None if self.end_us is None else self.end_us - self.start_us


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One thing that is not a function of the pins: performed live, or answered from the record."""

    kind: str
    origin: str | None
    side_effect: str | None
    phase: str | None
    status: str | None
    at_us: int
    input_ref: str | None
    result_ref: str | None


@dataclass(frozen=True, kw_only=True)
class RequestStory:
    """One request of one run, ready to be shown."""

    run_id: str
    request_ref: str
    accepted_us: int
    """When its first event was recorded: UTC epoch, microseconds."""
    total_us: int | None
    """End-to-end time; None without a terminal event."""
    status: str
    tenant_ref: str | None = None
    trace_id: str | None = None
    route: str | None = None
    first_token_us: int | None = None
    """Until the end of its first prefill, which is when the first token is there."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    failure_class: str | None = None
    error_type: str | None = None
    retry_decision: str | None = None
    cost_microusd: int | None = None
    manifest_digest: str | None = None
    stages: tuple[StageRun, ...] = ()
    pins: Mapping[str, Mapping[str, Any]] | None = None
    """Dimension to document; None when they cannot be read."""
    effects: tuple[Effect, ...] = ()
    tools: tuple[TraceEvent, ...] = ()
    decisions: tuple[TraceEvent, ...] = ()
    sequences: tuple[TraceEvent, ...] = ()
    accepted_ref: str | None = None
    """Evidence of the request as it was accepted."""
    response_ref: str | None = None
    failed_stage: str | None = None
    message: str | None = None
    """What the failure said."""
    one_shot: OneShot | None = None
    """What a request of a one-shot model recorded instead of stages."""
    notes: tuple[str, ...] = ()
    """What could not be read, one sentence each."""

    def passes(self, stage: Stage) -> tuple[StageRun, ...]:
        """Return every pass of one stage, first to last."""
        return tuple(run for run in self.stages if run.stage is stage)


def tell(events: Sequence[TraceEvent], read_blob: ReadBlob) -> RequestStory:
    """Put the events of one request of one run in order.

    Raises:
        ValueError: there are no events.
    """
    if not events:
        raise ValueError("a story needs at least one event")
    ordered = sorted(events, key=lambda event: (event.ts_us, event.outbox, event.outbox_seq))
    ended = _first(ordered, ENDED)
    if ended is not None:
        return _tell_one_shot(ended)
    first, accepted = ordered[0], _first(ordered, "request.accepted")
    terminal = _last(ordered, "request.terminal")
    manifest = _last(ordered, "request.manifest")
    stages = stage_runs(ordered, origin=first)
    notes: list[str] = []
    pins = _read_pins(manifest, read_blob, notes)
    return RequestStory(
        run_id=first.run_id,
        request_ref=first.request_ref or "",
        accepted_us=first.ts_us,
        total_us=_total(terminal, first),
        status="replayed" if all(event.event_type == "replay.verdict" for event in ordered) else _status(terminal),
        tenant_ref=_known(ordered, "tenant_ref"),
        trace_id=_known(ordered, "trace_id"),
        route=_known(ordered, "model_route"),
        first_token_us=next((run.end_us for run in stages if run.stage is Stage.PREFILL and run.status == "ok"), None),
        input_tokens=_known(ordered, "input_tokens"),
        output_tokens=_known(ordered, "output_tokens"),
        cached_tokens=_known(ordered, "kv_hit_tokens"),
        finish_reason=_known(ordered, "finish_reason"),
        failure_class=None if terminal is None else _text(terminal.failure_class),
        error_type=None if terminal is None else terminal.error_type,
        retry_decision=None if terminal is None else _text(terminal.retry_decision),
        cost_microusd=_known(ordered, "cost_microusd"),
        manifest_digest=None if manifest is None else manifest.manifest_digest,
        stages=stages,
        pins=pins,
        effects=tuple(_effect(event, first) for event in ordered if event.event_type == "effect.performed"),
        tools=tuple(event for event in ordered if event.event_type.startswith("tool.")),
        decisions=tuple(event for event in ordered if event.event_type == "policy.decided"),
        sequences=tuple(event for event in ordered if event.event_type == "engine.sequence"),
        accepted_ref=None if accepted is None else accepted.input_ref,
        response_ref=None if terminal is None else terminal.result_ref,
        failed_stage=None if terminal is None else _text(terminal.payload.get("stage")),
        message=None if terminal is None else _text(terminal.payload.get("message")),
        notes=tuple(notes),
    )


def _tell_one_shot(event: TraceEvent) -> RequestStory:
    """Tell a one-shot request, whose only event says all of it."""
    one = read_one_shot(event)
    return RequestStory(
        run_id=event.run_id,
        request_ref=one.request_ref,
        accepted_us=one.arrived_us,
        total_us=one.total_us,
        status=one.status,
        trace_id=event.trace_id,
        failure_class=one.failure_class,
        error_type=one.error_type,
        message=one.message,
        accepted_ref=event.input_ref,
        response_ref=event.result_ref,
        one_shot=one,
    )


def stage_runs(events: Sequence[TraceEvent], *, origin: TraceEvent) -> tuple[StageRun, ...]:
    """Pair each stage's start with its end, in order of start."""
    begun: list[tuple[TraceEvent, TraceEvent | None]] = []
    waiting: dict[tuple[Any, ...], int] = {}
    for event in events:
        if event.stage is None:
            continue
        key = (event.stage, event.span_id) if event.span_id else (event.stage, event.attempt)
        if event.event_type == "stage.started":
            waiting[key] = len(begun)
            begun.append((event, None))
        elif event.event_type in ENDS:
            place = waiting.pop(key, None)
            if place is None:  # an end whose start was dropped: its duration still says when it began
                begun.append((event, event))
            else:
                begun[place] = (begun[place][0], event)
    passes: dict[Stage, int] = {}
    runs: list[StageRun] = []
    for start, end in begun:
        stage = cast(Stage, start.stage)
        passes[stage] = passes.get(stage, 0) + 1
        runs.append(_stage_run(start, end, origin, passes[stage]))
    return tuple(sorted(runs, key=lambda run: (run.start_us, run.stage.value)))


def span_rows(stages: Sequence[StageRun], *, total_us: int | None = None) -> tuple[SpanRow, ...]:
    """Return the bars of the waterfall, with the critical path through them.

    A stage without an end lasts until the end of the request; it is left out while that is not known either.
    """
    known = [run for run in stages if run.end_us is not None or total_us is not None]
    ends = [max(run.start_us, total_us or 0 if run.end_us is None else run.end_us) for run in known]
    if not known:
        return ()
    owned: list[list[tuple[int, int]]] = [[] for _ in known]
    spans = [
        SpanRecord(run.stage.word, run.start_us, end, stage=run.stage.value)
        for run, end in zip(known, ends, strict=True)
    ]
    for segment in decompose(spans, start_us=0, end_us=max(ends) if total_us is None else total_us).path:
        if segment.owner is not None:
            owned[segment.owner].append((segment.start_us, segment.end_us))
    return tuple(
        SpanRow(
            stage=run.stage.value,
            label=stage_label(run.stage.value),
            start_us=run.start_us,
            end_us=end,
            critical=tuple(parts),
            status=run.status,
            detail=run.message or ("no end was recorded" if run.end_us is None else ""),
        )
        for run, end, parts in zip(known, ends, owned, strict=True)
    )


def offset(event: TraceEvent, origin: TraceEvent) -> int:
    """Return microseconds from one event to another: monotonic inside an outbox, by the wall clock across."""
    if event.outbox and event.outbox == origin.outbox:
        return event.mono_us - origin.mono_us
    return event.ts_us - origin.ts_us


def read_document(reference: str | None, read_blob: ReadBlob) -> Any:
    """Return the JSON document behind a reference, or None when there is no reference or it is no JSON.

    Raises:
        ClassifiedError: the evidence is gone or damaged.
    """
    if not reference:
        return None
    try:
        return json.loads(read_blob(reference))
    except ValueError:
        return None


def _stage_run(start: TraceEvent, end: TraceEvent | None, origin: TraceEvent, ordinal: int) -> StageRun:
    """Join a start and its end into one pass."""
    last = end if end is not None else start
    payload = last.payload
    began = offset(start, origin)
    if start is last and last.duration_us is not None:
        began -= last.duration_us
    status = "running" if end is None else (last.status or ("error" if last.event_type == "stage.failed" else "ok"))
    record = payload.get("record", {})
    message = payload.get("message")
    return StageRun(
        stage=cast(Stage, start.stage),
        ordinal=ordinal,
        status=str(status),
        start_us=began,
        end_us=None if end is None else offset(end, origin),
        record=cast("Mapping[str, Any]", record) if isinstance(record, dict) else {},
        input_ref=start.input_ref or last.input_ref,
        result_ref=last.result_ref,
        failure_class=_text(last.failure_class),
        error_type=last.error_type,
        retry_decision=_text(last.retry_decision),
        message=message if isinstance(message, str) else None,
    )


def _read_pins(
    manifest: TraceEvent | None, read_blob: ReadBlob, notes: list[str]
) -> Mapping[str, Mapping[str, Any]] | None:
    """Return the eight documents from the event itself or from the evidence that it names."""
    if manifest is None:
        return None
    documents = manifest.payload.get("documents")
    if isinstance(documents, dict):
        return cast("Mapping[str, Mapping[str, Any]]", documents)
    try:
        read = read_document(manifest.result_ref, read_blob)
    except ClassifiedError as error:
        notes.append(f"The pins cannot be read: {error}")
        return None
    return cast("Mapping[str, Mapping[str, Any]]", read) if isinstance(read, dict) else None


def _effect(event: TraceEvent, origin: TraceEvent) -> Effect:
    """Read one effect event."""
    return Effect(
        kind=str(event.payload.get("kind", "effect")),
        origin=_text(event.effect_origin),
        side_effect=_text(event.side_effect),
        phase=_text(event.payload.get("phase")),
        status=_text(event.status),
        at_us=offset(event, origin),
        input_ref=event.input_ref,
        result_ref=event.result_ref,
    )


def _total(terminal: TraceEvent | None, first: TraceEvent) -> int | None:
    """Return the end-to-end time: the runtime's own measurement where it gave one."""
    if terminal is None:
        return None
    return terminal.duration_us if terminal.duration_us is not None else offset(terminal, first)


def _status(terminal: TraceEvent | None) -> str:
    """Say how the request ended; the runtime's own word when it recorded one."""
    if terminal is None:
        return "running"
    own = terminal.payload.get("status")
    return own if isinstance(own, str) else _text(terminal.status) or "ok"


def _first(events: Sequence[TraceEvent], event_type: str) -> TraceEvent | None:
    return next((event for event in events if event.event_type == event_type), None)


def _last(events: Sequence[TraceEvent], event_type: str) -> TraceEvent | None:
    return next((event for event in reversed(events) if event.event_type == event_type), None)


def _known(events: Sequence[TraceEvent], column: str) -> Any:
    """Return the last recorded value of a column, the terminal event before all others."""
    terminal = _last(events, "request.terminal")
    if terminal is not None and getattr(terminal, column) is not None:
        return getattr(terminal, column)
    return next((getattr(event, column) for event in reversed(events) if getattr(event, column) is not None), None)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

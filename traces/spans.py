"""Which spans do a run's events make?

A span is what shares a span id: its start, its end, and the events in between.  Events that carry no span id belong to
their request's span, or to their run's; an event with a duration of its own is a span of its own.  Ids that are missing
are derived from what they stand for, so the same events always make the same spans.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from traces.conventions import AttributeValue, attributes_of
from traces.envelope import TraceEvent

_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN_ID = re.compile(r"(?!0{16})[0-9a-f]{16}")


@dataclass(frozen=True)
class SpanEvent:
    """A moment inside a span."""

    name: str
    time_us: int
    attributes: dict[str, AttributeValue]


@dataclass
class SpanRecord:
    """One span, as OpenTelemetry understands it."""

    trace_id: str
    """32 hex digits."""
    span_id: str
    """16 hex digits."""
    parent_span_id: str | None
    name: str
    kind: str
    """internal, server, client, producer, consumer."""
    start_us: int
    end_us: int
    ended: bool
    """False when no end was recorded: that is evidence of its own."""
    failed: bool
    message: str
    attributes: dict[str, AttributeValue] = field(default_factory=dict[str, AttributeValue])
    events: list[SpanEvent] = field(default_factory=list[SpanEvent])


def spans_of(events: Iterable[TraceEvent]) -> list[SpanRecord]:
    """Return the spans of events (of one run or many), by start time."""
    in_order = list(events)
    traces = {(event.run_id, event.request_ref): event.trace_id for event in in_order if _is_trace(event.trace_id)}
    groups: dict[tuple[str, str], list[TraceEvent]] = {}
    parents: dict[tuple[str, str], str | None] = {}
    roots = _root_spans(in_order)
    for event in in_order:
        trace_id = traces.get((event.run_id, event.request_ref)) or _derived(32, "trace", event.run_id)
        span_id, parent = _place(event, roots)
        key = trace_id, span_id
        groups.setdefault(key, []).append(event)
        if parent is not None and parent != span_id:
            parents[key] = parent
    spans = [
        _span(trace_id, span_id, parents.get((trace_id, span_id)), group)
        for (trace_id, span_id), group in groups.items()
    ]
    return sorted(spans, key=lambda span: (span.start_us, span.end_us, span.span_id))


def _root_spans(events: Sequence[TraceEvent]) -> dict[tuple[str, str], str]:
    """Find each request's root: the parent its stages name that is no stage itself."""
    own = {(event.run_id, event.span_id) for event in events if event.span_id is not None}
    roots: dict[tuple[str, str], str] = {}
    for event in events:
        parent = event.parent_span_id
        if event.request_ref is not None and parent is not None and (event.run_id, parent) not in own:
            roots.setdefault((event.run_id, event.request_ref), parent)
    return roots


def _place(event: TraceEvent, roots: dict[tuple[str, str], str]) -> tuple[str, str | None]:
    """Return (span id, parent span id) of an event."""
    run = _derived(16, "run", event.run_id)
    request = None
    if event.request_ref is not None:
        key = event.run_id, event.request_ref
        request = _as_span_id(roots[key]) if key in roots else _derived(16, "request", *key)
    if event.span_id is not None:
        parent = _as_span_id(event.parent_span_id) if event.parent_span_id is not None else request
        return _as_span_id(event.span_id), parent
    if event.duration_us is not None and event.event_type not in ("request.terminal", "run.completed"):
        return _derived(16, "event", event.outbox, str(event.outbox_seq), event.event_id), request or run
    if request is not None:
        return request, None
    return run, None


def _span(trace_id: str, span_id: str, parent: str | None, group: list[TraceEvent]) -> SpanRecord:
    last = group[-1]
    ends = [event for event in group if _is_end(event)]
    starts = [event.ts_us for event in group]
    starts += [event.ts_us - event.duration_us for event in group if event.duration_us is not None and _is_end(event)]
    if any(event.event_type.endswith((".started", ".accepted")) for event in group):
        starts = [event.ts_us for event in group]
    attributes: dict[str, AttributeValue] = {}
    for event in group:
        attributes.update(attributes_of(event))
    failed = any(event.failure_class is not None or event.status == "error" for event in ends)
    return SpanRecord(
        trace_id=trace_id,
        span_id=span_id,
        parent_span_id=parent,
        name=_name(group),
        kind=next((event.span_kind for event in group if event.span_kind is not None), "internal"),
        start_us=min(starts),
        end_us=max(event.ts_us for event in group),
        ended=bool(ends),
        failed=failed,
        message=str(last.error_type or last.failure_class or "") if failed else "",
        attributes=attributes,
        events=[
            SpanEvent(event.event_type, event.ts_us, attributes_of(event))
            for event in group
            if not event.event_type.endswith((".started", ".completed"))
        ],
    )


def _is_end(event: TraceEvent) -> bool:
    return event.event_type.endswith((".completed", ".failed", ".terminal")) or event.duration_us is not None


def _name(group: list[TraceEvent]) -> str:
    for event in group:
        if event.operation is not None and event.request_model is not None:
            return f"{event.operation} {event.request_model}"
        if event.tool_name is not None and event.stage is None:
            return f"execute_tool {event.tool_name}"
        if event.stage is not None and event.span_id is not None:
            return event.stage.word
    first = group[0]
    if first.span_id is None and first.duration_us is None:
        return "request" if first.request_ref is not None else "run"
    return first.event_type


def _derived(digits: int, *parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:digits]


def _is_trace(trace_id: str | None) -> bool:
    return trace_id is not None and _TRACE_ID.fullmatch(trace_id) is not None


def _as_span_id(span_id: str) -> str:
    return span_id if _SPAN_ID.fullmatch(span_id) else _derived(16, "span", span_id)

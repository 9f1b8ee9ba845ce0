"""How do the same events reach an OpenTelemetry exporter?

Spans are made from recorded events with the ids and times they were recorded with, so exporting twice sends the same
spans.  Nothing here runs on a request's path: the SDK costs ten times what the recorder does.
"""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from traces.conventions import MAPPING_VERSION, SCHEMA_URL
from traces.envelope import TraceEvent
from traces.failures import TelemetryPersistenceError
from traces.spans import SpanRecord, spans_of

BATCH = 512


def readable_spans(events: Iterable[TraceEvent], *, service: str = "replaylab") -> list[ReadableSpan]:
    """Return the spans that events make, as the SDK's finished spans."""
    resource = Resource({"service.name": service}, SCHEMA_URL)
    scope = InstrumentationScope("replaylab.traces", MAPPING_VERSION, SCHEMA_URL)
    return [_readable(span, resource, scope) for span in spans_of(events)]


def export_spans(events: Iterable[TraceEvent], exporter: SpanExporter, *, service: str = "replaylab") -> int:
    """Send the spans that events make to an exporter; return how many.

    Raises:
        TelemetryPersistenceError: the exporter refused a batch; those before it were sent.
    """
    spans = readable_spans(events, service=service)
    for start in range(0, len(spans), BATCH):
        if exporter.export(spans[start : start + BATCH]) is not SpanExportResult.SUCCESS:
            raise TelemetryPersistenceError(
                f"The exporter took {start} of {len(spans)} spans.",
                evidence={"record_type": "span", "durability": "optional", "storage_target": type(exporter).__name__},
                fix="check the collector and export again: the same spans have the same ids.",
            )
    return len(spans)


def _readable(span: SpanRecord, resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    trace_id = int(span.trace_id, 16)
    sampled = TraceFlags(TraceFlags.SAMPLED)
    parent = None
    if span.parent_span_id is not None:
        parent = SpanContext(trace_id, int(span.parent_span_id, 16), False, sampled)
    code = StatusCode.ERROR if span.failed else StatusCode.OK if span.ended else StatusCode.UNSET
    return ReadableSpan(
        name=span.name,
        context=SpanContext(trace_id, int(span.span_id, 16), False, sampled),
        parent=parent,
        resource=resource,
        attributes=span.attributes,
        events=[Event(event.name, event.attributes, event.time_us * 1_000) for event in span.events],
        kind=SpanKind[span.kind.upper()],
        instrumentation_scope=scope,
        status=Status(code, span.message if span.failed else None),
        start_time=span.start_us * 1_000,
        end_time=span.end_us * 1_000,
    )

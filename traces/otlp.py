"""How does a run look as an OTLP file?

JSON Lines, one ``TracesData`` a line (OpenTelemetry protocol, file exporter): ids in hexadecimal, 64-bit integers as
strings, enumerations as numbers.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from traces.conventions import MAPPING_VERSION, SCHEMA_URL, AttributeValue
from traces.envelope import TraceEvent
from traces.spans import SpanRecord, spans_of

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

SPANS_PER_LINE = 512
_KINDS = {"internal": 1, "server": 2, "client": 3, "producer": 4, "consumer": 5}
_HEX_FIELDS = frozenset({"traceId", "spanId", "parentSpanId"})


def otlp_lines(events: Iterable[TraceEvent], *, service: str = "replaylab") -> Iterator[str]:
    """Yield OTLP-JSON lines of the spans that the events make."""
    spans = spans_of(events)
    for start in range(0, len(spans), SPANS_PER_LINE):
        yield to_json(traces_data(spans[start : start + SPANS_PER_LINE], service=service))


def traces_data(spans: Iterable[SpanRecord], *, service: str) -> TracesData:
    """Return spans as one protobuf message."""
    from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

    message = TracesData()
    resource = message.resource_spans.add()
    resource.schema_url = SCHEMA_URL
    resource.resource.attributes.append(_attribute("service.name", service))
    scope = resource.scope_spans.add()
    scope.scope.name = "replaylab.traces"
    scope.scope.version = MAPPING_VERSION
    for span in spans:
        _fill(scope.spans.add(), span)
    return message


def to_json(message: TracesData) -> str:
    """Return a message as one line of OTLP-JSON (protobuf's own JSON has base64 ids)."""
    from google.protobuf.json_format import MessageToDict

    document: dict[str, Any] = MessageToDict(message, use_integers_for_enums=True)
    return json.dumps(_with_hex_ids(document), separators=(",", ":"), sort_keys=True)


def _with_hex_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: base64.b64decode(item).hex() if key in _HEX_FIELDS else _with_hex_ids(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_hex_ids(item) for item in value]
    return value


def _fill(target: Span, span: SpanRecord) -> None:
    target.trace_id = bytes.fromhex(span.trace_id)
    target.span_id = bytes.fromhex(span.span_id)
    if span.parent_span_id is not None:
        target.parent_span_id = bytes.fromhex(span.parent_span_id)
    target.name = span.name
    target.kind = _KINDS[span.kind]  # type: ignore[assignment]
    target.start_time_unix_nano = span.start_us * 1_000
    target.end_time_unix_nano = span.end_us * 1_000
    target.status.code = 2 if span.failed else 1 if span.ended else 0  # type: ignore[assignment]
    if span.message:
        target.status.message = span.message
    target.attributes.extend(_attribute(name, value) for name, value in sorted(span.attributes.items()))
    for event in span.events:
        added = target.events.add()
        added.name = event.name
        added.time_unix_nano = event.time_us * 1_000
        added.attributes.extend(_attribute(name, value) for name, value in sorted(event.attributes.items()))


def _attribute(name: str, value: AttributeValue) -> KeyValue:
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue

    pair = KeyValue(key=name)
    if isinstance(value, bool):
        pair.value.bool_value = value
    elif isinstance(value, int):
        pair.value.int_value = value
    elif isinstance(value, float):
        pair.value.double_value = value
    elif isinstance(value, str):
        pair.value.string_value = value
    else:
        for item in value:
            pair.value.array_value.values.add().string_value = item
    return pair

"""What is one trace event, and how does it look outside?

``TraceEvent`` is the whole envelope: one frozen record, one sentence a field.  It covers the specification's
"Conceptual trace event envelope" and the OpenTelemetry GenAI fields; ``export`` writes the specification's camelCase
names.  A missing value is None and takes no bytes.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

import msgspec

from traces.failures import FailureClass, RetryAction, SideEffect
from traces.stages import Stage

SCHEMA_VERSION = 1

Track = Literal["A", "B", "M"]
Durability = Literal["mandatory", "optional"]
EffectOrigin = Literal["executed", "replayed", "simulated"]
Status = Literal["ok", "error", "cancelled", "partial", "degraded", "review"]
# Wider integers would not fit the projection's BIGINT columns; the check stands where the caller can still be told.
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
SpanKind = Literal["internal", "server", "client", "producer", "consumer"]


class TraceEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """One immutable fact about a run."""

    event_type: str
    """What happened: ``stage.completed``, ``request.terminal`` and so on."""
    run_id: str
    """The recording this event belongs to."""
    component: str
    """Which part of the system speaks."""
    ts_us: Int64
    """UTC epoch time, microseconds."""
    mono_us: Int64
    """Monotonic time in microseconds; comparable inside one outbox only."""
    event_id: str = ""
    """UUIDv7 as 32 hex digits, given by the recorder."""
    outbox: str = ""
    """The writing process's outbox; with ``outbox_seq`` it identifies the event."""
    outbox_seq: int = 0
    """Dense number inside the outbox, from 1: a gap is evidence of loss."""
    durability: Durability = "optional"
    """Whether the writer waited for the disk before going on."""
    schema_version: int = 1
    """Version of this envelope."""
    track: Track | None = None
    """A preparation, B requests, M the recorder itself."""
    stage: Stage | None = None
    trace_id: str | None = None
    """W3C trace id, 32 hex digits."""
    span_id: str | None = None
    """W3C span id, 16 hex digits."""
    parent_span_id: str | None = None
    span_kind: SpanKind | None = None
    operation: str | None = None
    """``gen_ai.operation.name``."""
    component_version: str | None = None
    attempt: Int64 | None = None
    """From 1."""
    duration_us: Int64 | None = None
    deadline_us: Int64 | None = None
    """UTC epoch time, microseconds."""
    request_ref: str | None = None
    actor_ref: str | None = None
    """Keyed pseudonym."""
    tenant_ref: str | None = None
    """Keyed pseudonym."""
    conversation_ref: str | None = None
    idempotency_ref: str | None = None
    """Keyed pseudonym of the idempotency key; never exported."""
    manifest_digest: str | None = None
    """``sha256:<hex>`` of the RunManifest."""
    model_route: str | None = None
    provider: str | None = None
    request_model: str | None = None
    response_model: str | None = None
    gen_policy_digest: str | None = None
    seed: Int64 | None = None
    temperature: str | None = None
    """A decimal string, as in the generation manifest."""
    top_p: str | None = None
    top_k: Int64 | None = None
    max_tokens: Int64 | None = None
    engine_id: str | None = None
    step: Int64 | None = None
    """Engine step number."""
    batch_id: str | None = None
    batch_size: Int64 | None = None
    batch_position: Int64 | None = None
    queue_depth: Int64 | None = None
    kv_blocks: Int64 | None = None
    kv_hit_tokens: Int64 | None = None
    """Prompt tokens answered by the prefix cache."""
    input_tokens: Int64 | None = None
    output_tokens: Int64 | None = None
    cache_read_tokens: Int64 | None = None
    cache_write_tokens: Int64 | None = None
    reasoning_tokens: Int64 | None = None
    first_token_us: Int64 | None = None
    """Microseconds from acceptance to the first token."""
    finish_reason: str | None = None
    status: Status | None = None
    failure_class: FailureClass | None = None
    error_type: str | None = None
    retry_decision: RetryAction | None = None
    tool_name: str | None = None
    tool_version: str | None = None
    tool_call_id: str | None = None
    side_effect: SideEffect | None = None
    effect_origin: EffectOrigin | None = None
    policy_decision: str | None = None
    """allow, deny, review and the like."""
    policy_version: str | None = None
    redaction_status: str | None = None
    """``clean`` or ``payload-redacted``; given by the recorder."""
    redaction_policy: str | None = None
    cost_microusd: Int64 | None = None
    input_ref: str | None = None
    """``evidence://sha256/<hex>`` of what the stage received."""
    result_ref: str | None = None
    """``evidence://sha256/<hex>`` of what the stage emitted."""
    payload: dict[str, Any] = {}
    """Everything else, redacted; JSON values with ASCII keys."""


ENVELOPE_COLUMNS: frozenset[str] = frozenset(TraceEvent.__struct_fields__)

# Columns that the recorder fills itself: a caller that gives them would break identity or order.
RECORDER_COLUMNS: frozenset[str] = frozenset({"event_id", "outbox", "outbox_seq", "durability", "schema_version"})

# Columns that take any string: secrets are looked for in them.
TEXT_COLUMNS: tuple[str, ...] = (
    *("event_type", "run_id", "component", "component_version", "operation", "trace_id", "span_id", "parent_span_id"),
    *("request_ref", "conversation_ref", "manifest_digest", "model_route", "provider", "request_model"),
    *("response_model", "gen_policy_digest", "temperature", "top_p", "engine_id", "batch_id", "finish_reason"),
    *("error_type", "tool_name", "tool_version", "tool_call_id", "policy_decision", "policy_version"),
    *("input_ref", "result_ref"),
)

# Named by the specification's example, or never exported at all.
_SPECIAL_EXPORT = frozenset({"ts_us", "duration_us", "tool_name", "tool_version", "tool_call_id", "idempotency_ref"})


def encode(event: TraceEvent) -> bytes:
    """Return the canonical body: sorted keys, no white space, defaults left out.

    It equals RFC 8785 for ASCII keys, strings, booleans, null and integers below 2**53.
    """
    return msgspec.json.encode(event, order="sorted")


def decode(body: bytes) -> TraceEvent:
    """Return the event of a canonical body.

    Raises:
        msgspec.ValidationError: the body is not an event of this schema version.
    """
    return msgspec.json.decode(body, type=TraceEvent)


def export(event: TraceEvent) -> dict[str, Any]:
    """Return the event as the specification's camelCase JSON envelope (values that are None are left out)."""
    moment = datetime.datetime.fromtimestamp(event.ts_us / 1_000_000, tz=datetime.UTC)
    document: dict[str, Any] = {"timestampUtc": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
    for name, value in zip(event.__struct_fields__, msgspec.structs.astuple(event), strict=True):
        if value is None or name in _SPECIAL_EXPORT or (name == "payload" and not value):
            continue
        document[_camel(name)] = value
    if event.duration_us is not None:
        document["durationMs"] = _milliseconds(event.duration_us)
    if event.tool_name is not None:
        tool = {"name": event.tool_name, "version": event.tool_version, "callId": event.tool_call_id}
        document["tool"] = {key: value for key, value in tool.items() if value is not None}
    return document


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _milliseconds(microseconds: int) -> int | float:
    whole, rest = divmod(microseconds, 1_000)
    return whole if rest == 0 else microseconds / 1_000

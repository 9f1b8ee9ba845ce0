"""One event: its canonical body, its domains, and the specification's own JSON."""

from __future__ import annotations

import msgspec
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from traces.envelope import ENVELOPE_COLUMNS, TraceEvent, decode, encode, export
from traces.stages import Stage

ascii_keys = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=12)
documents = st.recursive(
    scalars, lambda children: st.lists(children, max_size=3) | st.dictionaries(ascii_keys, children, max_size=3)
)


@given(st.dictionaries(ascii_keys, documents, max_size=5), st.text(max_size=20), st.integers(0, 2**53 - 1))
def test_the_body_is_rfc_8785(payload: dict[str, object], text: str, number: int) -> None:
    event = TraceEvent(
        event_type="x", run_id=text, component="c", ts_us=number, mono_us=1, stage=Stage.LOAD, payload=payload
    )
    body = encode(event)
    assert body == rfc8785.dumps(msgspec.json.decode(body))
    assert decode(body) == event


def test_the_specifications_example() -> None:
    """The example of the specification's "Conceptual trace event envelope", field for field."""
    event = TraceEvent(
        event_type="tool.completed",
        run_id="run_1",
        component="crm-read-adapter",
        ts_us=1_782_067_336_428_000,
        mono_us=0,
        trace_id="trc_01JYEXAMPLE",
        span_id="spn_tool_07",
        parent_span_id="spn_runtime_01",
        attempt=1,
        request_ref="req_01JYEXAMPLE",
        actor_ref="actor_redacted",
        model_route="local-primary",
        tool_name="crm.lookup",
        tool_version="2.4.1",
        duration_us=164_000,
        policy_decision="allow",
        side_effect="none",
        redaction_status="payload-redacted",
        result_ref="evidence://sha256/example",
        idempotency_ref="never exported",
    )
    expected = {
        "traceId": "trc_01JYEXAMPLE",
        "spanId": "spn_tool_07",
        "parentSpanId": "spn_runtime_01",
        "eventType": "tool.completed",
        "timestampUtc": "2026-06-21T18:42:16.428Z",
        "component": "crm-read-adapter",
        "attempt": 1,
        "requestRef": "req_01JYEXAMPLE",
        "actorRef": "actor_redacted",
        "modelRoute": "local-primary",
        "tool": {"name": "crm.lookup", "version": "2.4.1"},
        "durationMs": 164,
        "policyDecision": "allow",
        "sideEffect": "none",
        "redactionStatus": "payload-redacted",
        "resultRef": "evidence://sha256/example",
    }
    document = export(event)
    assert {key: document[key] for key in expected} == expected
    assert "never exported" not in msgspec.json.encode(document).decode()


@pytest.mark.parametrize(
    "column", [{"stage": "b99"}, {"status": "fine"}, {"step": 2**63}, {"step": "1"}, {"unknown": 1}, {"track": "Z"}]
)
def test_values_outside_their_domain_are_refused(column: dict[str, object]) -> None:
    columns = {"event_type": "x", "run_id": "r", "component": "c", "ts_us": 1, "mono_us": 1, **column}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(columns, TraceEvent)


def test_the_envelope_covers_the_contracted_columns() -> None:
    assert {"kv_hit_tokens", "effect_origin", "first_token_us", "cost_microusd", "payload"} <= ENVELOPE_COLUMNS

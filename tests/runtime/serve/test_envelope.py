"""The request envelope takes what it says it takes, refuses everything else, and echoes none of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import RequestRefused
from runtime.serve.boundary import normalized
from runtime.serve.envelope import RequestEnvelope, parse_envelope

VALID: dict[str, Any] = {"tenant": "aurora", "actor": "me", "task": {"kind": "support", "question": "How long?"}}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = sorted(RequestEnvelope.model_fields)


def refused_or_read(body: bytes) -> RequestEnvelope | None:
    """Anything but an envelope or a refusal is a fault."""
    try:
        return normalized(parse_envelope(body))
    except RequestRefused:
        return None


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(fields), values)
def test_any_value_in_any_field_is_read_or_refused(field: str, value: Any) -> None:
    envelope = refused_or_read(json.dumps(VALID | {field: value}).encode())
    if envelope is not None:
        assert parse_envelope(json.dumps(envelope.to_document()).encode()) == envelope


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    refused_or_read(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 60_000,
        b'{"a":' * 12_000,
        json.dumps(VALID | {"actor": "x\n"}).encode(),
        json.dumps(VALID | {"trace": {"label": "x\n"}}).encode(),
        b'{"tenant":"aurora","actor":"me","task":{"kind":"support","question":"\\ud800"}}',
        json.dumps(VALID | {"generation": {"temperature": "-1"}}).encode(),
        json.dumps(VALID | {"generation": {"temperature": "1e400"}}).encode(),
        json.dumps(VALID | {"generation": {"top_p": "0"}}).encode(),
        json.dumps(VALID | {"generation": {"seed": False}}).encode(),
        json.dumps(VALID | {"generation": {"seed": 2**60}}).encode(),
        json.dumps(VALID | {"timeout_us": 0}).encode(),
        json.dumps(VALID | {"tools": {"allowed": ["../../x"]}}).encode(),
        json.dumps(VALID | {"task": {"kind": "support", "question": "\u0000 \n"}}).encode(),
    ],
)
def test_hostile_bodies_are_refused(body: bytes) -> None:
    assert refused_or_read(body) is None


def test_a_refusal_names_fields_and_never_their_values() -> None:
    body = json.dumps(VALID | {"generation": {"seed": "canary"}, "another": "canary"}).encode()
    with pytest.raises(RequestRefused) as caught:
        parse_envelope(body)
    assert "generation.seed" in caught.value.message
    assert "canary" not in json.dumps(caught.value.to_payload())


def test_an_envelope_written_by_code_equals_the_one_read_from_json() -> None:
    read = parse_envelope(json.dumps(VALID).encode())
    assert parse_envelope(json.dumps(read.to_document()).encode()).digest == read.digest

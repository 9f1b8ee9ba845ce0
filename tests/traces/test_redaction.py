"""No planted secret reaches the disk, whatever field it is put in; what replay needs is left alone."""

from __future__ import annotations

import enum
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.envelope import TEXT_COLUMNS, TraceEvent
from traces.ledger.ledger import Ledger
from traces.recorder import PSEUDONYMS, Recorder
from traces.redaction import MARKER, WITHHELD, Redactor

CANARIES = {
    "provider": "sk-proj-Qm9vYmFyQm9vYmFyQm9v42",
    "own": "rlk_c2VjcmV0c2VjcmV0c2VjcmV0",
    "GitHub": "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "GitLab": "glpat-abcdefghij0123456789",
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "Google": "AIzaSyA-0123456789abcdefghijklmnopqrstu",
    "Slack": "xoxb-123456789012-abcdefghijkl",
    "HuggingFace": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "PyPI": "pypi-AgEIcHlwaS5vcmcCJDAxMjM0NTY3",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlc2ln",
    "bearer": "Bearer canary.token-0123456789",
    "PEM": "-----BEGIN PRIVATE KEY-----\nMIIcanary\n-----END PRIVATE KEY-----",
    "URL": "postgres://canary:hunter22@db.internal/x",
    "named": "password=canary-hunter22",
    "e-mail": "canary.person@mail.example.org",
    "card": "4111 1111 1111 1111",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "phone": "+1 415 555 0100",
    "SSN": "078-05-1120",
}
# What must not be found: the part of the canary that is the secret.
SECRETS = {**CANARIES, "URL": "hunter22", "named": "hunter22", "bearer": "canary.token-0123456789"}


def places(secret: str) -> Iterator[dict[str, Any]]:
    """Every way to put a secret into an event: each text column, and payload positions."""
    for column in TEXT_COLUMNS:
        if column not in ("event_type", "run_id"):
            yield {column: f"x {secret} y"}
    for _, column in PSEUDONYMS:
        yield {column: secret}
    for payload in (
        {"note": secret},
        {"message": f"it failed with {secret} in hand"},
        {"record": {"warnings": [f"w {secret}", {"deep": [secret]}]}},
        {secret: 1},
        {"manifest": {secret: {"x": secret}}},
        {"evidence": {"redacted_sample": f"text {secret}"}},
        {"arguments": {"account": secret}},
        {"prompt": [secret]},
        {"headers": (("authorization", secret),)},
    ):
        yield {"payload": payload}


def test_no_canary_reaches_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    placed = 0
    with Recorder(path, run_id="run_1", component="test") as recorder:
        for secret in CANARIES.values():
            for place in places(secret):
                recorder.emit("x", **place)
                placed += 1
        recorder.flush()
        # Before the drain: the outbox and its write-ahead log, byte for byte.
        written = b"".join(file.read_bytes() for file in (path / "outbox").iterdir())
        assert [
            name
            for name, secret in SECRETS.items()
            if secret.split("\n")[-2 if "\n" in secret else 0].encode() in written
        ] == []
    ledger = Ledger(path)
    ledger.drain()
    with ledger.reading() as connection:
        stored = "\n".join(bytes(row[0]).decode() for row in connection.execute("SELECT body FROM event").fetchall())
        columns = str(connection.execute("SELECT * EXCLUDE (body), payload::VARCHAR FROM event").fetchall())
    assert [name for name, secret in SECRETS.items() if secret in stored or secret in columns] == []
    assert placed == len(ledger.events()) > 700
    assert stored.count(MARKER) > placed / 2


def test_prose_is_kept_only_in_listed_fields() -> None:
    redactor = Redactor(bytes(32))
    kept = redactor.payload(
        {
            "note": "a person wrote this",
            "message": "the device is lost",
            "device": "cpu-0",
            "record": {"toolchain": "gcc 12.2 (Debian)"},
            "question": "where is my parcel",
            "arguments": {"account": 4821},
            "prompt_tokens": 12,
            "prompt": "sha256:" + "a" * 64,
        }
    )
    assert kept.hidden
    assert kept.value == {
        "note": MARKER,
        "message": "the device is lost",
        "device": "cpu-0",
        "record": {"toolchain": "gcc 12.2 (Debian)"},
        "question": MARKER,
        "arguments": MARKER,
        "prompt_tokens": 12,
        "prompt": "sha256:" + "a" * 64,
    }


@pytest.mark.parametrize(
    "text",
    [
        "sha256:" + "4" * 64,
        "evidence://sha256/" + "1" * 64,
        "req_01920394857612345678901234567890",
        "2026-11-23T18:42:16.428Z",
        "torch 2.13.0+cpu, 1234567890123 bytes",
        "x86_64-unknown-linux-gnu",
        "max_tokens=64 first_token=3",
        "Intel(R) Xeon(R) Platinum 8488C",
        "4111111111111112",
        "file:///some/path:12",
        "int64[B,T] -> float32[B,T,V]",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redactor(bytes(32)).text(text) == text


def test_a_recorded_plan_is_left_alone() -> None:
    plan = '[7,[["decode",4111111111111111,"a@b.cc"]]]'
    assert Redactor(bytes(32)).payload({"plan": plan}).value == {"plan": plan}


class Colour(enum.Enum):
    """An enumeration."""

    RED = "red"


@dataclass
class Point:
    """A record that hides a secret."""

    x: int
    note: str


def test_other_values_become_plain_before_they_are_looked_at() -> None:
    import numpy

    kept = Redactor(bytes(32)).payload(
        {
            "colour": Colour.RED,
            "record": Point(1, CANARIES["AWS"]),
            "path": Path("a/b"),
            "count": numpy.int64(3),
            "share": numpy.float32(0.5),
            "nan": float("nan"),
            "set": {1},
            3: 4,
        }
    )
    assert kept.value == {
        "colour": "red",
        "record": {"x": 1, "note": MARKER},
        "path": "a/b",
        "count": 3,
        "share": 0.5,
        "nan": "nan",
        "set": [1],
        "3": 4,
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3),
)


@given(st.dictionaries(st.text(max_size=6), json_values, max_size=4))
def test_redaction_is_idempotent(payload: dict[str, Any]) -> None:
    redactor = Redactor(bytes(32))
    once = redactor.payload(payload).value
    assert redactor.payload(once).value == once


def test_pseudonyms_are_keyed_stable_and_idempotent(tmp_path: Path) -> None:
    one, other = Redactor(bytes(32)), Redactor(b"1" * 32)
    name = one.pseudonym("tenant", "acme")
    assert name == one.pseudonym("tenant", "acme") == one.pseudonym("tenant", name)
    assert name not in (other.pseudonym("tenant", "acme"), one.pseudonym("actor", "acme"))
    with Recorder(tmp_path / "ledger", run_id="r", component="c") as recorder:
        recorder.commit("x", tenant_ref="acme", actor_ref="acme", idempotency_ref="key-1")
        assert recorder.tenant_pseudonym("acme").startswith("tenant_")
        expected = recorder.tenant_pseudonym("acme")
    Ledger(tmp_path / "ledger").drain()
    [event] = Ledger(tmp_path / "ledger").events()
    assert event.tenant_ref == expected
    assert "key-1" not in str(event)
    assert "acme" not in str(event)


def test_every_text_column_is_looked_at() -> None:
    """A new text column must be listed, or have a closed domain, or be filled by the recorder."""
    closed = {"durability", "track", "stage", "span_kind", "status", "failure_class", "retry_decision", "side_effect"}
    own = {"event_id", "outbox", "effect_origin", "redaction_status", "redaction_policy", "payload"}
    own |= {column for _, column in PSEUDONYMS}
    numbers = {name for name, kind in TraceEvent.__annotations__.items() if "Int64" in str(kind) or str(kind) == "int"}
    assert set(TraceEvent.__struct_fields__) - closed - own - numbers == set(TEXT_COLUMNS)
    assert "arguments" in WITHHELD


def test_the_outbox_file_is_private(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="r", component="c") as recorder:
        recorder.commit("x")
        files = list((tmp_path / "ledger" / "outbox").iterdir()) + list((tmp_path / "ledger" / "keys").iterdir())
        assert {file.stat().st_mode & 0o077 for file in files} == {0}
        assert sqlite3.sqlite_version_info >= (3, 37)

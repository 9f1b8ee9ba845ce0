"""The single controls: limits, route health, masking, queries, schemas, prices."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.models.reference.prompt import output_schema
from runtime.serve import masking
from runtime.serve.context import query_of
from runtime.serve.contracts import TOOL_CONTRACTS
from runtime.serve.deployment import Deployment, DeploymentDocument
from runtime.serve.health import FAILURES_TO_OPEN, OPEN_US, RouteHealth
from runtime.serve.limits import Limits
from runtime.serve.pinning import support_schema
from runtime.serve.schemas import violations
from tests.runtime.serve.desk import Desk, envelope, questions


def tight(deployment: Deployment, **limits: int) -> DeploymentDocument:
    document = deployment.document.to_document()
    for tenant in document["tenants"]:
        tenant |= limits
    return DeploymentDocument.from_document(document)


def test_the_rate_is_a_function_of_arrivals_alone(deployment: Deployment, tmp_path: Path) -> None:
    document = tight(deployment, requests_per_minute=60, burst=2)
    arrivals = [0, 10, 20, 1_000_010, 1_000_020, 5_000_000, 5_000_001, 5_000_002]
    decisions: list[list[str | None]] = []
    for name in ("one", "two"):
        limits = Limits(document, tmp_path / name)
        decisions.append([limits.take("aurora", at, None, "x", "req")["refused"] for at in arrivals])
        limits.close()
    assert decisions[0] == decisions[1]
    assert decisions[0] == [None, None, "tenant_rate", None, "tenant_rate", None, None, "tenant_rate"]


def test_one_tenants_load_leaves_anothers_room_alone(deployment: Deployment, tmp_path: Path) -> None:
    limits = Limits(tight(deployment, max_concurrent=1), tmp_path / "limits")
    assert limits.take("aurora", 0, None, "x", "req")["refused"] is None
    assert limits.take("aurora", 1, None, "x", "req")["refused"] == "tenant_concurrency"
    assert limits.take("borealis", 1, None, "x", "req")["refused"] is None
    limits.release("aurora")
    assert limits.take("aurora", 2, None, "x", "req")["refused"] is None
    limits.close()


def test_idempotency_keys_outlive_the_process(deployment: Deployment, tmp_path: Path) -> None:
    first = Limits(deployment.document, tmp_path / "limits")
    first.take("aurora", 0, "key", "digest", "req_1")
    first.close()
    second = Limits(deployment.document, tmp_path / "limits")
    repeated = second.take("aurora", 1, "key", "digest", "req_2")
    assert (repeated["refused"], repeated["earlier_request"]) == ("duplicate_request", "req_1")
    assert second.take("aurora", 1, "key", "other", "req_2")["refused"] == "idempotency_conflict"
    second.close()


def test_a_breaker_opens_half_opens_and_closes() -> None:
    now, told = [0], list[str]()
    health = RouteHealth(
        now_us=lambda: now[0], loaded=lambda route: "p", tell=lambda route, before, after: told.append(after)
    )
    for _ in range(FAILURES_TO_OPEN):
        health.enter("r")
        health.leave("r", False)
    assert health.look("r")["breaker"] == "open"
    now[0] += OPEN_US
    assert health.look("r")["breaker"] == "half_open"
    health.enter("r")
    health.leave("r", True)
    assert health.look("r") == {"loaded": True, "package": "p", "breaker": "closed", "in_flight": 0}
    assert told == ["open", "half_open", "closed"]


@given(st.text(max_size=200))
def test_every_query_is_quoted_words_only(question: str) -> None:
    query = query_of(question)
    for term in query.split(" OR ") if query else []:
        assert term[0] == term[-1] == '"'
        assert term[1:-1].isalnum()


@given(st.text(max_size=200))
def test_masking_and_normalizing_twice_is_once(text: str) -> None:
    once = masking.mask(masking.normalize(text))[0]
    assert masking.mask(masking.normalize(once))[0] == once


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefghijklmnop1234", "ghp_abcdefghijklmnopqrstuvwx", "AKIAABCDEFGHIJKLMNOP", "someone@example.com",
        "Bearer abcdefgh.ijklmnop", "password: hunter22", "4111 1111 1111 1111", "rlk_abcdefghijklmnopqrstuv",
        "eyJhbGciOiJI.eyJzdWIiOiIx.abc", "xoxb-1234567890-abcdef", "GB29 NWBK 6016 1331 9268 19",
    ],
)  # fmt: skip
def test_secrets_in_a_question_reach_neither_model_nor_record(desk: Desk, secret: str) -> None:
    question = questions("policy")[0]
    asked = envelope(question).model_dump(mode="json")
    asked["task"]["question"] = f"{question.text} {secret}"
    desk.service.answer = lambda request, text: question.expected[0]
    outcome = desk.ask(type(envelope(question)).model_validate(asked, strict=False))
    assert outcome.failure is None
    assert all(secret.encode() not in blob for blob in desk.recorder.blobs.values())


def test_the_grammar_offers_permitted_tools_and_provided_sources_only() -> None:
    lookup = {"tool": "lookup_account", "arguments": {"account": "0001"}}
    answer = {"answer": "x", "sources": ["P-0001"]}
    assert support_schema(frozenset(TOOL_CONTRACTS)) == output_schema()
    only = support_schema(frozenset(), ("P-0001",))
    assert violations(only, answer) == []
    assert violations(only, lookup) and violations(only, {"answer": "x", "sources": ["P-0002"]})


def test_tool_contracts_are_what_the_grammar_lets_the_model_write() -> None:
    for option in output_schema()["anyOf"]:
        properties = option["properties"]
        if "tool" in properties:
            assert properties["arguments"] == TOOL_CONTRACTS[properties["tool"]["const"]].input_schema


def test_a_schema_error_never_quotes_the_value() -> None:
    (problem,) = violations(TOOL_CONTRACTS["lookup_account"].input_schema, {"account": "top-secret"})
    assert "top-secret" not in problem

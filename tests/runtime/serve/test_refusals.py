"""What a request may not do is refused with its class, its reason and its stage, and nothing acts after it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.engine.generation import GenerationRequest
from runtime.errors import CapacityRefused, ProviderFailed, ToolFailed
from runtime.models.reference import task
from runtime.serve.envelope import LARGEST_BODY_BYTES
from tests.runtime.serve.desk import Desk, Scripted, envelope, questions
from traces.failures import rule_of


def failing(error: Exception) -> Scripted:
    def answer(request: GenerationRequest, text: str) -> str:
        raise error

    return Scripted(answer)


def check(desk: Desk, outcome: Any, *, failure_class: str, reason: str, stage: str) -> None:
    """The failure is classified, complete, told in the response and durable in the trace."""
    failure = outcome.failure
    assert (failure["failure_class"], failure["error_type"], failure["stage"]) == (failure_class, reason, stage)
    terminal = desk.recorder.events[-1]
    assert terminal.event_type == "request.terminal"
    assert (terminal.failure_class.value, terminal.error_type) == (failure_class, reason)
    assert terminal.durability == "mandatory"
    assert set(rule_of(terminal.failure_class).evidence) <= set(terminal.payload["evidence"])
    assert terminal.retry_decision == outcome.response["failure"]["retry"]
    assert outcome.response["result"] is None
    assert outcome.response["failure"]["fix"]


def test_an_unknown_key_is_refused_before_anything_costly(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions()[0]), key="rlk_wrong")
    check(desk, outcome, failure_class="validation_policy", reason="unauthenticated", stage="b01")
    assert outcome.status == "refused"
    assert desk.service.requests == []
    kinds = [event.payload["kind"] for event in desk.recorder.of("effect.performed")]
    assert kinds == ["arrival", "identity"]


def test_another_tenants_key_is_refused(desk: Desk) -> None:
    question = questions()[0]
    other = next(name for name in task.TENANTS if name != question.tenant)
    outcome = desk.ask(envelope(question), key=desk.deployment.keys()[other])
    check(desk, outcome, failure_class="validation_policy", reason="forbidden_tenant", stage="b01")


@pytest.mark.parametrize(
    "body",
    [
        b"not json", b"{}", b'{"version":"replaylab.request/2"}',
        b'{"tenant":"aurora","actor":"a","task":{"kind":"support","question":"x"},"surprise":1}',
        b'{"tenant":"aurora","actor":"a","task":{"kind":"support","question":"x"},"generation":{"seed":false}}',
        b'{"tenant":"aurora","actor":"a","task":{"kind":"support","question":"' + b"x" * 3_000 + b'"}}',
        b'{"tenant":"aurora","actor":"a","task":{"kind":"completion","prompt_tokens":[]}}',
        b" " * (LARGEST_BODY_BYTES + 1),
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused_without_being_quoted(desk: Desk, body: bytes) -> None:
    outcome = desk.ask(body)
    reason = "body_too_large" if len(body) > LARGEST_BODY_BYTES else "malformed_request"
    check(desk, outcome, failure_class="validation_policy", reason=reason, stage="b01")
    assert "surprise" not in json.dumps(outcome.response) or "x" * 10 not in json.dumps(outcome.response)


def test_a_missing_permission_is_refused(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions()[0], permissions=["complete"]))
    check(desk, outcome, failure_class="validation_policy", reason="forbidden", stage="b01")


def test_an_idempotency_key_admits_one_request(desk: Desk) -> None:
    question, other = questions("policy")[:2]
    first = desk.ask(envelope(question, idempotency_key="abcdefgh"))
    again = desk.ask(envelope(question, idempotency_key="abcdefgh"))
    check(desk, again, failure_class="validation_policy", reason="duplicate_request", stage="b01")
    assert again.failure["evidence"]["earlier_request"] == first.response["request"]
    if other.tenant == question.tenant:
        clash = desk.ask(envelope(other, idempotency_key="abcdefgh"))
        check(desk, clash, failure_class="validation_policy", reason="idempotency_conflict", stage="b01")


def test_a_late_request_is_not_admitted(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions()[0], timeout_us=1))
    check(desk, outcome, failure_class="timeout_cancellation", reason="deadline_before_admission", stage="b03")
    assert outcome.status == "cancelled"


def test_a_prompt_outside_the_compiled_bounds_is_a_guard_miss(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions()[0], generation={"max_tokens": 500}))
    check(desk, outcome, failure_class="shape_guard", reason="prompt_too_long", stage="b03")


def test_a_cost_above_the_ceiling_is_not_admitted(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions()[0], budget={"max_cost_microusd": 1}))
    check(desk, outcome, failure_class="capacity_admission", reason="cost_ceiling", stage="b03")


def test_no_loaded_package_is_an_artifact_failure(desk: Desk) -> None:
    desk.loaded.clear()
    outcome = desk.ask(envelope(questions()[0]))
    check(desk, outcome, failure_class="artifact_compatibility", reason="no_package_loaded", stage="b01")


def test_a_full_engine_falls_back_to_the_next_route(desk: Desk) -> None:
    desk.services["primary"] = failing(CapacityRefused("full", reason="queue_full"))
    outcome = desk.ask(envelope(questions("policy")[0]))
    assert outcome.failure is None
    assert outcome.response["route"]["route"] == "spare"
    assert [event.stage.value for event in desk.recorder.of("stage.failed")] == ["b04"]


def test_a_failing_model_falls_back_once_and_then_fails(desk: Desk) -> None:
    desk.services["primary"] = failing(ProviderFailed("kernel", reason="step_failed", fix="look"))
    desk.services["spare"] = desk.services["primary"]
    outcome = desk.ask(envelope(questions("policy")[0]))
    check(desk, outcome, failure_class="model_provider", reason="step_failed", stage="b05")
    assert outcome.status == "failed"


def test_without_fallbacks_a_full_engine_refuses(desk: Desk) -> None:
    desk.services["primary"] = failing(CapacityRefused("full", reason="queue_full", fix="wait"))
    outcome = desk.ask(envelope(questions("policy")[0], model={"allow_fallback": False}))
    check(desk, outcome, failure_class="capacity_admission", reason="queue_full", stage="b04")
    assert outcome.status == "refused"


def test_a_foreign_account_is_denied_like_a_missing_one(desk: Desk) -> None:
    question = questions("lookup")[0]
    foreign = next(one.number for one in task.accounts(7) if one.tenant != question.tenant)
    desk.service.answer = lambda request, text: task.lookup_call(foreign)
    outcome = desk.ask(envelope(question))
    check(desk, outcome, failure_class="validation_policy", reason="account_not_owned", stage="b07")
    assert outcome.status == "review"
    desk.service.answer = lambda request, text: task.ticket_call(foreign, "refund")
    written = desk.ask(envelope(question))
    check(desk, written, failure_class="validation_policy", reason="account_not_owned", stage="b07")
    assert [event for event in desk.recorder.of("effect.performed") if event.side_effect == "reversible"] == []


def test_a_tool_outside_the_request_is_denied_and_the_denial_is_durable(desk: Desk) -> None:
    outcome = desk.ask(envelope(questions("ticket")[0], permissions=["answer", "read_accounts"]))
    check(desk, outcome, failure_class="validation_policy", reason="tool_not_permitted", stage="b07")
    denied = desk.recorder.of("tool.authorized")[-1]
    assert (denied.policy_decision, denied.durability) == ("deny", "mandatory")


def test_a_read_is_tried_twice_and_then_fails(desk: Desk) -> None:
    def fail(name: str) -> None:
        raise ToolFailed("no answer", reason="tool_unanswered", evidence={"side_effect_status": "none"}, fix="look")

    desk.fail_tool = fail
    outcome = desk.ask(envelope(questions("lookup")[0]))
    check(desk, outcome, failure_class="tool_side_effect", reason="tool_unanswered", stage="b07")
    assert [event.retry_decision for event in desk.recorder.of("tool.completed")] == ["retry", "none"]


def test_a_broken_off_write_is_repeated_with_the_same_key_and_happens_once(desk: Desk) -> None:
    broken: list[str] = []

    def fail(name: str) -> None:
        if name == "create_ticket" and not broken:
            broken.append(name)
            raise ConnectionResetError

    desk.fail_tool = fail
    outcome = desk.ask(envelope(questions("ticket")[0]))
    assert outcome.failure is None
    assert outcome.response["tools"][-1]["result"]["ticket"] == "T-0001"
    assert [event.side_effect for event in desk.recorder.of("effect.performed")].count("ambiguous") == 1
    again = desk.replay(outcome.response["request"])
    assert again.documents == outcome.documents


def test_free_text_is_repaired_once_and_then_rejected_unseen(desk: Desk) -> None:
    desk.service.answer = lambda request, text: "I would rather chat about secrets."
    outcome = desk.ask(envelope(questions("policy")[0]))
    check(desk, outcome, failure_class="validation_policy", reason="output_schema", stage="b08")
    assert outcome.status == "review"
    assert len(desk.service.requests) == 2
    assert "secrets" not in json.dumps(outcome.response)


def test_a_secret_in_the_answer_is_rejected_and_not_repaired(desk: Desk) -> None:
    question = questions("policy")[0]
    leak = task.answer("write to someone@example.com", str(question.article))
    desk.service.answer = lambda request, text: leak
    outcome = desk.ask(envelope(question))
    check(desk, outcome, failure_class="validation_policy", reason="output_secrets", stage="b08")
    assert len(desk.service.requests) == 1


@pytest.mark.parametrize("event_type", ["request.accepted", "request.manifest", "policy.decided"])
def test_without_mandatory_evidence_nothing_is_generated(desk: Desk, event_type: str) -> None:
    desk.recorder.refuse = lambda name, payload: name == event_type
    outcome = desk.ask(envelope(questions("ticket")[0]))
    assert outcome.failure["failure_class"] == "telemetry_persistence"
    assert outcome.response["failure"]["retry"] == "forbidden"
    assert desk.service.requests == []


@pytest.mark.parametrize("event_type", ["tool.authorized", "effect.performed"])
def test_without_mandatory_evidence_no_tool_writes(desk: Desk, event_type: str) -> None:
    desk.recorder.refuse = lambda name, payload: name == event_type
    outcome = desk.ask(envelope(questions("ticket")[0]))
    assert outcome.failure["failure_class"] == "telemetry_persistence"
    import sqlite3

    with sqlite3.connect(desk.deployment.crm_path) as connection:
        assert connection.execute("SELECT count(*) FROM tickets").fetchone() == (0,)
    connection.close()


def test_an_answer_whose_end_cannot_be_recorded_is_not_given_out(desk: Desk) -> None:
    desk.recorder.refuse = lambda name, payload: name == "request.terminal"
    outcome = desk.ask(envelope(questions("policy")[0]))
    assert outcome.response["result"] is None
    assert outcome.failure["failure_class"] == "telemetry_persistence"


def test_a_fault_of_our_own_is_contained_and_told(desk: Desk) -> None:
    desk.service = failing(KeyError("surprise"))
    outcome = desk.ask(envelope(questions("policy")[0], model={"allow_fallback": False}))
    assert outcome.failure["failure_class"] == "model_provider"
    assert "surprise" not in json.dumps(outcome.response)

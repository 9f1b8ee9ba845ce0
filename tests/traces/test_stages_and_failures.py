"""The stages and failure classes are the specification's, and a retry is a decision."""

from __future__ import annotations

import pytest

from traces.failures import (
    FAILURE_RULES,
    ClassifiedError,
    FailureClass,
    TelemetryPersistenceError,
    decide_retry,
    rule_of,
)
from traces.stages import PREPARATION_STAGES, REQUEST_STAGES, Stage, describe


def test_nine_and_ten_stages_in_order() -> None:
    assert [entry.stage.value for entry in PREPARATION_STAGES] == [f"a{number:02d}" for number in range(1, 10)]
    assert [entry.stage.value for entry in REQUEST_STAGES] == [f"b{number:02d}" for number in range(1, 11)]
    assert {describe(stage).stage for stage in Stage} == set(Stage)


def test_a_stage_answers_to_word_and_code() -> None:
    assert Stage.named("prefill") is Stage.PREFILL is Stage.named("b05")
    assert (Stage.PREFILL.track, Stage.PREFILL.number, Stage.PREFILL.word) == ("B", 5, "prefill")
    with pytest.raises(ValueError, match="no stage is called"):
        Stage.named("unknown")


def test_every_class_has_one_rule_with_evidence() -> None:
    assert [rule.failure_class for rule in FAILURE_RULES] == list(FailureClass)
    assert all(len(rule.evidence) >= 5 and rule.signal and rule.containment for rule in FAILURE_RULES)


def test_an_error_carries_complete_evidence() -> None:
    error = ClassifiedError("No room.", failure_class=FailureClass.CAPACITY_ADMISSION, evidence={"queue_depth": 9})
    payload = error.to_payload()
    assert set(payload["evidence"]) == set(rule_of(FailureClass.CAPACITY_ADMISSION).evidence)
    assert payload["evidence"]["queue_depth"] == 9
    assert TelemetryPersistenceError("x").failure_class is FailureClass.TELEMETRY_PERSISTENCE


@pytest.mark.parametrize(
    ("failure_class", "facts", "action"),
    [
        ("artifact_compatibility", {}, "none"),
        ("artifact_compatibility", {"fallback": True}, "fallback"),
        ("shape_guard", {}, "none"),
        ("shape_guard", {"fallback": True}, "fallback"),
        ("capacity_admission", {"idempotent": True}, "retry"),
        ("capacity_admission", {"idempotent": False}, "none"),
        ("capacity_admission", {"idempotent": True, "deadline_us": 10, "now_us": 5, "expected_us": 100}, "none"),
        ("capacity_admission", {"fallback": True}, "fallback"),
        ("timeout_cancellation", {"cancelled": True, "continuation": True}, "none"),
        ("timeout_cancellation", {"continuation": True}, "resume"),
        ("timeout_cancellation", {"side_effect": "irreversible", "continuation": True}, "escalate"),
        ("model_provider", {"transient": True}, "retry"),
        ("model_provider", {"transient": True, "attempt": 3}, "none"),
        ("model_provider", {"transient": True, "side_effect": "ambiguous"}, "escalate"),
        ("model_provider", {"fallback": True}, "fallback"),
        ("tool_side_effect", {"side_effect": "read"}, "retry"),
        ("tool_side_effect", {"side_effect": "ambiguous"}, "forbidden"),
        ("tool_side_effect", {"side_effect": "irreversible", "idempotent": True}, "retry"),
        ("tool_side_effect", {"side_effect": "reversible", "verified_absent": True}, "retry"),
        ("validation_policy", {"repairable": True}, "repair"),
        ("validation_policy", {"repairable": True, "attempt": 3}, "escalate"),
        ("telemetry_persistence", {}, "forbidden"),
        ("telemetry_persistence", {"mandatory": False}, "retry"),
    ],
)
def test_retry_follows_the_class(failure_class: str, facts: dict[str, object], action: str) -> None:
    decision = decide_retry(FailureClass(failure_class), **{"attempt": 1, **facts})
    assert decision.action == action
    assert decision.reason


def test_the_wait_is_the_callers_draw() -> None:
    first = decide_retry(FailureClass.MODEL_PROVIDER, attempt=2, transient=True, jitter=0.25)
    assert (first.delay_us, first.next_attempt) == (25_000, 3)

"""Failures: class, retry decision, containment and evidence of a replay against its original."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eval.failures import broken_containment, compare_failures, missing_evidence, unanswered_evidence
from eval.records import FailureRecord, GenerationRecord, RequestRecord, StageRecord, TokenRecord, ToolCallRecord
from traces.failures import FAILURE_RULES, FailureClass


def _failed(kind: FailureClass, *, status: str = "error", stage: str = "b06", **evidence: Any) -> RequestRecord:
    required = next(rule.evidence for rule in FAILURE_RULES if rule.failure_class is kind)
    failure = FailureRecord(kind.value, stage, "none", evidence=dict.fromkeys(required, "known") | evidence)
    stages = (StageRecord("b01", "ok"), StageRecord(stage, "error"))
    return RequestRecord("req_1", stages=stages, failure=failure, terminal_status=status)


@pytest.mark.parametrize("kind", FailureClass)
def test_a_contained_failure_with_all_evidence_is_sound(kind: FailureClass) -> None:
    record = _failed(kind)
    found = compare_failures(record, record)
    assert found.same and found.sound


@pytest.mark.parametrize("kind", FailureClass)
def test_every_piece_of_required_evidence_is_missed(kind: FailureClass) -> None:
    failure = FailureRecord(kind.value)
    required = next(rule.evidence for rule in FAILURE_RULES if rule.failure_class is kind)
    assert missing_evidence(failure) == required
    assert missing_evidence(replace(failure, evidence=dict.fromkeys(required))) == ()
    assert unanswered_evidence(replace(failure, evidence=dict.fromkeys(required))) == required
    assert missing_evidence(None) == unanswered_evidence(None) == ()


def test_each_way_to_differ_is_named() -> None:
    original = _failed(FailureClass.CAPACITY_ADMISSION, stage="b03")
    assert original.failure is not None
    other = replace(original, failure=replace(original.failure, retry_decision="retry"))
    found = compare_failures(original, other)
    assert (found.same_class, found.same_stage, found.same_retry_decision, found.same) == (True, True, False, False)
    gone = compare_failures(original, RequestRecord("req_1", terminal_status="ok"))
    assert (gone.same_class, gone.same_stage, gone.same_retry_decision) == (False, False, False)
    nowhere = replace(original, failure=FailureRecord("capacity_admission"))
    assert not compare_failures(nowhere, RequestRecord("req_1", terminal_status="ok")).same_stage
    fine = RequestRecord("req_1", terminal_status="ok")
    assert compare_failures(fine, fine).same and compare_failures(fine, fine).sound


def _after(record: RequestRecord, *codes: str) -> RequestRecord:
    return replace(record, stages=(*record.stages, *(StageRecord(code, "ok") for code in codes)))


WRITE = ToolCallRecord("create_ticket", "arguments", None, "allow", "reversible")
GENERATED = (GenerationRecord(tokens=(TokenRecord(1),)),)

BROKEN = [
    (_failed(FailureClass.MODEL_PROVIDER, status="ok"), "terminal status says ok"),
    (replace(_failed(FailureClass.SHAPE_GUARD), terminal_status=None), "no terminal status"),
    (replace(_failed(FailureClass.CAPACITY_ADMISSION, stage="b03"), generations=GENERATED), "not admitted"),
    (replace(_failed(FailureClass.ARTIFACT_COMPATIBILITY, stage="b03"), generations=GENERATED), "not admitted"),
    (_failed(FailureClass.TIMEOUT_CANCELLATION, released_resources=None), "released"),
    (_failed(FailureClass.TIMEOUT_CANCELLATION, status="review"), "incomplete"),
    (_failed(FailureClass.VALIDATION_POLICY, status="partial"), "rejected content"),
    (
        replace(_failed(FailureClass.TOOL_SIDE_EFFECT, idempotency_ref=None), tool_calls=(WRITE, WRITE)),
        "called again",
    ),
    (_after(_failed(FailureClass.TELEMETRY_PERSISTENCE), "b07"), "mandatory evidence"),
]


@pytest.mark.parametrize(("record", "said"), BROKEN)
def test_broken_containment_is_seen(record: RequestRecord, said: str) -> None:
    found = broken_containment(record)
    assert any(said in sentence for sentence in found), found
    assert not compare_failures(record, record).sound


def test_what_is_allowed_is_not_blamed() -> None:
    keyed = _failed(FailureClass.TOOL_SIDE_EFFECT, idempotency_ref="key")
    assert broken_containment(replace(keyed, tool_calls=(WRITE, WRITE))) == ()
    optional = _failed(FailureClass.TELEMETRY_PERSISTENCE, durability="optional")
    assert broken_containment(_after(optional, "b07")) == ()
    assert broken_containment(_after(_failed(FailureClass.TELEMETRY_PERSISTENCE), "b10")) == ()
    assert broken_containment(RequestRecord("req_1")) == ()


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match="bad luck"):
        missing_evidence(FailureRecord("bad luck"))

"""Which kind of failure is this, may it be retried, and what evidence must be kept?

The eight classes with their signal, retry rule, containment and required evidence are the specification's table
"Failure handling by stage and retry safety".  ``decide_retry`` turns the rule into a decision; a retry in Replaylab is
always such a decision, recorded as a value, never a loop around a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from traces.stages import phase_of

RetryAction = Literal["none", "retry", "fallback", "resume", "repair", "escalate", "forbidden"]
SideEffect = Literal["none", "read", "reversible", "irreversible", "ambiguous"]


class FailureClass(StrEnum):
    """The eight failure classes, in the specification's order."""

    ARTIFACT_COMPATIBILITY = "artifact_compatibility"
    SHAPE_GUARD = "shape_guard"
    CAPACITY_ADMISSION = "capacity_admission"
    TIMEOUT_CANCELLATION = "timeout_cancellation"
    MODEL_PROVIDER = "model_provider"
    TOOL_SIDE_EFFECT = "tool_side_effect"
    VALIDATION_POLICY = "validation_policy"
    TELEMETRY_PERSISTENCE = "telemetry_persistence"


@dataclass(frozen=True)
class FailureRule:
    """One row of the specification's table."""

    failure_class: FailureClass
    title: str
    signal: str
    retry_rule: str
    containment: str
    evidence: tuple[str, ...]
    """Keys that a failure of this class must carry in its evidence (null is an answer, absence is not)."""


FAILURE_RULES: tuple[FailureRule, ...] = (
    FailureRule(
        FailureClass.ARTIFACT_COMPATIBILITY,
        "Artifact or compatibility failure",
        "Model cannot be parsed, validated, loaded, or matched to the runtime and device.",
        "Do not retry unchanged input. Select a compatible artifact or runtime version.",
        "Keep the previous known-good artifact active; fail deployment readiness rather than live requests.",
        (
            "artifact_digest",
            "model_version",
            "runtime_version",
            "operator_details",
            "provider_log",
            "validation_output",
        ),
    ),
    FailureRule(
        FailureClass.SHAPE_GUARD,
        "Shape, guard, or specialization miss",
        "Input violates compiled assumptions or triggers an unavailable specialization.",
        "Retry only through an explicit dynamic path, recompilation path, or compatible profile.",
        "Bound compilation concurrency and cache growth; reject hostile or unbounded shape variation.",
        ("input_signature", "guard", "cache_key", "compile_event", "selected_fallback"),
    ),
    FailureRule(
        FailureClass.CAPACITY_ADMISSION,
        "Capacity or admission failure",
        "Queue, memory, concurrency, device, or provider capacity cannot meet the request objective.",
        "Retry with jitter only when the deadline and idempotency policy permit it; otherwise degrade or fail fast.",
        "Admission limits, circuit breakers, backpressure, queue caps, load shedding, and alternate routes.",
        ("queue_depth", "reservation_failure", "memory_pressure", "provider_health", "deadline_us", "route_decision"),
    ),
    FailureRule(
        FailureClass.TIMEOUT_CANCELLATION,
        "Timeout, cancellation, or partial stream",
        "The request exceeds its deadline, the caller cancels, or a stream terminates before completion.",
        "Retry from a documented continuation point when supported; do not silently duplicate completed side effects.",
        "Propagate cancellation, release cache and reservations, terminate downstream work, and mark the response "
        "incomplete.",
        ("deadline_us", "cancellation_origin", "last_completed_span", "emitted_output_count", "released_resources"),
    ),
    FailureRule(
        FailureClass.MODEL_PROVIDER,
        "Model or provider execution failure",
        "Kernel, backend, network provider, or model process returns an error or unhealthy result.",
        "Use a bounded retry or fallback only for classified transient failures and compatible output contracts.",
        "Circuit-break the failing route, isolate the instance, and avoid cross-tenant state leakage during recovery.",
        ("provider", "model", "attempt", "error_class", "device_state", "fallback", "output_completeness"),
    ),
    FailureRule(
        FailureClass.TOOL_SIDE_EFFECT,
        "Tool failure or ambiguous side effect",
        "A tool times out, returns an invalid result, or may have committed a write without a definitive response.",
        "Retry only with a stable idempotency key or a verified read-before-retry strategy.",
        "Suspend the workflow, reconcile external state, require approval when ambiguity affects money, access, or "
        "records.",
        (
            "tool_version",
            "arguments_ref",
            "idempotency_ref",
            "authorization_decision",
            "attempt_history",
            "side_effect_status",
        ),
    ),
    FailureRule(
        FailureClass.VALIDATION_POLICY,
        "Validation or policy rejection",
        "Output violates schema, evidence, safety, permission, or business rules.",
        "Use a bounded repair path only when the violation is repairable and the policy permits another model call.",
        "Do not expose or execute rejected content; route to a safer fallback or human review.",
        ("validator_version", "policy_version", "failed_rule", "redacted_sample", "repair_attempts", "disposition"),
    ),
    FailureRule(
        FailureClass.TELEMETRY_PERSISTENCE,
        "Telemetry or memory persistence failure",
        "Required audit, trace, evaluation, or memory write cannot be committed.",
        "Retry according to durability requirements; distinguish optional analytics from mandatory audit evidence.",
        "Fail closed for mandatory audit paths, queue durable outbox events, and avoid acknowledging memory that was "
        "not stored.",
        ("record_type", "storage_target", "durability", "retry_state", "redaction_state", "user_warning"),
    ),
)


def rule_of(failure_class: FailureClass) -> FailureRule:
    """Return the specification's row for a class."""
    return next(rule for rule in FAILURE_RULES if rule.failure_class is failure_class)


class ClassifiedError(Exception):
    """Base of every error in the rooms above: what happened, where, in which class, and what to do about it.

    Args:
        message: what happened, one sentence.
        failure_class: one of the eight classes.
        stage: the stage code where it happened, if it happened in one.
        evidence: the facts that the class demands (see ``FailureRule.evidence``); missing keys become null.
        fix: what the reader can do, one sentence.
        error_type: a short stable name for grouping; the class name by default.
    """

    def __init__(
        self,
        message: str,
        *,
        failure_class: FailureClass,
        stage: str | None = None,
        evidence: Mapping[str, Any] | None = None,
        fix: str | None = None,
        error_type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.failure_class = FailureClass(failure_class)
        self.stage = stage
        self.evidence: dict[str, Any] = dict(evidence or {})
        self.fix = fix
        self.error_type = error_type or type(self).__name__

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message} Fix: {self.fix}"

    def complete_evidence(self) -> dict[str, Any]:
        """Return the evidence with every key that the class demands present (null where nothing is known)."""
        demanded: dict[str, Any] = dict.fromkeys(rule_of(self.failure_class).evidence)
        return {**demanded, **self.evidence}

    def to_payload(self) -> dict[str, Any]:
        """Return the error as an event payload: message, class, type, phase, fix and complete evidence."""
        return {
            "message": self.message,
            "failure_class": self.failure_class.value,
            "error_type": self.error_type,
            "phase": phase_of(self.stage),
            "fix": self.fix,
            "evidence": self.complete_evidence(),
        }


class TelemetryPersistenceError(ClassifiedError):
    """A mandatory record could not be made durable: whoever asked for it must not act."""

    def __init__(
        self,
        message: str,
        *,
        stage: str | None = None,
        evidence: Mapping[str, Any] | None = None,
        fix: str | None = None,
        error_type: str | None = None,
    ) -> None:
        super().__init__(
            message,
            failure_class=FailureClass.TELEMETRY_PERSISTENCE,
            stage=stage,
            evidence=evidence,
            fix=fix,
            error_type=error_type,
        )


class EventRefused(ClassifiedError):
    """An event has an unknown column or a value outside its domain; nothing was recorded."""

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message, failure_class=FailureClass.TELEMETRY_PERSISTENCE, fix=fix)


class EvidenceError(ClassifiedError):
    """Stored evidence is missing, or its bytes no longer have the digest that names them."""

    def __init__(self, message: str, *, evidence: Mapping[str, Any] | None = None, fix: str | None = None) -> None:
        super().__init__(message, failure_class=FailureClass.TELEMETRY_PERSISTENCE, evidence=evidence, fix=fix)


@dataclass(frozen=True)
class RetryDecision:
    """What to do after a failed attempt: a value that is recorded with the attempt."""

    action: RetryAction
    reason: str
    delay_us: int = 0
    """How long to wait first; 0 unless the action is ``retry``."""
    next_attempt: int | None = None
    """Number of the attempt that follows; None when none follows."""


@dataclass(frozen=True)
class RetrySituation:
    """What the rule needs to know about a failed attempt.  The defaults are the careful answers."""

    attempt: int
    """The attempt that failed, from 1."""
    max_attempts: int = 3
    now_us: int | None = None
    deadline_us: int | None = None
    """Epoch time in microseconds; None means there is no deadline."""
    expected_us: int = 0
    """How long another attempt takes; it must fit before the deadline."""
    idempotent: bool = False
    """Doing it twice is the same as doing it once, or a stable idempotency key says so."""
    side_effect: SideEffect = "none"
    """What the attempt may already have done to the world."""
    verified_absent: bool = False
    """A read after the failure proved that the side effect did not happen."""
    transient: bool = False
    """The failure was classified as one that may pass by itself."""
    cancelled: bool = False
    """The caller no longer wants the answer."""
    fallback: bool = False
    """Another route, package or shape with a compatible contract stands ready."""
    continuation: bool = False
    """A documented continuation point exists."""
    repairable: bool = False
    """The violation can be repaired and the policy permits another model call."""
    mandatory: bool = True
    """The record that could not be written is audit evidence, not optional analytics."""
    jitter: float = 0.5
    """A draw from [0, 1) by the caller's recorded generator, so that a replay waits the same."""
    base_delay_us: int = 50_000


def decide_retry(failure_class: FailureClass, situation: RetrySituation | None = None, **facts: Any) -> RetryDecision:
    """Decide what follows a failed attempt, by the specification's retry rule for the class.

    Give a ``RetrySituation`` or its fields as keywords (``attempt=1, idempotent=True``).
    """
    case = situation if situation is not None else RetrySituation(**facts)
    match FailureClass(failure_class):
        case FailureClass.ARTIFACT_COMPATIBILITY:
            if case.fallback:
                return RetryDecision("fallback", "a compatible artifact stands ready", 0, case.attempt + 1)
            return RetryDecision("none", "unchanged input fails again: select a compatible artifact or runtime")
        case FailureClass.SHAPE_GUARD:
            if case.fallback and case.attempt < case.max_attempts:
                return RetryDecision("fallback", "a profile that admits this input exists", 0, case.attempt + 1)
            return RetryDecision("none", "no dynamic, recompiled or compatible path admits this input")
        case FailureClass.CAPACITY_ADMISSION:
            return _decide_capacity(case)
        case FailureClass.TIMEOUT_CANCELLATION:
            return _decide_timeout(case)
        case FailureClass.MODEL_PROVIDER:
            return _decide_provider(case)
        case FailureClass.TOOL_SIDE_EFFECT:
            return _decide_tool(case)
        case FailureClass.VALIDATION_POLICY:
            if case.repairable and case.attempt < case.max_attempts and _fits_deadline(case, 0):
                return RetryDecision("repair", "the violation is repairable and repairs are left", 0, case.attempt + 1)
            return RetryDecision("escalate", "not repairable within policy: a safer fallback or a person decides")
        case FailureClass.TELEMETRY_PERSISTENCE:
            if case.mandatory:
                return RetryDecision("forbidden", "audit evidence could not be stored: fail closed")
            return _decide_transient(case, "optional analytics may be written later")


def _delay(case: RetrySituation) -> int:
    """Exponential backoff with full jitter, in microseconds; the jitter is the caller's recorded draw."""
    ceiling = case.base_delay_us * 2 ** min(case.attempt - 1, 10)
    return int(ceiling * min(max(case.jitter, 0.0), 1.0))


def _fits_deadline(case: RetrySituation, delay_us: int) -> bool:
    if case.deadline_us is None or case.now_us is None:
        return case.deadline_us is None
    return case.now_us + delay_us + case.expected_us < case.deadline_us


def _repeatable(case: RetrySituation) -> bool:
    return case.idempotent or case.side_effect in ("none", "read") or case.verified_absent


def _decide_transient(case: RetrySituation, reason: str) -> RetryDecision:
    delay = _delay(case)
    if case.attempt >= case.max_attempts:
        return RetryDecision("none", f"all {case.max_attempts} attempts are used")
    if not _fits_deadline(case, delay):
        return RetryDecision("none", "another attempt does not fit before the deadline")
    return RetryDecision("retry", reason, delay, case.attempt + 1)


def _decide_capacity(case: RetrySituation) -> RetryDecision:
    if case.idempotent:
        decision = _decide_transient(case, "capacity may return before the deadline")
        if decision.action == "retry":
            return decision
    if case.fallback:
        return RetryDecision("fallback", "degrade to the alternate route", 0, case.attempt + 1)
    return RetryDecision("none", "fail fast: the deadline or the idempotency policy permits no retry")


def _decide_timeout(case: RetrySituation) -> RetryDecision:
    if case.cancelled:
        return RetryDecision("none", "the caller cancelled")
    if not _repeatable(case):
        return RetryDecision("escalate", "a completed side effect must not be duplicated")
    if case.continuation and case.attempt < case.max_attempts and _fits_deadline(case, 0):
        return RetryDecision("resume", "a documented continuation point exists", 0, case.attempt + 1)
    return RetryDecision("none", "no continuation point within the deadline")


def _decide_provider(case: RetrySituation) -> RetryDecision:
    if not _repeatable(case):
        return RetryDecision("escalate", "the failed call may have had a side effect")
    if case.transient:
        decision = _decide_transient(case, "classified as transient")
        if decision.action == "retry":
            return decision
    if case.fallback:
        return RetryDecision("fallback", "a route with a compatible contract stands ready", 0, case.attempt + 1)
    return RetryDecision("none", "not transient, and no compatible fallback")


def _decide_tool(case: RetrySituation) -> RetryDecision:
    if case.side_effect in ("none", "read"):
        return _decide_transient(case, "the tool reads only")
    if case.idempotent:
        return _decide_transient(case, "a stable idempotency key protects the write")
    if case.verified_absent:
        return _decide_transient(case, "a read proved that the write did not happen")
    return RetryDecision("forbidden", "the write may have happened: suspend, reconcile, ask for approval")

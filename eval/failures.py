"""Did a replay fail as its original did, was the failure contained, and is its evidence complete?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from eval.records import FailureRecord, RequestRecord
from traces.failures import FailureClass, rule_of

WRITES = frozenset({"reversible", "irreversible", "ambiguous"})
"""Side effects that change the world."""


@dataclass(frozen=True)
class FailureComparison:
    """The failure of an original and of its replay, side by side."""

    original: FailureRecord | None
    replay: FailureRecord | None
    same_class: bool
    same_stage: bool
    same_retry_decision: bool
    missing_original: tuple[str, ...]
    """Evidence that the specification requires of the class and the original lacks."""
    missing_replay: tuple[str, ...]
    broken_original: tuple[str, ...]
    """Containment that the original did not keep, one sentence each."""
    broken_replay: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Say whether class, stage and retry decision agree; two requests without a failure agree."""
        return self.same_class and self.same_stage and self.same_retry_decision

    @property
    def sound(self) -> bool:
        """Say whether both sides kept containment and have all evidence."""
        lacking = (self.missing_original, self.missing_replay, self.broken_original, self.broken_replay)
        return not any(lacking)


def compare_failures(original: RequestRecord, replay: RequestRecord) -> FailureComparison:
    """Compare class, stage, retry decision, containment and evidence of two requests."""
    left, right = original.failure, replay.failure

    def agree(what: str) -> bool:
        # getattr on None gives the default, so a failure on one side only agrees in nothing
        return getattr(left, what, left) == getattr(right, what, right) and (left is None) == (right is None)

    return FailureComparison(
        original=left,
        replay=right,
        same_class=agree("failure_class"),
        same_stage=agree("stage"),
        same_retry_decision=agree("retry_decision"),
        missing_original=missing_evidence(left),
        missing_replay=missing_evidence(right),
        broken_original=broken_containment(original),
        broken_replay=broken_containment(replay),
    )


def missing_evidence(failure: FailureRecord | None) -> tuple[str, ...]:
    """List the required evidence that a failure lacks; a value of None is an answer, an absent key is not.

    Raises:
        ValueError: the failure has a class that the specification does not know.
    """
    if failure is None:
        return ()
    return tuple(key for key in rule_of(FailureClass(failure.failure_class)).evidence if key not in failure.evidence)


def unanswered_evidence(failure: FailureRecord | None) -> tuple[str, ...]:
    """List the required evidence that is there without a value."""
    if failure is None:
        return ()
    keys = rule_of(FailureClass(failure.failure_class)).evidence
    return tuple(key for key in keys if failure.evidence.get(key, False) is None)


def broken_containment(record: RequestRecord) -> tuple[str, ...]:
    """Say which of the specification's containment rules a failed request did not keep, as far as its record shows."""
    if record.failure is None:
        return ()
    return tuple(_broken(record, record.failure, FailureClass(record.failure.failure_class)))


def _broken(record: RequestRecord, failure: FailureRecord, kind: FailureClass) -> Iterator[str]:
    if record.terminal_status is None:
        yield "the request has no terminal status"
    if record.terminal_status == "ok":
        yield "the request failed, and its terminal status says ok"
    match kind:
        case FailureClass.ARTIFACT_COMPATIBILITY | FailureClass.CAPACITY_ADMISSION:
            if record.token_count and failure.stage in ("b03", "b04"):
                yield "the model ran although the request was not admitted"
        case FailureClass.TIMEOUT_CANCELLATION:
            if _answered(record, "released_resources") in (None, False, [], ()):
                yield "nothing says that cache and reservations were released"
            if record.terminal_status not in ("partial", "cancelled", "error", "degraded", None):
                yield "the response is not marked incomplete"
        case FailureClass.TOOL_SIDE_EFFECT:
            yield from _repeated_writes(record)
        case FailureClass.VALIDATION_POLICY:
            if record.terminal_status not in ("error", "review", "degraded", None):
                yield "rejected content may have reached the caller"
        case FailureClass.TELEMETRY_PERSISTENCE:
            if _answered(record, "durability") != "optional":
                yield from _acts_after(record, failure)
        case FailureClass.SHAPE_GUARD | FailureClass.MODEL_PROVIDER:
            return


def _answered(record: RequestRecord, key: str) -> Any:
    return None if record.failure is None else record.failure.evidence.get(key)


def _repeated_writes(record: RequestRecord) -> Iterator[str]:
    """A write with the same arguments must not be done twice without an idempotency key."""
    seen: set[tuple[str, str | None]] = set()
    for call in record.tool_calls:
        key = (call.name, call.arguments_digest)
        if call.side_effect in WRITES and key in seen and _answered(record, "idempotency_ref") is None:
            yield f"{call.name} was called again with the same arguments and no idempotency key"
        seen.add(key)


def _acts_after(record: RequestRecord, failure: FailureRecord) -> Iterator[str]:
    """After mandatory evidence could not be stored, only the response may follow."""
    failed = False
    for stage in record.stages:
        if failed and stage.stage != "b10":
            yield f"stage {stage.stage} ran although mandatory evidence could not be stored"
        failed = failed or (stage.stage == failure.stage and stage.status not in ("ok", None))

"""Which errors can the engine give?

RuntimeFailure
  CapacityRefused
    SequenceRefused     capacity_admission     the request can never fit, the queue is full, or it was given up
  RequestRefused
    SettingsRefused     validation_policy      the scheduling pins contradict each other or the package
    GrammarRefused      validation_policy      the schema cannot constrain decoding
    SamplingRefused     validation_policy      the request itself is malformed
  ProviderFailed
    EngineFailed        model_provider         a step failed, or the engine has stopped
      AnswerNotFinite   model_provider         the model answered what is no number; nothing of it was kept
  PlanMissing           telemetry_persistence  the recorded schedule lacks a step that the replay needs
"""

from __future__ import annotations

from runtime.errors import CapacityRefused, ProviderFailed, RequestRefused, RuntimeFailure
from traces.failures import ClassifiedError, FailureClass


class SequenceRefused(CapacityRefused):
    """The request can never fit into this engine, its queue is full, it is closing, or it gave the sequence up.

    `reason` says which: `sequence_too_long`, `queue_full`, `engine_closed`, `deadline_unreachable`, `preemption_limit`.
    """


def step_failure(error: Exception) -> ClassifiedError:
    """Return what a failing call tells the sequences in it."""
    if isinstance(error, ClassifiedError):
        return error
    return EngineFailed(
        f"a step failed: {error!r}", reason="step_failed", evidence={"error_class": type(error).__name__}
    )


def given_up(
    reason: str, *, queue_depth: int, free_blocks: int, deadline_us: int | None, preemptions: int
) -> SequenceRefused:
    """Return the refusal of a sequence that was accepted first, in words."""
    late = reason == "deadline_unreachable"
    return SequenceRefused(
        "At the pace of this engine the first token would come after the deadline."
        if late
        else f"No cache block was left, and every running sequence had been evicted {preemptions} times already.",
        reason=reason,
        evidence={
            "queue_depth": queue_depth,
            "reservation_failure": None if late else "kv_blocks",
            "memory_pressure": {"free_blocks": free_blocks},
            "deadline_us": deadline_us,
            "retry_after_us": None,
        },
        fix="allow more time, or send it when less is waiting"
        if late
        else "raise scheduling.num_blocks or max_preemptions, or lower max_num_seqs",
    )


class SettingsRefused(RequestRefused):
    """The scheduling pins contradict each other, or the bounds of the package that they are for."""

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(message, reason="scheduling_settings", fix=fix)


class GrammarRefused(RequestRefused):
    """The JSON schema cannot constrain decoding: malformed, unsupported keyword, or too large."""


class SamplingRefused(RequestRefused):
    """Empty prompt, token outside the vocabulary, or sampling settings outside their range."""


class EngineFailed(ProviderFailed):
    """A step of the model failed while this sequence was in it, or the engine stopped before its end."""


class AnswerNotFinite(EngineFailed):
    """The model answered logits that are no numbers; its keys and values were not put into the cache."""

    def __init__(self) -> None:
        super().__init__("the model answered logits that are no numbers", reason="logits_not_finite")


class PlanMissing(RuntimeFailure):
    """The recorded schedule has no trace of the sequence, or lacks a step of its slice."""

    bound_class = FailureClass.TELEMETRY_PERSISTENCE

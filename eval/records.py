"""What does the judge see of a run?  Frozen records of recorded facts, built by the reader of a ledger or by a test.

The judge never asks the runtime: whatever is not in these records was not recorded, and is then ``None``, never a
guess.  Digests are opaque names; two of them are compared, never parsed.  Times are integer microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenRecord:
    """One generated token."""

    token: int
    logits_digest: str | None = None
    """Of the row of logits that the token was drawn from, before any mask."""
    logprob: float | None = None
    """Natural logarithm of the probability that the model gave the token."""
    margin: float | None = None
    """Difference of the two largest logits of the row."""
    step: int | None = None
    """Engine step that computed the row."""
    position: int | None = None
    """Index in the sequence, prompt included."""
    schedule_digest: str | None = None
    """Of the padded shapes, rows and chunks that this sequence went through since its previous token."""
    emitted_us: int | None = None


@dataclass(frozen=True)
class GenerationRecord:
    """One generation: the prompt that went in and the tokens that came out."""

    prompt_digest: str | None = None
    """Of the prompt's token ids."""
    tokens: tuple[TokenRecord, ...] = ()
    finish_reason: str | None = None
    """stop, length, cancelled, deadline or error."""
    schedule_digest: str | None = None
    """Of all step plans that this generation took part in; used where tokens carry none of their own."""
    sequence_id: str | None = None
    queue_us: int | None = None
    prefill_us: int | None = None
    decode_us: int | None = None


@dataclass(frozen=True)
class StageRecord:
    """One stage as it began and ended; a request may go through a stage more than once."""

    stage: str
    """Stage code, b01 to b10."""
    status: str | None = None
    """ok, error, ...; None where the end was never recorded, which is itself a fact."""
    input_digest: str | None = None
    output_digest: str | None = None
    decision: str | None = None
    """What the stage decided, in its own words: a route, allow, accepted, ..."""
    attempt: int = 1
    start_us: int | None = None
    end_us: int | None = None


@dataclass(frozen=True)
class ToolCallRecord:
    """One proposed tool call and what became of it."""

    name: str
    arguments_digest: str | None = None
    result_digest: str | None = None
    """Of all that the tool answered, readings before the decision included; None when it was not called."""
    decision: str | None = None
    """allow, deny, ..."""
    side_effect: str = "none"
    attempt: int = 1


@dataclass(frozen=True)
class DecisionRecord:
    """One policy decision."""

    name: str
    """Rule, validator or policy that decided."""
    decision: str
    version: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class FailureRecord:
    """How a request failed."""

    failure_class: str
    """One of the specification's eight classes."""
    stage: str | None = None
    retry_decision: str | None = None
    error_type: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class SpanRecord:
    """One interval of work."""

    name: str
    start_us: int
    end_us: int
    stage: str | None = None
    span_id: str | None = None
    parent_span_id: str | None = None

    def __post_init__(self) -> None:
        if self.end_us < self.start_us:
            raise ValueError(f"span {self.name} ends at {self.end_us}, before it starts at {self.start_us}")


@dataclass(frozen=True)
class RequestRecord:
    """One request, from boundary to terminal status, in the order in which it happened."""

    request_ref: str
    run_id: str | None = None
    stages: tuple[StageRecord, ...] = ()
    """In order of their starts."""
    generations: tuple[GenerationRecord, ...] = ()
    """In order; each belongs to the next prefill stage."""
    tool_calls: tuple[ToolCallRecord, ...] = ()
    """In order; each belongs to the next tooling stage."""
    policy_decisions: tuple[DecisionRecord, ...] = ()
    failure: FailureRecord | None = None
    terminal_status: str | None = None
    """ok, error, cancelled, partial, degraded or review; None where none was recorded."""
    response_digest: str | None = None
    spans: tuple[SpanRecord, ...] = ()
    manifest_digest: str | None = None
    parent_ref: str | None = None
    """Of the request that this one replays."""
    arrival_us: int | None = None

    @property
    def token_count(self) -> int:
        """Count generated tokens over all generations."""
        return sum(len(generation.tokens) for generation in self.generations)


@dataclass(frozen=True)
class RunRecord:
    """All requests of one run."""

    run_id: str
    requests: tuple[RequestRecord, ...] = ()
    parent_run_id: str | None = None


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may part and still count as the same: what repeated unchanged runs showed, never a guess."""

    logprob: float = 0.0
    margin: float = 0.0
    source: str | None = None
    """Where the numbers come from, such as ``A/A of 5 repeats``."""

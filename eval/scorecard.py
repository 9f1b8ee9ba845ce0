"""What does one replay come to?  A verdict as a value, apart from the run's own outcome, and its exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval.attribution import attribute
from eval.divergence import Divergence
from eval.records import RequestRecord
from manifests.diff import PinDifference

Outcome = Literal["exact", "within_tolerance", "diverged", "unverified", "refused"]

EXIT_CODES: Mapping[Outcome, int] = {
    "exact": 0,
    "within_tolerance": 0,
    "diverged": 1,
    "unverified": 1,
    "refused": 2,
}
"""What a command returns; 3 is kept for a replay that failed by itself."""


@dataclass(frozen=True)
class Scorecard:
    """The verdict on one replay."""

    verdict: Outcome
    original: Mapping[str, Any]
    """What the recorded request came to."""
    replay: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the replay came to; empty where it was refused."""
    divergence: Divergence | None = None
    pins_changed: tuple[PinDifference, ...] = ()
    refused_pin: str | None = None
    """The pin that could not be held."""
    reason: str | None = None
    """Why the replay was refused or could prove nothing, in one sentence."""

    @property
    def exit_code(self) -> int:
        """Return 0 for the same, 1 for diverged or unproven, 2 for refused."""
        return EXIT_CODES[self.verdict]

    def to_document(self) -> dict[str, Any]:
        """Return plain JSON values; the keys up to ``replay`` are the stable part."""
        found = self.divergence
        suspects = () if found is None else attribute(self.pins_changed, found).suspects
        return {
            "verdict": self.verdict,
            "layer": None if found is None else found.layer,
            "stage": None if found is None else found.stage,
            "step": None if found is None else found.step,
            "token_index": None if found is None else found.token_index,
            "pins_changed": [
                {"pin": item.path, "original": item.left, "replay": item.right} for item in self.pins_changed
            ],
            "refused_pin": self.refused_pin,
            "original": dict(self.original),
            "replay": dict(self.replay),
            "generation": None if found is None else found.generation,
            "reason": self.reason,
            "suspects": [{"pin": item.pin.path, "role": item.role, "acts_on": list(item.layers)} for item in suspects],
            "divergence": None if found is None else found.to_document(),
        }


@dataclass(frozen=True)
class Tally:
    """The verdicts on many replays."""

    verdicts: Mapping[str, int]
    layers: Mapping[str, int]
    """Of the diverged ones."""
    exit_code: int
    """The worst of all; 2 where there was nothing to judge."""


def score(
    divergence: Divergence,
    original: RequestRecord,
    replay: RequestRecord,
    *,
    pins_changed: Sequence[PinDifference] = (),
) -> Scorecard:
    """Sum up a comparison."""
    reason = "; ".join(divergence.unverified) if divergence.verdict == "unverified" else None
    return Scorecard(
        divergence.verdict, summarize(original), summarize(replay), divergence, tuple(pins_changed), reason=reason
    )


def refuse(original: RequestRecord, *, pin: str, reason: str, pins_changed: Sequence[PinDifference] = ()) -> Scorecard:
    """Say that a replay was not begun, because it could not have held a pin."""
    return Scorecard("refused", summarize(original), pins_changed=tuple(pins_changed), refused_pin=pin, reason=reason)


def summarize(record: RequestRecord) -> dict[str, Any]:
    """Return what a request came to, in plain values."""
    failure = record.failure
    ends = [time for span in record.spans for time in (span.start_us, span.end_us)]
    return {
        "run_id": record.run_id,
        "request_ref": record.request_ref,
        "status": record.terminal_status,
        "failure_class": None if failure is None else failure.failure_class,
        "failed_stage": None if failure is None else failure.stage,
        "retry_decision": None if failure is None else failure.retry_decision,
        "generations": len(record.generations),
        "tokens": record.token_count,
        "finish_reasons": [generation.finish_reason for generation in record.generations],
        "tools": [call.name for call in record.tool_calls],
        "response_digest": record.response_digest,
        "manifest_digest": record.manifest_digest,
        "duration_us": max(ends) - min(ends) if ends else None,
    }


def tally(scorecards: Iterable[Scorecard]) -> Tally:
    """Count verdicts, and layers of the diverged."""
    cards = list(scorecards)
    verdicts: Counter[str] = Counter(card.verdict for card in cards)
    layers = Counter(
        card.divergence.layer
        for card in cards
        if card.divergence is not None and card.verdict == "diverged" and card.divergence.layer is not None
    )
    return Tally(dict(verdicts), dict(layers), max((card.exit_code for card in cards), default=2))

"""What did a replay find?  One value, apart from the outcome of the run itself.

exact             the same pins, and every layer the same to the bit
within_tolerance  the same within the tolerance stored with the recording, or the same under changed pins
diverged          something differs; layer, stage, step and token index say where it first does
unverified        nothing differs in what was compared, but not everything could be compared
refused           nothing was run; `refused_pin` names the pin, where a pin is the reason
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

EXIT_SAME = 0
EXIT_DIVERGED = 1
EXIT_REFUSED = 2
EXIT_FAILED = 3


class Verdict(StrEnum):
    """The five words of a verdict, from best to worst."""

    EXACT = "exact"
    WITHIN_TOLERANCE = "within_tolerance"
    UNVERIFIED = "unverified"
    DIVERGED = "diverged"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class ReplayVerdict:
    """The verdict on one replay of one request.

    layer        first layer that differs: input, schedule, bits, margin, token, tool, decision or failure
    stage        request stage in which it first differs
    step         engine step of the first difference, counted from the request's own first step
    token_index  index of the first token concerned, from 0, over all tokens of the request
    pins_changed pins that the caller set, each {"pin", "original", "replay"}
    refused_pin  the pin that could not be set
    original     what the recording says: run, request, status, failure class, tokens, output digest
    replay       the same of the replay, with the run that recorded it
    detail       one sentence for people
    suspects     changed pins that act on the layer that differs first
    """

    verdict: Verdict
    layer: str | None = None
    stage: str | None = None
    step: int | None = None
    token_index: int | None = None
    pins_changed: tuple[Mapping[str, Any], ...] = ()
    refused_pin: str | None = None
    original: Mapping[str, Any] = field(default_factory=dict[str, Any])
    replay: Mapping[str, Any] = field(default_factory=dict[str, Any])
    detail: str = ""
    suspects: tuple[str, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay run --json` prints."""
        return {
            "verdict": self.verdict.value,
            "layer": self.layer,
            "stage": self.stage,
            "step": self.step,
            "token_index": self.token_index,
            "pins_changed": [dict(change) for change in self.pins_changed],
            "refused_pin": self.refused_pin,
            "original": dict(self.original),
            "replay": dict(self.replay),
            "detail": self.detail,
            "suspects": list(self.suspects),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_document` wrote."""
        fields: dict[str, Any] = dict(document)
        fields["verdict"] = Verdict(fields["verdict"])
        for name in ("pins_changed", "suspects"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)

    def under_changes(self, changes: Iterable[Mapping[str, Any]]) -> Self:
        """Name the pins that were changed: what ran under other pins is never called exact."""
        changed = tuple(changes)
        if not changed or self.verdict is Verdict.REFUSED:
            return replace(self, pins_changed=changed)
        if self.verdict is Verdict.EXACT:
            names = ", ".join(str(change["pin"]) for change in changed)
            return replace(
                self,
                verdict=Verdict.WITHIN_TOLERANCE,
                pins_changed=changed,
                detail=f"every layer is the same to the bit, although {names} changed",
            )
        return replace(self, pins_changed=changed)


def exit_code(verdicts: Iterable[ReplayVerdict]) -> int:
    """Return the exit code: 1 when anything diverged or stayed unproven, else 2 when anything was refused, else 0."""
    words = {verdict.verdict for verdict in verdicts}
    if not words or words == {Verdict.REFUSED}:
        return EXIT_REFUSED
    if words & {Verdict.DIVERGED, Verdict.UNVERIFIED}:
        return EXIT_DIVERGED
    return EXIT_REFUSED if Verdict.REFUSED in words else EXIT_SAME


def tally(verdicts: Iterable[ReplayVerdict]) -> dict[str, int]:
    """Count verdicts by word, in the order of `Verdict`, words that do not occur left out."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    return {word.value: counts[word] for word in Verdict if counts[word]}

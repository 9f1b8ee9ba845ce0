"""How is an effect answered in a replay?  From the record, by kind and arguments; never by a write."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from manifests.canonical import canonical_bytes, digest
from runtime.effects.door import WRITES, Action, EffectKind, EffectOrigin, EffectRecorder, SideEffect
from runtime.effects.log import EffectLog
from runtime.effects.outcomes import ambiguous_write, answer_of, outcome_of
from runtime.effects.records import Override, RecordedCall, nearest_call, pretty, recorded_calls
from runtime.errors import EffectMiss, WriteForbidden

if TYPE_CHECKING:
    from traces.envelope import TraceEvent


class RecordedEffects:
    """Answers effects from a recorded request; performs nothing unless a kind is allowed by name, never a write."""

    def __init__(
        self,
        events: Iterable[TraceEvent],
        *,
        read_blob: Callable[[str], bytes],
        recorder: EffectRecorder,
        columns: Mapping[str, Any],
        overrides: Iterable[Override] = (),
        anew: frozenset[EffectKind] = frozenset(),
        at_frontier: frozenset[EffectKind] = frozenset(),
    ) -> None:
        """Take the `effect.performed` events of one request, in order.

        `anew` kinds are always performed again (retrieval, when the index pin changes); `at_frontier` kinds only where
        the record has no answer (the clock, when a changed run takes one more turn). Writes are refused in both.
        """
        self._log = EffectLog(recorder, columns)
        self._calls = recorded_calls(events, read_blob)
        self._records: dict[tuple[str, str], list[RecordedCall]] = {}
        for recorded in self._calls:
            self._records.setdefault((recorded.kind, recorded.arguments_digest), []).append(recorded)
        self._overrides = tuple(overrides)
        self._anew = anew
        self._at_frontier = at_frontier
        self._of_kind: Counter[str] = Counter()
        self._played: Counter[tuple[str, str]] = Counter()

    async def perform(
        self, kind: EffectKind, arguments: dict[str, Any], action: Action, *, side_effect: SideEffect = "none"
    ) -> Any:
        """Answer from the record; raise EffectMiss with the nearest recorded call when there is none."""
        argument_bytes = canonical_bytes(arguments)
        arguments_digest = digest(argument_bytes)
        call = (kind, argument_bytes, arguments_digest, self._log.number(kind, arguments_digest))
        outcome, origin = await self._outcome(call, arguments, action, side_effect)
        self._log.emit(
            self._log.entry(call, phase="performed", outcome=outcome, origin=origin, side_effect=side_effect)
        )
        return answer_of(outcome)

    def unplayed(self) -> tuple[RecordedCall, ...]:
        """List recorded calls that the replay has not asked for, in recorded order."""
        left = Counter(self._played)
        unasked: list[RecordedCall] = []
        for recorded in self._calls:
            key = (recorded.kind, recorded.arguments_digest)
            if left[key] > 0:
                left[key] -= 1
            else:
                unasked.append(recorded)
        return tuple(unasked)

    async def _outcome(
        self,
        call: tuple[EffectKind, bytes, str, int],
        arguments: dict[str, Any],
        action: Action,
        side_effect: SideEffect,
    ) -> tuple[dict[str, Any], EffectOrigin]:
        kind, _, arguments_digest, ordinal = call
        nth_of_kind = self._of_kind[kind]
        self._of_kind[kind] += 1
        for override in self._overrides:
            if override.matches(kind, arguments, nth_of_kind):
                self._played[(kind, arguments_digest)] += 1
                return {"result": override.result}, "simulated"
        records = self._records.get((kind, arguments_digest), [])
        if kind in self._anew or (ordinal >= len(records) and kind in self._at_frontier):
            self._played[(kind, arguments_digest)] += 1
            return await self._perform_again(kind, arguments, action, side_effect), "executed"
        if ordinal >= len(records):
            raise self._miss(kind, arguments, ordinal)
        self._played[(kind, arguments_digest)] += 1
        recorded = records[ordinal].outcome
        return (recorded if recorded is not None else {"error": ambiguous_write(kind, "no_recorded_end")}), "replayed"

    async def _perform_again(
        self, kind: EffectKind, arguments: dict[str, Any], action: Action, side_effect: SideEffect
    ) -> dict[str, Any]:
        if side_effect in WRITES:
            raise WriteForbidden(
                f"A replay was about to perform a write: {kind} {pretty(arguments)}",
                reason="write_in_replay",
                evidence={"kind": kind, "arguments": arguments, "side_effect": side_effect},
                fix=f"Give the result to use instead with an override for {kind!r}; a replay never writes.",
            )
        return await outcome_of(kind, action, write=False)

    def _miss(self, kind: EffectKind, arguments: dict[str, Any], ordinal: int) -> EffectMiss:
        wanted = pretty(arguments)
        nearest = nearest_call(wanted, [recorded for recorded in self._calls if recorded.kind == kind])
        if nearest is None:
            detail, difference = f"The recorded run made no {kind} call at all.", ""
        elif nearest.arguments == arguments:
            detail, difference = f"The recorded run made this call {ordinal} time(s), the replay asks once more.", ""
        else:
            difference = "\n".join(
                difflib.unified_diff(
                    pretty(nearest.arguments).splitlines(), wanted.splitlines(), "recorded", "replayed", lineterm=""
                )
            )
            detail = f"Nearest recorded call:\n{difference}"
        return EffectMiss(
            f"The recorded run has no answer for this {kind} call (number {ordinal + 1} of its equals).\n{detail}",
            reason="effect_miss",
            evidence={
                "kind": kind,
                "arguments": arguments,
                "ordinal": ordinal,
                "nearest": None if nearest is None else nearest.arguments,
                "diff": difference,
            },
            fix=f"If the difference is intended, give the answer with an override for {kind!r}, or, where nothing is "
            f"written, allow {kind!r} to be performed anew. Otherwise the replayed run parted from the recorded one "
            "before this call: compare the stages above it.",
        )

"""Which effects did a recorded request have, and which may be answered otherwise?"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.effects.door import EFFECT_EVENT, EffectKind
from runtime.errors import EffectMiss

if TYPE_CHECKING:
    from traces.envelope import TraceEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One allowed substitution in a replay: calls that match get `result` instead of what was recorded."""

    kind: EffectKind
    result: Any
    """The JSON answer to give."""
    arguments: Mapping[str, Any] | None = None
    """Top-level arguments that must be equal; None matches every call of the kind."""
    ordinal: int | None = None
    """Which matching call of the kind, counted from 0; None matches all."""

    def matches(self, kind: EffectKind, arguments: Mapping[str, Any], ordinal: int) -> bool:
        """Whether this call is the one to answer differently; `ordinal` counts calls of the kind from 0."""
        if kind != self.kind or (self.ordinal is not None and ordinal != self.ordinal):
            return False
        return self.arguments is None or all(arguments.get(key) == value for key, value in self.arguments.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCall:
    """One effect as the ledger has it."""

    kind: EffectKind
    arguments: Any
    arguments_digest: str
    outcome: dict[str, Any] | None
    """`{"result": ...}`, `{"error": {...}}`, or None: a write was intended and its end was never recorded."""


def recorded_calls(events: Iterable[TraceEvent], read_blob: Callable[[str], bytes]) -> tuple[RecordedCall, ...]:
    """Read the effects of one request from its events, in order; a write without an end keeps outcome None."""
    calls: list[RecordedCall] = []
    open_writes: dict[tuple[str, str, int], int] = {}
    for event in events:
        if event.event_type != EFFECT_EVENT:
            continue
        payload: Mapping[str, Any] = event.payload or {}
        key = (payload["kind"], payload["arguments_digest"], payload["ordinal"])
        recorded = RecordedCall(
            kind=payload["kind"],
            arguments=json.loads(read_blob(_required(event.input_ref, "input_ref"))),
            arguments_digest=payload["arguments_digest"],
            outcome=None if event.result_ref is None else json.loads(read_blob(event.result_ref)),
        )
        if payload["phase"] == "intended":
            open_writes[key] = len(calls)
            calls.append(recorded)
        elif key in open_writes:
            calls[open_writes.pop(key)] = recorded
        else:
            calls.append(recorded)
    return tuple(calls)


def nearest_call(wanted: str, calls: list[RecordedCall]) -> RecordedCall | None:
    """Return the recorded call whose arguments read most like `wanted`."""

    def likeness(recorded: RecordedCall) -> float:
        return difflib.SequenceMatcher(a=wanted, b=pretty(recorded.arguments), autojunk=False).ratio()

    return max(calls, key=likeness, default=None)


def pretty(value: Any) -> str:
    """Return indented JSON with sorted keys, for people and for comparing lines."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)


def _required(reference: str | None, name: str) -> str:
    if reference is None:
        raise EffectMiss(
            f"A recorded effect has no {name}.",
            reason="effect_record_incomplete",
            evidence={"missing": name},
            fix="Check the ledger: `replaylab ledger verify`.",
        )
    return reference

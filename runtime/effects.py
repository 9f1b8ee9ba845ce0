"""What does a run read from, or do to, the world outside its pins, and how is that answered again in a replay?

Everything that is not a pure function of the pins goes through `Effects.perform`: clock, ids, arrival, retrieval,
quota, health, identity, tool and provider calls, human decisions, memory. Live, an effect is performed and recorded.
In a replay it is answered from the record, matched by kind and canonical arguments, never by order alone: the n-th
equal call gets the n-th equal record. A call that was not recorded fails with the nearest recorded call and a diff.
A replay never performs a write.

Record of one effect (event `effect.performed`): payload kind, arguments_digest, ordinal, phase; input_ref the
arguments, result_ref the outcome document, `{"result": ...}` or `{"error": {...}}`. A write has two events: phase
`intended`, durable before the write acts, and phase `performed`, durable before its result is used.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from manifests.canonical import canonical_bytes, digest
from runtime.errors import AmbiguousSideEffect, EffectMiss, ProviderFailed, RequestCancelled, WriteForbidden
from traces.failures import ClassifiedError, FailureClass

if TYPE_CHECKING:
    from traces.envelope import TraceEvent

EffectKind = Literal[
    "arrival",
    "identity",
    "clock",
    "id",
    "entropy",
    "quota",
    "health",
    "retrieval",
    "tool",
    "provider",
    "human",
    "memory",
]
SideEffect = Literal["none", "read", "reversible", "irreversible"]
EffectOrigin = Literal["executed", "replayed", "simulated"]
Phase = Literal["intended", "performed"]
Action = Callable[[], Any]

EFFECT_EVENT = "effect.performed"
WRITES: frozenset[SideEffect] = frozenset({"reversible", "irreversible"})


class EffectRecorder(Protocol):
    """The part of `traces.recorder.Recorder` that effects need."""

    def emit(self, event_type: str, *, payload: dict[str, Any] = ..., **columns: Any) -> Any: ...

    def commit_async(self, event_type: str, *, payload: dict[str, Any] = ..., **columns: Any) -> Awaitable[Any]: ...

    def put_blob(self, data: bytes) -> str: ...


class Effects(Protocol):
    """The only door between a request and the world."""

    async def perform(
        self, kind: EffectKind, arguments: dict[str, Any], action: Action, *, side_effect: SideEffect = "none"
    ) -> Any:
        """Return the JSON result of `action`, performed or recalled; `arguments` identify the call, canonically."""
        ...


async def read_clock(effects: Effects, purpose: str, clock: Callable[[], int]) -> int:
    """Read the wall clock once, in UTC microseconds, for one named decision."""
    return int(await effects.perform("clock", {"purpose": purpose}, clock))


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


class _EffectLog:
    """Writes effects into the trace and counts equal calls; shared by live and recorded effects."""

    def __init__(self, recorder: EffectRecorder, columns: Mapping[str, Any]) -> None:
        self._recorder = recorder
        self._columns = dict(columns)
        self._equal: Counter[tuple[str, str]] = Counter()

    def number(self, kind: EffectKind, arguments_digest: str) -> int:
        """Count this call among its equals, from 0."""
        key = (kind, arguments_digest)
        self._equal[key] += 1
        return self._equal[key] - 1

    def entry(
        self,
        call: tuple[EffectKind, bytes, str, int],
        *,
        phase: Phase,
        outcome: dict[str, Any] | None,
        origin: EffectOrigin,
        side_effect: SideEffect,
    ) -> dict[str, Any]:
        """Build the keyword arguments of one `effect.performed` event, its blobs stored."""
        kind, argument_bytes, arguments_digest, ordinal = call
        entry: dict[str, Any] = {
            **self._columns,
            "payload": {"kind": kind, "arguments_digest": arguments_digest, "ordinal": ordinal, "phase": phase},
            "effect_origin": origin,
            "side_effect": side_effect,
            "input_ref": self._recorder.put_blob(argument_bytes),
        }
        if outcome is not None:
            entry["result_ref"] = self._recorder.put_blob(canonical_bytes(outcome))
            error = outcome.get("error")
            entry["status"] = "ok" if error is None else "error"
            if error is not None:
                entry["failure_class"] = error["failure_class"]
                entry["error_type"] = error["error_type"]
                if error.get("ambiguous"):
                    entry["side_effect"] = "ambiguous"
        return entry

    def emit(self, entry: dict[str, Any]) -> None:
        """Record on the hot path."""
        self._recorder.emit(EFFECT_EVENT, **entry)

    async def commit(self, entry: dict[str, Any]) -> None:
        """Record durably; returns only when it is on disk, even if the caller is cancelled meanwhile."""
        written = asyncio.ensure_future(self._recorder.commit_async(EFFECT_EVENT, **entry))
        try:
            await asyncio.shield(written)
        except asyncio.CancelledError:
            await written
            raise


class LiveEffects:
    """Performs effects and records them; writes are durable before they act and before their result is used."""

    def __init__(self, recorder: EffectRecorder, *, columns: Mapping[str, Any]) -> None:
        """Bind to one request: `columns` are the envelope columns (request_ref, trace_id, tenant_ref, ...)."""
        self._log = _EffectLog(recorder, columns)

    async def perform(
        self, kind: EffectKind, arguments: dict[str, Any], action: Action, *, side_effect: SideEffect = "none"
    ) -> Any:
        """Perform `action` and record it; raises what it raises, classified.

        Raises TelemetryPersistenceError before a write acts when its intent cannot be stored.
        """
        argument_bytes = canonical_bytes(arguments)
        arguments_digest = digest(argument_bytes)
        call = (kind, argument_bytes, arguments_digest, self._log.number(kind, arguments_digest))
        write = side_effect in WRITES
        began = time.monotonic_ns()

        def entry(phase: Phase, outcome: dict[str, Any] | None) -> dict[str, Any]:
            fields = self._log.entry(call, phase=phase, outcome=outcome, origin="executed", side_effect=side_effect)
            if phase == "performed":
                fields["duration_us"] = (time.monotonic_ns() - began) // 1_000
            return fields

        if write:
            await self._log.commit(entry("intended", None))
        try:
            outcome = await _outcome_of(kind, action, write=write)
        except asyncio.CancelledError:
            cancelled = _ambiguous(kind, "cancelled") if write else _cancelled(kind)
            if write:
                await self._log.commit(entry("performed", {"error": cancelled}))
            else:
                self._log.emit(entry("performed", {"error": cancelled}))
            raise
        if write:
            await self._log.commit(entry("performed", outcome))
        else:
            self._log.emit(entry("performed", outcome))
        return _answer(outcome)


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
        self._log = _EffectLog(recorder, columns)
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
        return _answer(outcome)

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
        return (recorded if recorded is not None else {"error": _ambiguous(kind, "no_recorded_end")}), "replayed"

    async def _perform_again(
        self, kind: EffectKind, arguments: dict[str, Any], action: Action, side_effect: SideEffect
    ) -> dict[str, Any]:
        if side_effect in WRITES:
            raise WriteForbidden(
                f"A replay was about to perform a write: {kind} {_pretty(arguments)}",
                reason="write_in_replay",
                evidence={"kind": kind, "arguments": arguments, "side_effect": side_effect},
                fix=f"Give the result to use instead with an override for {kind!r}; a replay never writes.",
            )
        return await _outcome_of(kind, action, write=False)

    def _miss(self, kind: EffectKind, arguments: dict[str, Any], ordinal: int) -> EffectMiss:
        wanted = _pretty(arguments)
        nearest = _nearest(wanted, [recorded for recorded in self._calls if recorded.kind == kind])
        if nearest is None:
            detail, difference = f"The recorded run made no {kind} call at all.", ""
        elif nearest.arguments == arguments:
            detail, difference = f"The recorded run made this call {ordinal} time(s), the replay asks once more.", ""
        else:
            difference = "\n".join(
                difflib.unified_diff(
                    _pretty(nearest.arguments).splitlines(), wanted.splitlines(), "recorded", "replayed", lineterm=""
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


async def _outcome_of(kind: EffectKind, action: Action, *, write: bool) -> dict[str, Any]:
    """Run an action to its outcome document; what it raises becomes part of the record, cancellation excepted."""
    try:
        result = action()
        settled = await result if inspect.isawaitable(result) else result
        # through the canonical form, so that a live run sees exactly what a replay will see
        return {"result": json.loads(canonical_bytes(settled))}
    except ClassifiedError as error:
        return {"error": _describe(error)}
    except Exception as error:  # an adapter's own fault: contained here, classified, recorded
        return {"error": _ambiguous(kind, type(error).__name__) if write else _unexpected(kind, error)}


def _answer(outcome: dict[str, Any]) -> Any:
    error = outcome.get("error")
    if error is None:
        return outcome["result"]
    raise ClassifiedError(
        error["message"],
        failure_class=FailureClass(error["failure_class"]),
        evidence=error["evidence"],
        fix=error["fix"],
        error_type=error["error_type"],
    )


def _describe(error: ClassifiedError) -> dict[str, Any]:
    return {
        "failure_class": error.failure_class.value,
        "error_type": error.error_type,
        "message": error.message,
        "evidence": dict(error.evidence),
        "fix": error.fix,
        "ambiguous": isinstance(error, AmbiguousSideEffect),
    }


def _ambiguous(kind: EffectKind, cause: str) -> dict[str, Any]:
    return _describe(
        AmbiguousSideEffect(
            f"A {kind} write was started and its end is unknown ({cause}).",
            reason="ambiguous_side_effect",
            evidence={"kind": kind, "cause": cause, "side_effect_status": "ambiguous"},
            fix="Read the external state by the idempotency key before any retry.",
        )
    )


def _cancelled(kind: EffectKind) -> dict[str, Any]:
    return _describe(
        RequestCancelled(
            f"The request was cancelled during a {kind} call.", reason="cancelled", evidence={"kind": kind}
        )
    )


def _unexpected(kind: EffectKind, error: Exception) -> dict[str, Any]:
    return _describe(
        ProviderFailed(
            f"The {kind} adapter failed unexpectedly ({type(error).__name__}).",
            reason=f"{kind}_adapter_failed",
            evidence={"kind": kind, "exception": type(error).__name__},
            fix="This is a fault of the adapter, not of the request; see the evidence.",
        )
    )


def _nearest(wanted: str, calls: list[RecordedCall]) -> RecordedCall | None:
    def likeness(recorded: RecordedCall) -> float:
        return difflib.SequenceMatcher(a=wanted, b=_pretty(recorded.arguments), autojunk=False).ratio()

    return max(calls, key=likeness, default=None)


def _pretty(value: Any) -> str:
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

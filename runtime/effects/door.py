"""Through which door does a request touch the world?  Kinds of effects, and what performs them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

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

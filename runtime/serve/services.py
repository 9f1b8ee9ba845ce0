"""What does the request path lean on?  Everything impure or replaceable, gathered in one plain record.

A live session fills all of it; a replay gives recorded effects, a playback generation service and no world at all:
nothing live has to be started, because every effect is answered from the record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from manifests.artifact import ArtifactManifest
from manifests.canonical import digest
from manifests.compiler import CompilerManifest
from manifests.hardware import HardwareManifest
from manifests.run import Mode, Pins
from manifests.scheduling import SchedulingManifest
from runtime.effects import EffectRecorder, Effects
from runtime.engine.generation import GenerationService, OnToken
from runtime.errors import WriteForbidden
from runtime.serve.deployment import DeploymentDocument
from traces.recorder import system_clock

Status = Literal["ok", "refused", "failed", "cancelled", "review"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestIdentity:
    """Who this request is in the trace; recorded as the `arrival` effect, so that a replay keeps it."""

    request_ref: str
    """`req_` and a UUIDv7 in hexadecimal."""
    trace_id: str
    """32 hexadecimal digits."""
    arrived_us: int
    """UTC microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteBinding:
    """A route as it stands when the request arrives: a loaded package and the service that generates with it."""

    route: str
    engine_id: str
    """Which engine's events tell how this route ran."""
    service: GenerationService
    encode: Callable[[str], Sequence[int]]
    """Text to token ids, role markers as special tokens."""
    decode: Callable[[Sequence[int]], str]
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int
    artifact: ArtifactManifest
    compiler: CompilerManifest
    hardware: HardwareManifest
    scheduling: SchedulingManifest


class World(Protocol):
    """What live effects act on. Every method is called inside an effect and returns canonical JSON values."""

    def now_us(self) -> int: ...

    def authenticate(self, api_key: str | None) -> dict[str, Any]: ...

    def take_quota(
        self, tenant: str, at_us: int, idempotency_ref: str | None, request_digest: str
    ) -> dict[str, Any]: ...

    def route_health(self, route: str) -> dict[str, Any]: ...

    def search(self, tenant: str, query: str, limit: int) -> dict[str, Any]: ...

    def call_tool(
        self, name: str, arguments: dict[str, Any], *, tenant: str, idempotency_key: str, timeout_us: int
    ) -> Awaitable[dict[str, Any]]: ...

    def remember(self, tenant: str, memory_id: str, document: dict[str, Any]) -> Awaitable[dict[str, Any]]: ...


class AbsentWorld:
    """The world of a replay: touching it is a fault, told in words."""

    def now_us(self) -> int:
        """Refuse."""
        raise _absent("the clock")

    def authenticate(self, api_key: str | None) -> dict[str, Any]:
        """Refuse."""
        raise _absent("the key store")

    def take_quota(self, tenant: str, at_us: int, idempotency_ref: str | None, request_digest: str) -> dict[str, Any]:
        """Refuse."""
        raise _absent("the quota table")

    def route_health(self, route: str) -> dict[str, Any]:
        """Refuse."""
        raise _absent("route health")

    def search(self, tenant: str, query: str, limit: int) -> dict[str, Any]:
        """Refuse."""
        raise _absent("the article index")

    async def call_tool(
        self, name: str, arguments: dict[str, Any], *, tenant: str, idempotency_key: str, timeout_us: int
    ) -> dict[str, Any]:
        """Refuse."""
        raise _absent("the tool server")

    async def remember(self, tenant: str, memory_id: str, document: dict[str, Any]) -> dict[str, Any]:
        """Refuse."""
        raise _absent("the memory store")


def _absent(what: str) -> WriteForbidden:
    return WriteForbidden(
        f"This run has no live world, so {what} cannot be reached.",
        reason="no_live_world",
        evidence={"adapter": what},
        fix="Answer the effect from the record or with an override, or give the run a world for this kind.",
    )


def span_id(trace_id: str, name: str, ordinal: int = 0) -> str:
    """Derive a span's id, 16 hexadecimal digits, from the trace, so that a replay has the same spans."""
    return digest(f"{trace_id}/{name}/{ordinal}".encode())[7:23]


def request_columns(identity: RequestIdentity) -> dict[str, Any]:
    """Return the event columns that name a request; effects are given the same."""
    return {
        "request_ref": identity.request_ref,
        "trace_id": identity.trace_id,
        "parent_span_id": span_id(identity.trace_id, "request"),
        "track": "B",
    }


def same_pins(pins: Pins) -> Pins:
    """Leave the pins as the deployment and the request give them."""
    return pins


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFacts:
    """What the connected tool server said about itself."""

    server: str = "replaylab-crm"
    server_version: str = "1"
    protocol_version: str = "2025-11-25"


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """All that `run_request` needs besides the envelope."""

    deployment: DeploymentDocument
    effects: Effects
    recorder: EffectRecorder
    identity: RequestIdentity
    routes: Mapping[str, RouteBinding]
    """Route name to what is loaded for it, a snapshot for this request."""
    world: World = field(default_factory=AbsentWorld)
    tool_facts: ToolFacts = ToolFacts()
    repin: Callable[[Pins], Pins] = same_pins
    """Given the derived pins, return those to run under; stages read their settings from the result."""
    mode: Mode = "live"
    parent: str | None = None
    """The request that this one replays."""
    cancelled_in: tuple[str, int] | None = None
    """Stage code and ordinal in which the recorded caller went away: a replay ends there too."""
    on_token: OnToken | None = None
    """Called for each token as it is chosen."""
    on_stage: Callable[[str, str], None] = lambda stage, event: None
    """Called with a stage's word and `started`, `completed` or `failed`."""
    stamp: Callable[[], tuple[int, int]] = system_clock
    """UTC and monotonic microseconds for event columns; no decision reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDocument:
    """What one stage received and emitted."""

    stage: str
    """The stage's code, `b01` to `b10`."""
    ordinal: int
    """Which pass of this stage in this request, from 0."""
    input_digest: str
    result_digest: str | None
    """None when the stage failed."""
    document: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended."""

    response: dict[str, Any]
    """The response envelope as JSON."""
    status: Status
    failure: dict[str, Any] | None
    """Failure class, reason, stage, message, evidence, retry decision; None when it succeeded."""
    documents: tuple[StageDocument, ...]
    pins: Pins | None
    """What it ran under; None when it failed before any route was known."""

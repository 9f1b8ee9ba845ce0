"""A support desk without a model: a scripted generation service, a recorder in memory, tools called in process."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from manifests.artifact import ArtifactManifest
from manifests.canonical import digest
from manifests.compiler import CompilerManifest
from manifests.hardware import HardwareManifest
from runtime.effects import LiveEffects, RecordedEffects
from runtime.engine.generation import GenerationRequest, GenerationResult, OnToken, TokenRecord
from runtime.models.reference import prompt, task
from runtime.serve import toolserver
from runtime.serve.articles import ArticleIndex
from runtime.serve.deployment import Deployment
from runtime.serve.envelope import RequestEnvelope
from runtime.serve.health import RouteHealth
from runtime.serve.limits import Limits
from runtime.serve.memory import MemoryStore
from runtime.serve.pipeline import run_request
from runtime.serve.services import Outcome, RequestIdentity, RouteBinding, Services, request_columns
from runtime.serve.session import bind_route
from runtime.serve.world import LiveWorld, Stores
from traces.failures import TelemetryPersistenceError

SEED = 7
PACKAGES = {"primary": digest(b"primary package"), "spare": digest(b"spare package")}
Answer = Callable[[GenerationRequest, str], str]


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """Return the reference tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(prompt.__file__).with_name("tokenizer.json")))


@dataclass(frozen=True)
class Event:
    """One recorded event, as the ledger would give it back."""

    event_type: str
    payload: dict[str, Any]
    columns: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.columns.get(name)


@dataclass
class MemoryRecorder:
    """A recorder that keeps everything until a mandatory write that `refuse` names fails; then it keeps nothing."""

    events: list[Event] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refuse: Callable[[str, dict[str, Any]], bool] = lambda event_type, payload: False
    halted: bool = False

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool:
        json.dumps(payload)
        if not self.halted:
            self.events.append(Event(event_type, payload or {}, columns))
        return not self.halted

    async def commit_async(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        await asyncio.sleep(0)
        self.halted = self.halted or self.refuse(event_type, payload or {})
        if self.halted:
            raise TelemetryPersistenceError(f"{event_type} cannot be stored", evidence={"record_type": event_type})
        self.emit(event_type, payload=payload, **columns, durability="mandatory")

    def put_blob(self, data: bytes) -> str:
        if self.halted:
            raise TelemetryPersistenceError("evidence cannot be stored", evidence={"record_type": "blob"})
        reference = "evidence://sha256/" + digest(data)[7:]
        self.blobs[reference] = data
        return reference

    def read(self, reference: str) -> bytes:
        return self.blobs[reference]

    def types(self) -> list[str]:
        return [event.event_type for event in self.events]

    def of(self, event_type: str) -> list[Event]:
        return [event for event in self.events if event.event_type == event_type]


class Scripted:
    """A generation service that says what `answer(request, prompt text)` says, as tokens."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        self.requests.append(request)
        await asyncio.sleep(0)
        text = self.answer(request, tokenizer().decode(list(request.prompt), skip_special_tokens=False))
        tokens = tuple(tokenizer().encode(text, add_special_tokens=False).ids)
        ended = bool(request.sampling.stop_token_ids)
        tokens = tokens[: request.sampling.max_tokens] + (request.sampling.stop_token_ids[:1] if ended else ())
        records = tuple(
            TokenRecord(
                token, digest([*request.prompt, place])[7:39], -0.5, 1.0, place, len(request.prompt) + place, 50
            )
            for place, token in enumerate(tokens)
        )
        for record in records:
            if on_token is not None:
                on_token(record)
        return GenerationResult(
            sequence_id=request.sequence_id, tokens=tokens, records=records,
            finish_reason="stop" if ended else "length",
            queue_us=100, prefill_us=200, decode_us=300, first_token_us=300, prompt_tokens=len(request.prompt),
            cached_tokens=0, steps=tuple(range(len(tokens))),
        )  # fmt: skip


def good_desk(questions: Iterable[task.Question]) -> Answer:
    """Return the answers of a perfect model for these questions."""
    expected = {question.text: question.expected for question in questions}

    def answer(request: GenerationRequest, text: str) -> str:
        asked = text.split(prompt.USER)[1].split(prompt.ASSISTANT)[0]
        turn = text.count(prompt.TOOL)
        tickets = re.findall(r'"ticket":"(T-[0-9]+)"', text)
        return expected[asked][turn].replace("{ticket}", tickets[-1] if tickets else "")

    return answer


def questions(kind: str | None = None) -> list[task.Question]:
    """Return the desk's questions, of one kind where given."""
    return [one for one in task.questions(SEED, 200) if kind in (None, one.kind)]


def model(package: str = PACKAGES["primary"], precision: str = "float32") -> Any:
    """Return what a loaded package would be."""
    return SimpleNamespace(
        executor=None,
        tokenizer=tokenizer(),
        config=SimpleNamespace(vocab_size=768, max_positions=512),
        artifact=ArtifactManifest(
            model="scripted", family="llama", model_digest=digest(b"weights"), package_digest=package
        ),
        compiler=CompilerManifest(backend="scripted", backend_version="1", precision=precision),
    )


def hardware() -> HardwareManifest:
    """Return a made-up machine."""
    return HardwareManifest(cpu_model="made up", architecture="x", cores=1, threads=1, memory_bytes=1, kernel="none")


class DirectWorld(LiveWorld):
    """The live world with its tools called in process; `fail_tool` may raise instead."""

    fail_tool: Callable[[str], None] = staticmethod(lambda name: None)
    crm: Path

    async def call_tool(
        self, name: str, arguments: dict[str, Any], *, tenant: str, idempotency_key: str, timeout_us: int
    ) -> dict[str, Any]:
        if name == "lookup_account":
            result = toolserver.lookup(self.crm, tenant, arguments["account"])
        else:
            result = toolserver.open_ticket(self.crm, tenant, arguments["account"], arguments["topic"], idempotency_key)
        self.fail_tool(name)
        return result


class Desk:
    """A deployment with a still clock and counted ids, run without a session."""

    def __init__(self, deployment: Deployment, answer: Answer | None = None) -> None:
        self.deployment = deployment
        self.recorder = MemoryRecorder()
        self.service = Scripted(answer or good_desk(questions()))
        self.now = itertools.count(1_700_000_000_000_000, 1_000)
        self.ids = itertools.count(1)
        self.loaded = dict(PACKAGES)
        self.health = RouteHealth(now_us=lambda: next(self.now), loaded=self.loaded.get, tell=lambda *_: None)
        self.stores = Stores(
            deployment=deployment,
            index=ArticleIndex(deployment.index_path),
            limits=Limits(deployment.document, deployment.folder / "boundary.sqlite"),
            memory=MemoryStore(deployment.folder / "memory.sqlite"),
            health=self.health,
            tools=None,  # type: ignore[arg-type]
            now_us=lambda: next(self.now),
        )
        self.services: dict[str, Any] = {}
        self.fail_tool: Callable[[str], None] = lambda name: None

    def routes(self) -> dict[str, RouteBinding]:
        document = self.deployment.document
        return {
            name: bind_route(
                name, model(package), self.services.get(name, self.service),
                scheduling=document.scheduling, hardware=hardware(), engine_id=f"engine-{name}",
            )
            for name, package in self.loaded.items()
        }  # fmt: skip

    def identity(self) -> RequestIdentity:
        number = next(self.ids)
        return RequestIdentity(request_ref=f"req_{number:032x}", trace_id=f"{number:032x}", arrived_us=next(self.now))

    def services_for(self, identity: RequestIdentity, **changes: Any) -> Services:
        world = DirectWorld(self.stores, identity.request_ref)
        world.crm = self.deployment.crm_path
        world.fail_tool = self.fail_tool  # type: ignore[method-assign]
        settings: dict[str, Any] = {
            "deployment": self.deployment.document,
            "effects": LiveEffects(self.recorder, columns=request_columns(identity)),
            "recorder": self.recorder,
            "identity": identity,
            "routes": self.routes(),
            "world": world,
            "stamp": lambda: (next(self.now), next(self.now)),
        }
        return Services(**(settings | changes))

    def ask(self, envelope: RequestEnvelope | bytes, *, key: str | None = "own", **changes: Any) -> Outcome:
        """Run one request with its tenant's key."""
        if key == "own":
            key = self.deployment.keys()[envelope.tenant] if isinstance(envelope, RequestEnvelope) else None
        services = self.services_for(self.identity(), **changes)
        try:
            return asyncio.run(run_request(envelope, services, api_key=key))
        finally:
            services.world.release()  # type: ignore[attr-defined]

    def replay(self, request_ref: str, *, recorder: MemoryRecorder | None = None, **changes: Any) -> Outcome:
        """Run a recorded request again with nothing live but the scripted model."""
        events = [event for event in self.recorder.events if event.request_ref == request_ref]
        accepted = next(event for event in events if event.event_type == "request.accepted")
        envelope = RequestEnvelope.model_validate_json(self.recorder.read(accepted.input_ref))
        identity = RequestIdentity(
            request_ref=request_ref, trace_id=accepted.trace_id, arrived_us=accepted.payload["arrived_us"]
        )
        recorder = recorder or MemoryRecorder()
        allowed = {name: changes.pop(name) for name in ("overrides", "anew", "at_frontier") if name in changes}
        effects = RecordedEffects(
            events, read_blob=self.recorder.read, recorder=recorder, columns=request_columns(identity), **allowed
        )
        settings: dict[str, Any] = {
            "deployment": self.deployment.document, "effects": effects, "recorder": recorder, "identity": identity,
            "routes": self.routes(), "mode": "faithful", "parent": request_ref,
        }  # fmt: skip
        return asyncio.run(run_request(envelope, Services(**(settings | changes))))


def envelope(question: task.Question, **changes: Any) -> RequestEnvelope:
    """Return the request that asks this question."""
    fields: dict[str, Any] = {
        "tenant": question.tenant, "actor": "customer-1", "task": {"kind": "support", "question": question.text}
    }  # fmt: skip
    return RequestEnvelope.model_validate_json(json.dumps(fields | changes))

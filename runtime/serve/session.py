"""What stands while a deployment serves?  A recorder, an engine for each active package, stores, a tool server.

async with ServingSession(ledger, deployment, load=load) as session:
    outcome = await session.run(envelope, api_key)
    await session.activate("primary", other_package_digest)
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from manifests.artifact import ArtifactManifest
from manifests.compiler import CompilerManifest
from manifests.hardware import HardwareManifest
from manifests.scheduling import SchedulingManifest
from runtime.effects import LiveEffects
from runtime.engine.generation import GenerationRequest, GenerationResult, GenerationService, OnToken
from runtime.errors import RouteUnavailable
from runtime.serve.articles import ArticleIndex
from runtime.serve.deployment import Deployment
from runtime.serve.envelope import RequestEnvelope
from runtime.serve.health import RouteHealth
from runtime.serve.limits import Limits
from runtime.serve.memory import MemoryStore
from runtime.serve.pipeline import run_request
from runtime.serve.services import Outcome, RequestIdentity, RouteBinding, Services, request_columns
from runtime.serve.toolclient import ToolClient
from runtime.serve.world import LiveWorld, Stores
from traces.failures import ClassifiedError, FailureClass
from traces.recorder import Recorder, random_ids, system_clock


class TextModel(Protocol):
    """What a route needs of a loaded package (`runtime.prepare.load.LoadedModel` has it)."""

    @property
    def executor(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def config(self) -> Any: ...
    @property
    def artifact(self) -> ArtifactManifest: ...
    @property
    def compiler(self) -> CompilerManifest: ...


Loader = Callable[[str], TextModel]
"""Package digest to loaded package; raises ClassifiedError of class artifact_compatibility."""
StartService = Callable[[TextModel, SchedulingManifest, Recorder, str], GenerationService]
"""Starts what generates for a package: (model, scheduling, recorder, engine id); it may have a `close()`."""

STOP_TOKEN = "<|end|>"
GROUP_WINDOW_US = 50_000


def start_engine(
    model: TextModel, scheduling: SchedulingManifest, recorder: Recorder, engine_id: str
) -> GenerationService:
    """Start a live engine."""
    from runtime.engine.loop import Engine

    return Engine(model, scheduling, recorder, engine_id)


def bind_route(
    route: str,
    model: TextModel,
    service: GenerationService,
    *,
    scheduling: SchedulingManifest,
    hardware: HardwareManifest,
    engine_id: str,
) -> RouteBinding:
    """Bind a loaded package and whatever generates with it to a route; a replay binds a playback service."""
    tokenizer = model.tokenizer
    end = tokenizer.token_to_id(STOP_TOKEN)

    def encode(text: str) -> Sequence[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True)

    return RouteBinding(
        route=route,
        engine_id=engine_id,
        service=service,
        encode=encode,
        decode=decode,
        stop_token_ids=() if end is None else (int(end),),
        vocab_size=int(model.config.vocab_size),
        max_positions=int(model.config.max_positions),
        artifact=model.artifact,
        compiler=model.compiler,
        hardware=hardware,
        scheduling=scheduling,
    )


class _Watched:
    """A generation service that tells route health of its comings and goings."""

    def __init__(self, route: str, service: GenerationService, health: RouteHealth) -> None:
        self._route = route
        self._service = service
        self._health = health

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        healthy = True
        self._health.enter(self._route)
        try:
            result = await self._service.generate(request, on_token)
            healthy = result.finish_reason != "error"
        except ClassifiedError as error:
            healthy = error.failure_class is not FailureClass.MODEL_PROVIDER
            raise
        finally:
            self._health.leave(self._route, healthy)
        return result


class ServingSession:
    """A serving deployment; use as an async context manager, from one event loop."""

    def __init__(
        self,
        ledger: Path,
        deployment: Deployment,
        *,
        load: Loader,
        hardware: HardwareManifest,
        start_service: StartService = start_engine,
        run_id: str | None = None,
        label: str = "",
        clock: Callable[[], tuple[int, int]] = system_clock,
        ids: Callable[[], str] = random_ids,
    ) -> None:
        """Prepare; nothing is opened before the context is entered.

        Args:
            ledger: the ledger's folder.
            load: how a package digest becomes a loaded model.
            hardware: what `runtime.probe.probe` says of this machine.
            start_service: how a loaded model becomes a generation service.
            label: a name for the run.
        """
        self.run_id = run_id or f"run_{ids()}"
        self._ledger = ledger
        self._deployment = deployment
        self._load = load
        self._hardware = hardware
        self._start_service = start_service
        self._label = label
        self._clock = clock
        self._ids = ids
        self._stack = AsyncExitStack()
        self._services: dict[str, tuple[TextModel, GenerationService, str]] = {}
        self._routes: dict[str, RouteBinding] = {}
        self._answered = 0

    async def __aenter__(self) -> Self:
        """Open everything and activate the deployment's routes; raises ClassifiedError when it cannot serve."""
        async with AsyncExitStack() as stack:
            self.recorder = stack.enter_context(self._recorder())
            stack.push_async_callback(self._close_services)
            await self._begin()
            self._stores = await self._open_stores(stack)
            for route in self._deployment.document.routes:
                await self.activate(route.name, route.package)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close engines, tool server and stores, and record the run's end."""
        async with self._stack:
            await self._close_services()
            await self.recorder.commit_async(
                "run.completed", payload={"requests": self._answered}, status="ok" if error is None else "error"
            )

    @property
    def routes(self) -> dict[str, RouteBinding]:
        """The active routes."""
        return dict(self._routes)

    @property
    def deployment(self) -> Deployment:
        """What is served."""
        return self._deployment

    async def activate(self, route: str, package_digest: str) -> None:
        """Put a package on a route; on failure the package that was active stays, and the failure is raised."""
        try:
            model, service, engine_id = await self._started(package_digest)
            binding = bind_route(
                route,
                model,
                _Watched(route, service, self._stores.health),
                scheduling=self._deployment.document.scheduling,
                hardware=self._hardware,
                engine_id=engine_id,
            )
        except ClassifiedError as error:
            kept = self._routes.get(route)
            await self.recorder.commit_async(
                "package.activated",
                payload=error.to_payload()
                | {"package": package_digest, "kept": None if kept is None else kept.artifact.package_digest},
                model_route=route,
                status="error",
                failure_class=error.failure_class,
                error_type=error.error_type,
            )
            raise
        before = self._routes.get(route)
        await self.recorder.commit_async(
            "package.activated",
            payload={
                "package": package_digest,
                "before": None if before is None else before.artifact.package_digest,
                "artifact": binding.artifact.digest,
                "compiler": binding.compiler.digest,
                "own_process": bool(getattr(model.executor, "hosted", False)),
            },
            model_route=route,
            engine_id=engine_id,
            status="ok",
        )
        self._routes[route] = binding

    async def run(
        self,
        envelope: RequestEnvelope | bytes,
        api_key: str | None,
        *,
        on_token: OnToken | None = None,
        on_stage: Callable[[str, str], None] | None = None,
    ) -> Outcome:
        """Run one request, live and recorded; its own failure is part of the outcome."""
        arrived_us, _ = self._clock()
        identity = RequestIdentity(request_ref=f"req_{self._ids()}", trace_id=self._ids(), arrived_us=arrived_us)
        world = LiveWorld(self._stores, identity.request_ref)
        services = Services(
            deployment=self._deployment.document,
            effects=LiveEffects(self.recorder, columns=request_columns(identity)),
            recorder=self.recorder,
            identity=identity,
            routes=dict(self._routes),
            world=world,
            tool_facts=self._stores.tools.facts,
            on_token=on_token,
            on_stage=on_stage or _ignore,
            stamp=self._clock,
        )
        try:
            return await run_request(envelope, services, api_key=api_key)
        finally:
            world.release()
            self._answered += 1

    def ready(self) -> bool:
        """Whether a request can be served now: every route has a package and evidence can be stored."""
        wanted = {route.name for route in self._deployment.document.routes}
        return wanted <= set(self._routes) and not self.recorder.halted

    def _recorder(self) -> Recorder:
        # a wide window halves the writer's work beside a busy engine; a mandatory event cuts it short
        return Recorder(self._ledger, run_id=self.run_id, component="serve", group_window_us=GROUP_WINDOW_US)

    async def _begin(self) -> None:
        reference = self.recorder.put_blob(self._deployment.document.canonical())
        await self.recorder.commit_async(
            "run.started",
            payload={
                "kind": "serve",
                "label": self._label,
                "deployment": self._deployment.digest,
                "folder": str(self._deployment.folder.absolute()),
                "hardware": self._hardware.digest,
            },
            input_ref=reference,
        )

    async def _open_stores(self, stack: AsyncExitStack) -> Stores:
        document = self._deployment.document
        try:
            index = ArticleIndex(self._deployment.index_path)
        except (OSError, sqlite3.Error) as error:
            raise _index_refused(document.retrieval.index_digest, f"unreadable: {error}") from error
        stack.callback(index.close)
        if index.digest != document.retrieval.index_digest:
            raise _index_refused(document.retrieval.index_digest, index.digest)
        limits = Limits(document, self._deployment.folder / "boundary.sqlite")
        stack.callback(limits.close)
        memory = MemoryStore(self._deployment.folder / "memory.sqlite")
        stack.callback(memory.close)
        tools = await stack.enter_async_context(ToolClient(self._deployment))
        health = RouteHealth(now_us=self._now_us, loaded=self._package_of, tell=self._tell_breaker)
        return Stores(
            deployment=self._deployment,
            index=index,
            limits=limits,
            memory=memory,
            health=health,
            tools=tools,
            now_us=self._now_us,
        )

    async def _started(self, package_digest: str) -> tuple[TextModel, GenerationService, str]:
        """Return the package's model and service, started once."""
        if package_digest not in self._services:
            engine_id = f"engine-{len(self._services)}"
            model = await asyncio.to_thread(self._load, package_digest)
            service = self._start_service(model, self._deployment.document.scheduling, self.recorder, engine_id)
            self._services[package_digest] = (model, service, engine_id)
        return self._services[package_digest]

    async def _close_services(self) -> None:
        services, self._services = self._services, {}
        for model, service, _ in services.values():
            close = getattr(service, "close", None)
            if close is not None:
                await asyncio.to_thread(close)
            if getattr(model.executor, "hosted", False):  # others may be shared with whoever loaded them
                await asyncio.to_thread(model.executor.close)

    def _now_us(self) -> int:
        return self._clock()[0]

    def _package_of(self, route: str) -> str | None:
        binding = self._routes.get(route)
        return None if binding is None else binding.artifact.package_digest

    def _tell_breaker(self, route: str, before: str, after: str) -> None:
        self.recorder.emit("breaker.changed", payload={"before": before, "after": after}, model_route=route)


def _ignore(stage: str, event: str) -> None:
    """Tell nobody."""


def _index_refused(wanted: str, found: str) -> RouteUnavailable:
    return RouteUnavailable(
        "The article index is not the one that the deployment names.",
        reason="index_mismatch",
        evidence={"artifact_digest": wanted, "validation_output": found},
        fix="Create the deployment again, or restore its corpus.sqlite.",
    )

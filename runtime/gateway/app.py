"""How is a request sent over HTTP?  One native endpoint, its streaming variant, and two health checks.

Bodies are read as bytes and judged by the boundary stage, so that a malformed one is recorded like every other request.
Nothing that a caller sent is echoed in an error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from runtime.engine.flow import Flow, MeteredReceiver
from runtime.engine.generation import TokenRecord
from runtime.errors import RequestRefused
from runtime.gateway.statuses import DOCUMENTED, retry_after, status_code
from runtime.gateway.streaming import EventStream, event
from runtime.serve.envelope import LARGEST_BODY_BYTES, CompletionTask, RequestEnvelope, ResponseEnvelope, parse_envelope
from runtime.serve.services import Outcome
from runtime.serve.session import ServingSession

OpenSession = Callable[[], AbstractAsyncContextManager[ServingSession]]


def create_app(open_session: OpenSession, *, stall_s: float = 5.0) -> FastAPI:
    """Return the gateway; the session is opened when it starts and closed when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with open_session() as session:
            app.state.session = session
            yield

    app = FastAPI(
        title="Replaylab",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        max_body_size=2 * LARGEST_BODY_BYTES,
        # FastAPI's own telemetry logs exception texts, which may hold what a caller sent
        telemetry={"logs": False},
    )
    app.openapi_version = "3.2.0"
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _fault)
    _add_health(app)
    _add_requests(app, stall_s)
    return app


def _add_health(app: FastAPI) -> None:
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", responses={503: {"description": "A route has no package, or evidence cannot be stored."}})
    async def ready(request: Request) -> JSONResponse:
        """Say whether requests can be served."""
        session: ServingSession = request.app.state.session
        routes = {name: binding.artifact.package_digest for name, binding in session.routes.items()}
        good = session.ready()
        return JSONResponse({"status": "ready" if good else "not_ready", "routes": routes}, 200 if good else 503)

    del live, ready  # registered by the decorator


def _add_requests(app: FastAPI, stall_s: float) -> None:
    body = {"content": {"application/json": {"schema": _inline(RequestEnvelope.model_json_schema())}}, "required": True}
    failed: dict[int | str, dict[str, Any]] = {
        code: {"model": ResponseEnvelope, "description": "The response envelope, with its failure."}
        for code in DOCUMENTED
        if code != 200
    }

    @app.post("/v1/requests", response_model=ResponseEnvelope, responses=failed, openapi_extra={"requestBody": body})
    async def submit(request: Request) -> Response:
        """Run one request; send `Authorization: Bearer KEY`."""
        session: ServingSession = request.app.state.session
        data = await request.body()
        outcome = await _unless_gone(request, session.run(data, bearer(request)))
        if outcome is None:
            return Response(status_code=499)
        return _answer(outcome)

    @app.post(
        "/v1/requests/stream",
        responses=failed
        | {200: {"content": {"text/event-stream": {}}, "description": "stage, token, response events"}},
        openapi_extra={"requestBody": body},
    )
    async def stream(request: Request) -> Response:
        """Run one request and send its progress as server-sent events, the response envelope last."""
        run = _StreamedRun(request.app.state.session, await request.body(), bearer(request))
        refused = await run.accepted()
        if refused is not None:
            return _answer(refused)
        return EventStream(run.events(), finish=run.close, stall_s=stall_s)

    del submit, stream


class _StreamedRun:
    """A request that runs while its events are sent."""

    def __init__(self, session: ServingSession, body: bytes, api_key: str | None) -> None:
        self._queue: asyncio.Queue[tuple[str, bool] | None] = asyncio.Queue()
        """Events, and whether each tells of a token."""
        self._flow = Flow()
        self._decided = asyncio.Event()
        self._refused = False
        self._completion = _is_completion(body)
        receiver = MeteredReceiver(self._on_token, self._flow)
        self._task = asyncio.ensure_future(session.run(body, api_key, on_token=receiver, on_stage=self._on_stage))
        self._task.add_done_callback(self._on_end)

    async def accepted(self) -> Outcome | None:
        """Wait for the boundary: None when the request entered, its outcome when it was refused there."""
        await self._decided.wait()
        return await self._task if self._refused or self._task.done() else None

    async def events(self) -> AsyncGenerator[str]:
        """Yield events until the terminal one; a token counts as taken when the connection took its event."""
        while (told := await self._queue.get()) is not None:
            sent, token = told
            yield sent
            if token:
                self._flow.take()
        yield event("response", self._task.result().response)

    async def close(self) -> None:
        """End the request, if it still runs, and wait for its end."""
        if not self._task.done():
            self._task.cancel()
        await asyncio.wait([self._task])

    def _on_stage(self, stage: str, what: str) -> None:
        self._queue.put_nowait((event("stage", {"stage": stage, "event": what}), False))
        if stage == "boundary" and what != "started":
            self._refused = what == "failed"
            self._decided.set()

    def _on_token(self, record: TokenRecord) -> None:
        shown: dict[str, Any] = {"position": record.position, "partial": True}
        if self._completion:  # structured output is shown when validation has accepted it, never before
            shown["token"] = record.token
        self._queue.put_nowait((event("token", shown), True))

    def _on_end(self, task: asyncio.Future[Outcome]) -> None:
        if not task.cancelled():
            task.exception()  # looked at here, raised to nobody else
        self._queue.put_nowait(None)
        self._decided.set()


def _is_completion(body: bytes) -> bool:
    try:
        return isinstance(parse_envelope(body).task, CompletionTask)
    except RequestRefused:
        return False


def bearer(request: Request) -> str | None:
    """Return the API key of the `Authorization` header, or None."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


async def _unless_gone(request: Request, running: Awaitable[Outcome]) -> Outcome | None:
    """Await a request; when its client leaves, cancel it and return None."""
    task = asyncio.ensure_future(running)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    return None if task.cancelled() else task.result()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(outcome: Outcome) -> JSONResponse:
    return JSONResponse(outcome.response, status_code(outcome.response), headers=retry_after(outcome.failure))


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    """Answer what FastAPI itself refuses, without the offending input."""
    fields = [
        {"field": ".".join(str(part) for part in item["loc"]), "problem": item["type"]}
        for item in (error.errors() if isinstance(error, RequestValidationError) else [])
    ]
    return JSONResponse({"error": "malformed_request", "fields": fields}, 422)


async def _fault(request: Request, error: Exception) -> JSONResponse:
    """Answer a fault of our own without its text."""
    return JSONResponse({"error": "internal", "kind": type(error).__name__}, 500)


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema whose references stand inside it, as an OpenAPI document needs them."""
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str):
                return resolve(definitions[reference.rsplit("/", 1)[1]])
            return {key: resolve(item) for key, item in value.items() if key != "discriminator"}
        return [resolve(item) for item in value] if isinstance(value, list) else value

    return resolve(schema)

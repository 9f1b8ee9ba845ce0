"""A session over a real ledger and a real tool server: record, switch a package, cancel, replay from the ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.canonical import digest
from manifests.run import Pins
from manifests.scheduling import SchedulingManifest
from runtime.effects import RecordedEffects
from runtime.engine.generation import GenerationRequest, GenerationResult, OnToken
from runtime.errors import RouteUnavailable
from runtime.serve.deployment import Deployment
from runtime.serve.envelope import RequestEnvelope
from runtime.serve.pipeline import run_request
from runtime.serve.services import Outcome, RequestIdentity, Services, request_columns
from runtime.serve.session import ServingSession, bind_route
from tests.runtime.serve.desk import PACKAGES, MemoryRecorder, Scripted, envelope, good_desk, hardware, model, questions
from traces.ledger.ledger import Ledger

OTHER = digest(b"another package")


class Slow(Scripted):
    """Generates for ever."""

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        await asyncio.sleep(3_600)
        raise RuntimeError("nobody waits so long")


def load(package: str) -> Any:
    if package == digest(b"broken"):
        raise RouteUnavailable("The package is damaged.", reason="package_refused", fix="Prepare it again.")
    return model(package, "bfloat16" if package == OTHER else "float32")


def within(
    ledger: Path,
    deployment: Deployment,
    work: Callable[[ServingSession], Awaitable[Any]],
    service: Scripted | None = None,
) -> Any:
    service = service or Scripted(good_desk(questions()))

    def start(loaded: Any, scheduling: SchedulingManifest, recorder: Any, engine_id: str) -> Scripted:
        return service

    async def body() -> Any:
        session = ServingSession(ledger, deployment, load=load, hardware=hardware(), start_service=start)
        async with session:
            return await work(session)

    return asyncio.run(body())


def replay(ledger: Ledger, deployment: Deployment, outcome: Outcome) -> Outcome:
    request_ref = outcome.response["request"]
    events = ledger.events(request_ref=request_ref)
    accepted = next(event for event in events if event.event_type == "request.accepted")
    request = RequestEnvelope.model_validate_json(ledger.read_blob(str(accepted.input_ref)))
    identity = RequestIdentity(
        request_ref=request_ref, trace_id=str(accepted.trace_id), arrived_us=accepted.payload["arrived_us"]
    )
    recorder = MemoryRecorder()
    effects = RecordedEffects(
        events, read_blob=ledger.read_blob, recorder=recorder, columns=request_columns(identity)
    )  # fmt: skip
    binding = bind_route(
        "primary", model(), Scripted(good_desk(questions())),
        scheduling=deployment.document.scheduling, hardware=hardware(), engine_id="engine-0",
    )  # fmt: skip
    services = Services(
        deployment=deployment.document, effects=effects, recorder=recorder, identity=identity,
        routes={"primary": binding}, mode="faithful", parent=request_ref,
    )  # fmt: skip
    return asyncio.run(run_request(request, services))


def test_a_session_records_what_a_replay_needs(tmp_path: Path, deployment: Deployment) -> None:
    asked = [questions(kind)[0] for kind in ("policy", "lookup", "ticket")]
    keys = deployment.keys()

    async def work(session: ServingSession) -> tuple[list[Outcome], Outcome]:
        assert session.ready()
        first = await asyncio.gather(*(session.run(envelope(one), keys[one.tenant]) for one in asked))
        await session.activate("primary", OTHER)
        with pytest.raises(RouteUnavailable):
            await session.activate("primary", digest(b"broken"))
        return list(first), await session.run(envelope(asked[0]), keys[asked[0].tenant])

    outcomes, after = within(tmp_path / "ledger", deployment, work)
    assert [outcome.failure for outcome in (*outcomes, after)] == [None] * 4
    assert after.response["route"]["precision"] == "bfloat16"
    assert outcomes[2].response["tools"][0]["result"]["ticket"] == "T-0001"
    ledger = Ledger(tmp_path / "ledger")
    ledger.drain()
    assert ledger.verify().ok
    for outcome in outcomes:
        again = replay(ledger, deployment, outcome)
        assert again.failure is None
        assert again.documents == outcome.documents
        assert again.pins == outcome.pins
    activated = ledger.events(event_type="package.activated")
    assert [event.status for event in activated] == ["ok", "ok", "ok", "error"]
    assert activated[-1].payload["kept"] == OTHER
    started = ledger.events(event_type="run.started")[0]
    assert ledger.read_blob(str(started.input_ref)) == deployment.document.canonical()
    manifest = ledger.events(request_ref=after.response["request"], event_type="request.manifest")[-1]
    assert Pins.from_documents(json.loads(ledger.read_blob(str(manifest.result_ref)))) == after.pins


def test_a_cancelled_request_ends_in_the_trace_and_gives_its_room_back(tmp_path: Path, deployment: Deployment) -> None:
    question = questions("policy")[0]

    async def work(session: ServingSession) -> None:
        running = asyncio.ensure_future(session.run(envelope(question), deployment.keys()[question.tenant]))
        await asyncio.sleep(0.3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    within(tmp_path / "ledger", deployment, work, Slow(good_desk([])))
    ledger = Ledger(tmp_path / "ledger")
    ledger.drain()
    (terminal,) = ledger.events(event_type="request.terminal")
    assert (terminal.status, terminal.error_type) == ("cancelled", "cancelled")
    assert terminal.payload["evidence"]["cancellation_origin"] == "caller"


def test_a_changed_index_is_refused_before_anything_is_served(tmp_path: Path, deployment: Deployment) -> None:
    import sqlite3

    with sqlite3.connect(deployment.index_path) as connection:
        connection.execute("DELETE FROM articles_0 WHERE rowid = 1")
    connection.close()

    async def work(session: ServingSession) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(RouteUnavailable, match="index"):
        within(tmp_path / "ledger", deployment, work)


def test_the_deployment_names_its_packages(deployment: Deployment) -> None:
    assert [route.package for route in deployment.document.routes] == list(PACKAGES.values())
    assert deployment.document.routes[0].fallback == ("spare",)
    assert oct((deployment.folder / "keyring.json").stat().st_mode)[-3:] == "600"
    assert all(key not in deployment.document.canonical().decode() for key in deployment.keys().values())
    assert Deployment.load(deployment.folder) == deployment


@pytest.mark.parametrize("refuse_at", ["request.accepted", "policy.decided"])
def test_a_caller_who_left_while_evidence_was_stored_leaves_there_in_a_replay(
    deployment: Deployment, refuse_at: str
) -> None:
    from tests.runtime.serve.desk import Desk

    desk = Desk(deployment)

    def leave(event_type: str, payload: dict[str, Any]) -> bool:
        task = asyncio.current_task()
        if event_type == refuse_at and task is not None:
            for other in asyncio.all_tasks():
                if other.get_name() == "caller":
                    other.cancel()
        return False

    desk.recorder.refuse = leave
    question = questions("lookup")[0]
    identity = desk.identity()
    services = desk.services_for(identity)

    async def body() -> None:
        key = deployment.keys()[question.tenant]
        caller = asyncio.create_task(run_request(envelope(question), services, api_key=key), name="caller")
        with pytest.raises(asyncio.CancelledError):
            await caller

    asyncio.run(body())
    desk.recorder.refuse = lambda event_type, payload: False
    (failed,) = desk.recorder.of("stage.failed")
    assert failed.error_type == "cancelled"
    child = MemoryRecorder()
    with pytest.raises(asyncio.CancelledError):
        desk.replay(identity.request_ref, recorder=child, cancelled_in=(failed.stage.value, failed.payload["ordinal"]))
    assert [event.stage for event in child.of("stage.failed")] == [failed.stage]
    desk.stores.close()

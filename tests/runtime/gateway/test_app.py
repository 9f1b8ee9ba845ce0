"""The HTTP gateway: statuses, streams, health, and nothing echoed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from runtime.gateway.app import _StreamedRun, create_app  # pyright: ignore[reportPrivateUsage]
from runtime.gateway.streaming import EventStream
from runtime.serve.deployment import Deployment, create_support_desk
from runtime.serve.envelope import LARGEST_BODY_BYTES
from runtime.serve.session import ServingSession
from tests.runtime.serve.desk import PACKAGES, SEED, Scripted, envelope, good_desk, hardware, model, questions
from traces.ledger.ledger import Ledger


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Deployment, Path]]:
    """Serve a desk once for all tests of this file."""
    folder = tmp_path_factory.mktemp("served")
    deployment = create_support_desk(folder / "desk", seed=SEED, packages=PACKAGES)
    service = Scripted(good_desk(questions()))

    def session() -> ServingSession:
        return ServingSession(
            folder / "ledger", deployment, load=model, hardware=hardware(), start_service=lambda *_: service
        )

    with TestClient(create_app(session), raise_server_exceptions=False) as client:
        yield client, deployment, folder / "ledger"


def bearer(deployment: Deployment, tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {deployment.keys()[tenant]}"}


def test_a_question_is_answered(served: tuple[TestClient, Deployment, Path]) -> None:
    client, deployment, _ = served
    question = questions("policy")[0]
    answer = client.post(
        "/v1/requests", content=envelope(question).model_dump_json(), headers=bearer(deployment, question.tenant)
    )
    assert answer.status_code == 200
    assert answer.json()["result"] == json.loads(question.expected[0])
    assert answer.json()["timing"]["total"] >= 0


@pytest.mark.parametrize(
    ("body", "with_key", "status"),
    [
        ("good", False, 401),
        ("good", True, 403),
        ("[]", True, 422),
        ('{"canary-in-a-field": "canary-in-a-value"}', True, 422),
        ("x" * (LARGEST_BODY_BYTES + 10), True, 413),
        ("x" * (3 * LARGEST_BODY_BYTES), True, 413),
    ],
)
def test_refusals_have_their_status_and_echo_nothing(
    served: tuple[TestClient, Deployment, Path], body: str, with_key: bool, status: int
) -> None:
    client, deployment, _ = served
    question = questions("policy")[0]
    other = "borealis" if question.tenant == "aurora" else "aurora"
    text = envelope(question).model_dump_json() if body == "good" else body
    for path in ("/v1/requests", "/v1/requests/stream"):
        answer = client.post(path, content=text, headers=bearer(deployment, other) if with_key else {})
        assert answer.status_code == status
        assert "canary-in-a-value" not in answer.text


def test_a_stream_tells_the_stages_and_ends_with_the_response(served: tuple[TestClient, Deployment, Path]) -> None:
    client, deployment, _ = served
    question = questions("lookup")[0]
    answer = client.post(
        "/v1/requests/stream", content=envelope(question).model_dump_json(), headers=bearer(deployment, question.tenant)
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    names = [lines[0].removeprefix("event: ") for lines in events]
    assert names[-1] == "response" and names.count("response") == 1
    assert "token" in names
    last = json.loads(events[-1][1].removeprefix("data: "))
    assert last["result"] == json.loads(question.expected[1])
    shown = [json.loads(lines[1].removeprefix("data: ")) for lines in events[:-1]]
    assert {"stage": "tooling", "event": "completed"} in shown
    assert last["result"]["answer"] not in json.dumps(shown)
    assert all(set(one) == {"position", "partial"} for one in shown if "position" in one)


def test_health_and_the_described_interface(served: tuple[TestClient, Deployment, Path]) -> None:
    client, _, _ = served
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json()["routes"] == PACKAGES
    described = client.get("/openapi.json").json()
    assert described["openapi"] == "3.2.0"
    assert {"200", "401", "422", "429", "503"} <= set(described["paths"]["/v1/requests"]["post"]["responses"])
    assert "$ref" not in json.dumps(described["paths"]["/v1/requests"]["post"]["requestBody"])
    assert client.get("/docs").status_code == 404


def test_every_http_request_is_in_the_trace(served: tuple[TestClient, Deployment, Path]) -> None:
    client, _, ledger = served
    before = {event.request_ref for event in _terminals(ledger)}
    refused = client.post("/v1/requests", content=b"{")
    (terminal,) = [event for event in _terminals(ledger) if event.request_ref not in before]
    assert terminal.request_ref == refused.json()["request"]
    assert terminal.error_type == "malformed_request"


def _terminals(ledger: Path) -> list[Any]:
    opened = Ledger(ledger)
    opened.drain()
    return opened.events(event_type="request.terminal")


class Endless:
    """A session whose requests enter and never end."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def run(self, body: bytes, api_key: str | None, *, on_token: Any, on_stage: Any) -> Any:
        on_stage("boundary", "started")
        on_stage("boundary", "completed")
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


@pytest.mark.parametrize("messages_taken", [0, 1, 2])
@pytest.mark.parametrize("leaves", [False, True])
def test_a_stalled_or_vanished_client_ends_its_request(messages_taken: int, leaves: bool) -> None:
    session = Endless()

    async def body() -> None:
        run = _StreamedRun(session, b"", None)  # type: ignore[arg-type]
        assert await run.accepted() is None
        taken: list[Any] = []

        async def send(message: Any) -> None:
            if len(taken) == messages_taken:
                if leaves:
                    raise OSError("the connection is gone")
                await asyncio.sleep(3_600)
            taken.append(message)

        stream = EventStream(run.events(), finish=run.close, stall_s=0.05)
        with contextlib.suppress(OSError):
            await stream.stream_response(send)

    asyncio.run(body())
    assert session.ended == ["cancelled"]

"""A slow client holds up its own request only, one that leaves frees what it held, one too many is told when to retry.

Real sockets, a live engine over a toy model.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from manifests.scheduling import SchedulingManifest
from runtime.engine.plan import StepPlan, decode_plan
from runtime.gateway.app import create_app
from runtime.serve.deployment import create_support_desk
from runtime.serve.session import ServingSession
from tests.runtime.engine.toy import ToyExecutor
from tests.runtime.serve.desk import PACKAGES, SEED, hardware, model
from traces.ledger.ledger import Ledger

TOKENS = 2_000
"""Enough events to fill every buffer between the engine and a client that does not read."""
SMALL = 4_096
"""Bytes of the sockets' buffers."""
SCHEDULING = SchedulingManifest(
    max_num_seqs=2, max_num_batched_tokens=64, num_blocks=300, batch_sizes=(1, 2), max_undelivered_tokens=16
)


class PausingExecutor(ToyExecutor):
    """Takes its time."""

    pause_s = 0.0

    def step(self, *arguments: Any, **more: Any) -> Any:
        """Wait a little."""
        if self.pause_s:
            time.sleep(self.pause_s)
        return super().step(*arguments, **more)


@dataclass
class Served:
    """A server on this machine."""

    port: int
    key: str
    ledger: Path
    executor: PausingExecutor

    def body(self, tokens: int) -> bytes:
        """Return a request for so many tokens."""
        return json.dumps(
            {
                "tenant": "aurora",
                "actor": "x",
                "task": {"kind": "completion", "prompt_tokens": [9, 8, 7, tokens % 700]},
                "generation": {"max_tokens": tokens},
                "model": {"allow_fallback": False},
            }
        ).encode()

    def open(self, tokens: int) -> socket.socket:
        """Send a streaming request for so many tokens and read nothing yet."""
        body = self.body(tokens)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.settimeout(60)
        client.connect(("127.0.0.1", self.port))
        head = f"POST /v1/requests/stream HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        return client

    def events(self, kind: str) -> list[Any]:
        """Return what was recorded so far."""
        ledger = Ledger(self.ledger)
        ledger.drain()
        return ledger.events(event_type=kind)

    def plans(self) -> list[StepPlan]:
        """Return the schedule so far."""
        return [decode_plan(event.payload["plan"]) for event in self.events("engine.step")]


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """Serve a live engine over the toy model with small socket buffers."""
    scheduling = SCHEDULING.model_copy(update=getattr(request, "param", {}))
    deployment = create_support_desk(tmp_path / "desk", seed=SEED, packages=PACKAGES, scheduling=scheduling)

    executor = PausingExecutor(vocab_size=768, max_positions=4_096)

    def load(package: str) -> Any:
        config = SimpleNamespace(vocab_size=768, max_positions=4_096)
        return SimpleNamespace(**vars(model(package)) | {"executor": executor, "config": config})

    session = ServingSession(tmp_path / "ledger", deployment, load=load, hardware=hardware())
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    app = create_app(lambda: session, stall_s=60)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield Served(listener.getsockname()[1], deployment.keys()["aurora"], tmp_path / "ledger", executor)
    server.should_exit = True
    thread.join(30)


def read_all(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Read a stream to its end: how many tokens it told of, and the response."""
    data = b""
    with contextlib.closing(client):
        while block := client.recv(1 << 16):
            data += block
    lines = [line for line in data.decode().splitlines() if line.startswith("data: ")]
    return data.count(b"event: token"), json.loads(lines[-1].removeprefix("data: "))


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait for something that the ledger will show."""
    for _ in range(1_000):
        if happened():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen in time")


def test_a_client_that_stops_reading_holds_up_only_its_own_request(served: Served) -> None:
    stalled = served.open(TOKENS)
    assert stalled.recv(64)
    others = [read_all(served.open(600)) for _ in range(4)]
    assert all((tokens, told["status"]) == (600, "ok") for tokens, told in others)
    held = [plan for plan in served.plans() if 0 in plan.held]
    assert len(held) > 600, "it was passed over while others went on"
    tokens, told = read_all(stalled)
    assert told["status"] == "ok" and len(told["result"]["tokens"]) == TOKENS
    assert tokens in (TOKENS, TOKENS - 1)  # the first event may have been read before
    ends = [event for event in served.events("engine.sequence") if event.payload["phase"] == "finished"]
    (mine,) = [event for event in ends if event.payload["index"] == 0]
    assert mine.payload["latency"]["delivery_us"] > mine.duration_us // 4
    assert sum(mine.payload["latency"].values()) == mine.duration_us


def test_a_stalled_client_that_leaves_frees_its_blocks(served: Served) -> None:
    stalled = served.open(TOKENS)
    assert stalled.recv(64)
    assert read_all(served.open(1_500))[0] == 1_500
    assert any(0 in plan.held for plan in served.plans())
    stalled.close()
    assert read_all(served.open(5))[1]["status"] == "ok"
    for _ in range(500):
        ends = [event for event in served.events("engine.sequence") if event.payload["phase"] == "finished"]
        if len(ends) == 3:
            break
        time.sleep(0.02)
    assert sorted(event.finish_reason for event in ends) == ["cancelled", "length", "length"]
    (gone,) = [event for event in ends if event.finish_reason == "cancelled"]
    assert (gone.payload["index"], gone.payload["cancel_origin"], gone.payload["partial"]) == (0, "caller", True)
    assert read_all(served.open(5))[1]["status"] == "ok"
    assert [one.reason for plan in served.plans() for one in plan.releases if one.sequence == 0] == ["cancelled"]
    terminals = served.events("request.terminal")
    assert len({event.request_ref for event in terminals}) == len(terminals) == 4


@pytest.mark.parametrize(
    "served",
    [{"max_num_seqs": 1, "batch_sizes": (1,), "max_num_queued_reqs": 1, "max_undelivered_tokens": None}],
    indirect=True,
)
def test_a_full_queue_answers_503_and_when_to_come_back(served: Served) -> None:
    served.executor.pause_s = 0.01
    running = served.open(600)
    assert running.recv(64)
    wait_for(lambda: bool(served.events("engine.step")))  # until its first step it stands in the queue itself
    waiting = served.open(5)
    wait_for(lambda: any(event.payload.get("index") == 1 for event in served.events("engine.sequence")))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(
            urllib.request.Request(
                f"http://127.0.0.1:{served.port}/v1/requests",
                data=served.body(6),
                headers={"authorization": f"Bearer {served.key}"},
            )
        )
    with caught.value as answer:
        failure = json.loads(answer.read())["failure"]
        assert answer.code == 503 and int(answer.headers["retry-after"]) >= 1
    assert (failure["reason"], failure["failure_class"]) == ("queue_full", "capacity_admission")
    assert read_all(running)[1]["status"] == read_all(waiting)[1]["status"] == "ok"
    (refused,) = served.events("engine.refused")
    assert refused.payload["evidence"]["queue_depth"] == 1 and refused.payload["evidence"]["retry_after_us"] > 0
    assert len(served.events("request.terminal")) == 3

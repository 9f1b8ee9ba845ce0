"""A prepared package, a live engine, the tool server and the ledger, all real; only the weights are random."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from runtime.gateway.sessions import serving_session
from runtime.models.random_checkpoint import random_checkpoint
from runtime.models.reference import prompt, task
from runtime.prepare.pipeline import prepare
from runtime.prepare.store import PackageStore
from runtime.serve.deployment import create_support_desk
from runtime.serve.services import Outcome
from tests.runtime.serve.desk import envelope
from traces.ledger.ledger import Ledger
from traces.stages import REQUEST_STAGES


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, list[Outcome]]:
    """Prepare, serve ten requests at once, and drain."""
    folder = tmp_path_factory.mktemp("whole")
    model = random_checkpoint(folder / "model", seed=1, vocab_size=768, num_layers=1)
    shutil.copy(Path(prompt.__file__).with_name("tokenizer.json"), model / "tokenizer.json")
    package = prepare(model, backend="eager", precision="float32", store=PackageStore(folder / "ledger"))
    deployment = create_support_desk(folder / "desk", seed=3, packages={"primary": package.digest})
    keys = deployment.keys()

    async def body() -> list[Outcome]:
        async with serving_session(folder / "ledger", deployment) as session:
            bodies = [envelope(one, generation={"max_tokens": 48}) for one in task.questions(3, 9)]
            raw = {"tenant": "aurora", "actor": "x", "task": {"kind": "completion", "prompt_tokens": [9, 8, 7]}}
            completion = session.run(json.dumps(raw | {"generation": {"max_tokens": 5}}).encode(), keys["aurora"])
            return await asyncio.gather(completion, *(session.run(one, keys[one.tenant]) for one in bodies))

    outcomes = asyncio.run(body())
    ledger = Ledger(folder / "ledger")
    ledger.drain()
    return ledger, outcomes


def test_every_request_ends_classified_and_durable(recorded: tuple[Ledger, list[Outcome]]) -> None:
    ledger, outcomes = recorded
    assert ledger.verify().ok
    assert outcomes[0].status == "ok" and len(outcomes[0].response["result"]["tokens"]) == 5
    for outcome in outcomes:
        assert outcome.status in ("ok", "review")
        (terminal,) = ledger.events(request_ref=outcome.response["request"], event_type="request.terminal")
        assert terminal.durability == "mandatory"
        assert json.loads(ledger.read_blob(str(terminal.result_ref))) == {
            name: value for name, value in outcome.response.items() if name != "timing"
        }


def test_every_stage_records_what_the_specification_lists(recorded: tuple[Ledger, list[Outcome]]) -> None:
    ledger, _ = recorded
    fields = {description.stage: set(description.record) for description in REQUEST_STAGES}
    completed = ledger.events(event_type="stage.completed")
    for event in completed:
        assert event.stage is not None and set(event.payload["record"]) == fields[event.stage]
        assert event.duration_us is not None and event.duration_us >= 0
    assert {event.stage for event in completed} >= set(fields) - {"b07"}


def test_the_three_engine_stages_follow_one_another_without_a_gap(recorded: tuple[Ledger, list[Outcome]]) -> None:
    ledger, outcomes = recorded
    for outcome in outcomes:
        events = ledger.events(request_ref=outcome.response["request"])
        ends = {
            (event.stage, event.attempt): event.mono_us for event in events if event.event_type == "stage.completed"
        }
        starts = {
            (event.stage, event.attempt): event.mono_us for event in events if event.event_type == "stage.started"
        }
        generations = [event for event in events if event.event_type == "engine.sequence" and "phase" in event.payload]
        turns = [attempt for stage, attempt in starts if stage == "b06"]
        assert len(turns) == len({event.payload["sequence_id"] for event in generations})
        for turn in turns:
            assert starts["b05", turn] == ends["b04", turn]
            assert starts["b06", turn] == ends["b05", turn]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signalled_server_records_its_end(recorded: tuple[Ledger, list[Outcome]], number: signal.Signals) -> None:
    folder = recorded[0].path.parent
    command = [sys.executable, "-m", "replaylab", "serve", "--ledger", str(folder / "ledger"), "--json",
               "--deployment", str(folder / "desk"), "--port", "0"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        started = json.loads(server.stdout.readline())
        with urllib.request.urlopen(f"{started['url']}/health/ready", timeout=30) as answer:
            assert json.load(answer)["status"] == "ready"
        server.send_signal(number)
        assert server.wait(timeout=60) == 0
    recorded[0].drain()
    (ended,) = recorded[0].events(run_id=started["run"], event_type="run.completed")
    assert ended.status == "ok"

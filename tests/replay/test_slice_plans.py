"""A slice is read without the rest of its run, and is all that a replay needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from manifests.scheduling import SchedulingManifest
from replay.generations import load_sequence_tables, load_sequences
from replay.records import load_run
from replay.slices import plans_of
from runtime.engine.loop import Engine
from runtime.engine.playback import PlanPlayer
from runtime.engine.slicing import Schedule
from tests.runtime.engine.recorded import requests_with_shared_prefixes
from tests.runtime.engine.toy import ToyExecutor, ToyModel
from traces.ledger.ledger import Ledger
from traces.recorder import Recorder

SCHEDULING = SchedulingManifest(max_num_seqs=8, max_num_batched_tokens=40, num_blocks=30)
REQUESTS = 120


def record_run(path: Path) -> Ledger:
    """A hundred and twenty requests of two tenants, eight at a time, through a live engine into a ledger."""
    requests = [
        msgspec.structs.replace(request, request_ref=f"req_{number:03}")
        for number, request in enumerate(
            requests_with_shared_prefixes(REQUESTS, seed=3, vocab_size=50, longest_output=30, stop=49)
        )
    ]
    with Recorder(path, run_id="run_1", component="engine") as recorder:
        recorder.commit("run.started", payload={"kind": "live"})
        with Engine(ToyModel(ToyExecutor()), SCHEDULING, recorder) as engine:
            for handle in [engine.submit(request) for request in requests]:
                handle.wait(60)
    ledger = Ledger(path)
    ledger.drain()
    return ledger


def test_the_plans_of_a_slice_are_read_alone_and_suffice(tmp_path: Path) -> None:
    """From the slice's steps only, each request replays to the bit; most steps of the run are never read."""
    ledger, executor = record_run(tmp_path), ToyExecutor()
    whole, read, foreign = ledger.step_count("run_1"), 0, 0
    for number in range(0, REQUESTS, 7):
        run = load_run(ledger, "run_1", only=[f"req_{number:03}"])
        assert list(run.requests) == [f"req_{number:03}"]
        assert not run.shared_of_type("engine.step")
        (request,) = run.requests.values()
        (sequence,) = load_sequences(ledger, request.events)
        assert sequence.request is not None
        assert sequence.result is not None
        (plans,) = plans_of(ledger, run).values()
        read += len(plans)
        (table,) = load_sequence_tables(request.events).values()
        player = PlanPlayer(executor, None, SCHEDULING, plans, table)
        playback = player.play(sequence.request, "faithful", sequence.result)
        assert playback.result.document() == sequence.result.document()
        foreign += playback.slice.prefix_calls > 0
        assert len(plans) < whole / 2
        lives = Schedule(plans, table, block_size=16).lives_of(sequence.sequence_id)
        assert [placed.step for life in lives for placed in life.rows] == list(sequence.result.steps)
    assert foreign > 3  # lineage was followed to sequences that ran before
    assert read < len(range(0, REQUESTS, 7)) * whole / 4


def test_a_sequence_without_a_recorded_end_has_all_steps_read(tmp_path: Path) -> None:
    """Nothing names its steps then."""
    ledger = record_run(tmp_path)
    run = load_run(ledger, "run_1", only=["req_050"])
    (request,) = run.requests.values()
    cut = [event for event in request.events if event.payload.get("phase") != "finished"]
    lost = replace(run, requests={"req_050": replace(request, events=tuple(cut))})
    (plans,) = plans_of(ledger, lost).values()
    assert len(plans) == ledger.step_count("run_1")

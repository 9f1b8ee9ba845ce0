"""What the engine writes into a real ledger is all that a replay needs, and no token stands in the open events."""

from __future__ import annotations

from pathlib import Path

from manifests.scheduling import SchedulingManifest
from runtime.engine.generation import decode_request, decode_result
from runtime.engine.loop import Engine
from runtime.engine.plan import SequenceEntry, decode_plan
from runtime.engine.playback import PlanPlayer
from tests.runtime.engine.recorded import requests_with_shared_prefixes
from tests.runtime.engine.toy import ToyExecutor, ToyModel
from traces.ledger.ledger import Ledger
from traces.recorder import Recorder

SCHEDULING = SchedulingManifest(max_num_seqs=4, max_num_batched_tokens=32, num_blocks=20)


def test_a_drained_ledger_replays_every_sequence(tmp_path: Path) -> None:
    """Plans, sequence table, requests and results are read back from DuckDB and blobs alone."""
    requests = requests_with_shared_prefixes(12, seed=8, vocab_size=50)
    with Recorder(tmp_path, run_id="run_engine", component="engine") as recorder:
        with Engine(ToyModel(ToyExecutor()), SCHEDULING, recorder, "engine-7") as engine:
            for handle in [engine.submit(request) for request in requests]:
                handle.wait(30)
        assert recorder.dropped == 0
    ledger = Ledger(tmp_path)
    ledger.drain()
    steps = ledger.events(run_id="run_engine", event_type="engine.step")
    lines = ledger.events(run_id="run_engine", event_type="engine.sequence")
    (started,) = ledger.events(run_id="run_engine", event_type="engine.started")
    scheduling = SchedulingManifest.from_document(started.payload["scheduling"])
    assert scheduling.digest == started.payload["scheduling_digest"] == SCHEDULING.digest
    player = PlanPlayer(
        ToyExecutor(),
        None,
        scheduling,
        [decode_plan(event.payload["plan"]) for event in steps],
        [
            SequenceEntry(event.payload["index"], event.payload["sequence_id"])
            for event in lines
            if event.payload["phase"] == "admitted"
        ],
    )
    inputs = [ledger.read_blob(event.input_ref) for event in lines if event.input_ref]
    results = {
        event.payload["sequence_id"]: decode_result(ledger.read_blob(event.result_ref))
        for event in lines
        if event.result_ref
    }
    assert len(inputs) == len(results) == 12
    for data in inputs:
        request = decode_request(data)
        assert request in requests
        result = results[request.sequence_id]
        assert player.replay(request, "faithful", result).document() == result.document()
    assert all(event.redaction_status == "clean" for event in (*steps, *lines))

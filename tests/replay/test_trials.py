"""Three hundred concurrent requests replay exactly on every backend, in every precision that it runs (make trials)."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from experiments.packages import prepare_package, reference_model
from experiments.recording import record_workload
from experiments.support_desk import support_desk_workload
from replay.batch import replay_requests
from runtime.prepare.store import PackageStore
from runtime.serve.deployment import create_support_desk
from traces.ledger.ledger import Ledger

REQUESTS = 300


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("eager", "float32"),
        ("eager", "bfloat16"),
        ("onnxruntime", "float32"),
        ("inductor", "float32"),
        ("inductor", "bfloat16"),
    ],
)
def test_every_faithful_replay_is_exact(
    backend: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger"
    package = prepare_package(reference_model(), backend=backend, precision=precision, ledger=ledger).digest
    desk = create_support_desk(tmp_path / "desk", seed=11, packages={"primary": package})
    workload = support_desk_workload(11, REQUESTS, mean_gap_us=20_000, temperature=0.7)
    recording = asyncio.run(record_workload(workload, ledger=ledger, deployment=desk, store=PackageStore(ledger)))
    store = Ledger(ledger)
    store.drain()
    faithful = Counter(done.verdict.verdict.value for done in replay_requests(store, recording.run_id))
    batches = [event.batch_size or 0 for event in store.events(run_id=recording.run_id, event_type="engine.step")]
    with capsys.disabled():
        print(f"\n{backend} {precision}: faithful {dict(faithful)}, largest batch {max(batches)}")
    assert faithful == {"exact": REQUESTS}
    assert max(batches) > 1

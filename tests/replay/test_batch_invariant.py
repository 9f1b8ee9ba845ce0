"""With a batch-invariant package a request has its bits by itself: replaying it without its batch is exact too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from replay.jobs import Job, Report
from replay.verdict import ReplayVerdict, Verdict
from replay.worker import run_job
from tests.replay.recorded import Recorded, prepare_packages, record


@pytest.fixture(scope="module")
def invariant(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The twelve requests, recorded in shared batches."""
    folder = tmp_path_factory.mktemp("invariant")
    prepared = prepare_packages(folder, backend="onnxruntime", precisions=("float32",), batch_invariant=True)
    return asyncio.run(record(folder, prepared))


def _verdicts(recorded: Recorded, mode: str) -> list[ReplayVerdict]:
    found: list[ReplayVerdict] = []

    def keep(report: Report) -> None:
        if report.kind == "verdict":
            found.append(ReplayVerdict.from_document(report.body["verdict"]))

    job = Job(
        ledger=Path(recorded.path), run_id=recorded.run_id, requests=recorded.references(), mode=mode, settings=()
    )
    run_job(job, keep)
    return found


@pytest.mark.parametrize("mode", ["alone", "faithful"])
def test_every_request_of_a_shared_batch_is_exact(invariant: Recorded, mode: str) -> None:
    verdicts = _verdicts(invariant, mode)
    assert len(verdicts) == 12
    assert [one.verdict for one in verdicts] == [Verdict.EXACT] * 12


def test_the_batches_were_shared(invariant: Recorded) -> None:
    """Else the test above would show nothing."""
    found = invariant.ledger.rows("SELECT max(batch_size) AS most FROM event WHERE event_type = 'engine.step'")
    assert found[0]["most"] > 2

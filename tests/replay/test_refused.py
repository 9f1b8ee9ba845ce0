"""What the engine's queue turned away is turned away again in a replay, though the load that filled it is not there."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

from experiments.recording import envelope_of
from experiments.workloads import WorkloadRequest
from manifests.scheduling import SchedulingManifest
from replay.jobs import Job, Report
from replay.worker import run_job
from runtime.models.reference import task
from runtime.prepare.load import load_package
from runtime.probe import probe
from runtime.serve.deployment import create_support_desk
from runtime.serve.session import ServingSession
from tests.replay.recorded import SEED, Recorded

SCHEDULING = SchedulingManifest(policy="fair", max_num_seqs=1, batch_sizes=(1,), max_num_queued_reqs=2)


async def _record(recorded: Recorded) -> str:
    """Send six requests at once to an engine that runs one and lets two wait; return the run."""
    deployment = create_support_desk(
        recorded.path / "deployments" / "narrow",
        seed=SEED,
        packages={"primary": recorded.packages["float32"]},
        scheduling=SCHEDULING,
    )
    session = ServingSession(
        recorded.path, deployment, load=lambda package: load_package(recorded.store, package), hardware=probe(threads=1)
    )
    tenant = task.TENANTS[0]
    async with session:
        bodies = [
            json.dumps(
                envelope_of(
                    WorkloadRequest(
                        at_us=0, tenant=tenant, prompt_tokens=(70, 71, place), generation={"max_tokens": 60}
                    )
                )
            ).encode()
            for place in range(64, 70)
        ]
        await asyncio.gather(*(session.run(body, deployment.keys()[tenant]) for body in bodies))
    return session.run_id


def test_a_request_that_met_a_full_queue_meets_it_again(recorded: Recorded) -> None:
    run_id = asyncio.run(_record(recorded))
    recorded.ledger.drain()
    ends = recorded.ledger.events(run_id=run_id, event_type="request.terminal")
    outcomes = Counter(event.error_type or event.status for event in ends)
    assert outcomes["queue_full"] >= 1 and outcomes["ok"] >= 2 and outcomes.total() == 6
    verdicts: list[tuple[str, str]] = []

    def say(report: Report) -> None:
        if report.kind == "verdict":
            verdicts.append((report.body["verdict"]["verdict"], report.body["verdict"]["detail"]))

    run_job(Job(ledger=recorded.path, run_id=run_id, requests=tuple(str(event.request_ref) for event in ends)), say)
    assert [verdict for verdict, _ in verdicts] == ["exact"] * 6, verdicts

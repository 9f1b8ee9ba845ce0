"""A caller who went away goes away again in the replay, at the same place."""

from __future__ import annotations

import asyncio
import json

import pytest

from experiments.recording import envelope_of
from experiments.workloads import WorkloadRequest
from replay.jobs import Job, Report
from replay.worker import run_job
from runtime.engine.generation import TokenRecord
from runtime.models.reference import task
from runtime.prepare.load import load_package
from runtime.probe import probe
from runtime.serve.session import ServingSession
from tests.replay.recorded import Recorded


async def _record_cancelled(recorded: Recorded, *, after_tokens: int) -> str:
    """Run three requests together; the caller of the second leaves after so many tokens (0: while it is queued)."""
    session = ServingSession(
        recorded.path,
        recorded.deployment,
        load=lambda package: load_package(recorded.store, package),
        hardware=probe(threads=1),
    )
    tenant = task.TENANTS[0]
    key = recorded.deployment.keys()[tenant]
    async with session:
        seen = 0
        tasks: list[asyncio.Task[object]] = []

        def note(_: TokenRecord) -> None:
            nonlocal seen
            seen += 1
            if seen == after_tokens:
                tasks[1].cancel()

        for place in range(3):
            request = WorkloadRequest(
                at_us=0, tenant=tenant, question=f"Question {place}?", generation={"max_tokens": 30, "seed": place}
            )
            body = json.dumps(envelope_of(request)).encode()
            tasks.append(asyncio.create_task(session.run(body, key, on_token=note if place == 1 else None)))
        if after_tokens == 0:
            await asyncio.sleep(0.005)
            tasks[1].cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(ended[1], asyncio.CancelledError)
    return session.run_id


@pytest.mark.parametrize("after_tokens", [0, 1, 7])
def test_a_cancelled_request_is_cancelled_again(recorded: Recorded, after_tokens: int) -> None:
    run_id = asyncio.run(_record_cancelled(recorded, after_tokens=after_tokens))
    recorded.ledger.drain()
    ends = recorded.ledger.events(run_id=run_id, event_type="request.terminal")
    assert sorted(str(event.status) for event in ends).count("cancelled") == 1
    verdicts: list[str] = []
    details: list[str] = []

    def say(report: Report) -> None:
        if report.kind == "verdict":
            verdicts.append(report.body["verdict"]["verdict"])
            details.append(report.body["verdict"]["detail"])

    wanted = tuple(str(event.request_ref) for event in ends)
    run_job(Job(ledger=recorded.path, run_id=run_id, requests=wanted), say)
    assert verdicts == ["exact"] * 3, details

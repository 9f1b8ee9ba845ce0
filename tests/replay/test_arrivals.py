"""What a live engine recorded is enough to plan it again: the simulated plans are the recorded ones."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from manifests.scheduling import SchedulingManifest
from replay.arrivals import load_history
from runtime.engine.loop import Engine
from runtime.engine.plan import StepPlan
from runtime.engine.settings import settings_for
from runtime.engine.simulation import KnownLengths, Simulation
from tests.runtime.engine.recorded import requests_with_shared_prefixes
from tests.runtime.engine.toy import ToyExecutor, ToyModel
from traces.ledger.ledger import Ledger
from traces.recorder import Recorder


def decided(plan: StepPlan) -> tuple[object, ...]:
    """What a plan decided; why a sequence ended is not the scheduler's."""
    return plan.step, plan.calls, plan.admissions, plan.allocations, plan.preemptions, len(plan.releases)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "deadline", "fair"])
def test_a_live_engine_is_planned_again_from_lengths(policy: str, tmp_path: Path) -> None:
    """Three waves of two tenants with preemptions, hits and a cancellation: every step is planned as it was.

    The tenant that looks shares prefixes among its requests; the other's are read as lengths.  Where the other's share
    prefixes that no recorded hit shows, a simulation cannot know it, and says so by not being faithful.
    """
    scheduling = SchedulingManifest(policy=policy, max_num_seqs=8, max_num_batched_tokens=40, num_blocks=22)
    model, draw = ToyModel(ToyExecutor()), random.Random(policy)
    requests = [
        msgspec.structs.replace(
            request,
            priority=draw.randrange(3),
            deadline_us=draw.choice([None, 60_000_000, 90_000_000]),
            prompt=request.prompt if number % 2 == 0 else (number, *request.prompt[1:]),
        )
        for number, request in enumerate(
            requests_with_shared_prefixes(24, seed=6, vocab_size=50, longest_output=30, stop=49)
        )
    ]
    with Recorder(tmp_path, run_id="run_1", component="engine") as recorder:
        recorder.commit("run.started", payload={"kind": "live"})
        with Engine(model, scheduling, recorder) as engine:
            for wave in range(3):
                handles = [engine.submit(request) for request in requests[wave * 8 : wave * 8 + 8]]
                if wave == 1:
                    handles[2].cancel("test")
                handles[0].wait(30)
            for handle in handles:
                handle.wait(30)
            engine.close(drain=True)
    ledger = Ledger(tmp_path)
    ledger.drain()
    settings = settings_for(scheduling, model.executor)
    events = ledger.events(run_id="run_1", event_type="engine.sequence")
    own = next(event.tenant_ref for event in events if event.payload["sequence_id"] == "sequence-0")
    history = load_history(ledger, "run_1", scheduling.engine_id, own=own, block_size=settings.block_size)
    simulated = [plan for _, plan in Simulation(settings, KnownLengths(history.outputs)).run(history.arrivals)]
    recorded = [history.plans[step] for step in sorted(history.plans)]
    for one, two in zip(simulated, recorded, strict=True):
        assert decided(one) == decided(two)
    assert sum(len(plan.preemptions) for plan in recorded) > 0
    assert any(admission.hits for plan in recorded for admission in plan.admissions)
    assert all(min(arrival.prompt) < 0 for arrival in history.arrivals if arrival.tenant != own)

"""What was scheduled once is scheduled the same now, byte for byte, under the same digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manifests.scheduling import SchedulingManifest
from runtime.engine.plan import decode_plan
from runtime.engine.scheduler import complete_step, new_state, plan_step, submit, withdraw
from runtime.engine.settings import Settings

FOLDER = Path(__file__).parents[2] / "histories"
HISTORIES: list[dict[str, Any]] = [
    history
    for name in ("fcfs_plans.json", "fcfs_stable_rows_plans.json")
    for history in json.loads((FOLDER / name).read_text())
]


@pytest.mark.parametrize("history", HISTORIES)
def test_recorded_arrivals_give_the_recorded_plans(history: dict[str, Any]) -> None:
    """The document keeps its digest, and the plans are the same text."""
    manifest = SchedulingManifest.from_bytes(history["scheduling"].encode(), history["digest"])
    assert manifest.digest == history["digest"]
    state = new_state(Settings.of(manifest, max_positions=64, max_batch=8, max_tokens=16, max_context=64))
    plans: list[str] = []
    for kind, *rest in history["script"]:
        if kind == "submit":
            index, prompt, more, tenant = rest
            submit(state, index, prompt=tuple(prompt), max_tokens=more, tenant=tenant)
        elif kind == "withdraw":
            assert withdraw(state, rest[0], reason=rest[1])
        else:
            plan, state = plan_step(state)
            plans.append(plan.encode())
            sampled = {
                row.sequence: (row.sequence + row.start) % 5 for call in plan.calls for row in call.rows if row.sample
            }
            complete_step(state, plan, sampled)
    assert plans == history["plans"]
    assert [decode_plan(text).encode() for text in plans] == plans
    assert any("kv_full" in text for text in plans)

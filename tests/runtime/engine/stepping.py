"""Small scheduler settings, and steps in which every sampling row gets the same token."""

from __future__ import annotations

from manifests.scheduling import SchedulingManifest
from runtime.engine.plan import StepPlan
from runtime.engine.scheduler import SchedulerState, complete_step, plan_step
from runtime.engine.settings import Settings

BLOCK = 4


def settings_of(**changes: object) -> Settings:
    """Small settings with blocks of four tokens."""
    fields: dict[str, object] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 12,
        "block_size": BLOCK,
        "num_blocks": 12,
        "context_multiple": 8,
        "batch_sizes": (1, 2, 4),
    }
    manifest = SchedulingManifest.model_validate(fields | changes)
    return Settings.of(manifest, max_positions=64, max_batch=8, max_tokens=16, max_context=64)


def run(state: SchedulerState, steps: int = 1) -> list[StepPlan]:
    """Run some steps, sampling token 3 everywhere."""
    plans: list[StepPlan] = []
    for _ in range(steps):
        plan, state = plan_step(state)
        complete_step(state, plan, {row.sequence: 3 for call in plan.calls for row in call.rows if row.sample})
        plans.append(plan)
    return plans

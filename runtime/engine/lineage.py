"""Which step computed what stood in each cache block, and who read it?  Block by block, from the plans alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.engine.errors import PlanMissing
from runtime.engine.plan import StepPlan


@dataclass(slots=True)
class BlockContent:
    """What one block held from one allocation to the next."""

    block: int
    writer: int
    """Index of the sequence that computed it."""
    position: int
    """Position of its first token in that sequence."""
    since: int
    """Step that gave the block out for it."""
    until: int | None = None
    """Step that gave the block out for something else; None while nothing did."""
    steps: list[int] = field(default_factory=list[int])
    """Steps that computed its tokens, ascending."""
    readers: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Other admissions that began with it: sequence, and step."""


def block_lineage(plans: Iterable[StepPlan], *, block_size: int) -> dict[int, list[BlockContent]]:
    """Return every block's contents in order of time.

    plans: all plans of one engine from its first step on.  Raises PlanMissing where one is missing.
    """
    contents: dict[int, list[BlockContent]] = {}
    tables: dict[int, list[BlockContent]] = {}
    for expected, plan in enumerate(sorted(plans, key=lambda one: one.step)):
        if plan.step != expected:
            raise PlanMissing(
                f"step {expected} was not recorded, so what followed it is not known",
                reason="plan_missing",
                evidence={"record_type": "engine.step", "step": expected},
            )
        for gone in (*plan.releases, *plan.preemptions, *plan.refusals):
            tables.pop(gone.sequence, None)
        for admission in plan.admissions:
            table = tables[admission.sequence] = [contents[hit.block][-1] for hit in admission.hits]
            for content in table:
                content.readers.append((admission.sequence, plan.step))
        for index, *blocks in plan.allocations:
            for block in blocks:
                _give_out(contents, tables[index], block, index, plan.step, block_size)
        for call in plan.calls:
            for row in call.rows:
                first, last = row.start // block_size, (row.start + row.count - 1) // block_size
                for content in tables[row.sequence][first : last + 1]:
                    content.steps.append(plan.step)
    return contents


def _give_out(
    contents: dict[int, list[BlockContent]], table: list[BlockContent], block: int, index: int, step: int, size: int
) -> None:
    history = contents.setdefault(block, [])
    if history:
        history[-1].until = step
    history.append(BlockContent(block, index, len(table) * size, step))
    table.append(history[-1])

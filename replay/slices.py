"""Which recorded steps does one request's replay need?  Its own and those of its lineage, read without the others.

What is read grows with the request's own time in the engine, never with the length of the run: the steps from its first
row to its last, and, for each shared block, backwards from the row that computed it to that sequence's admission.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from replay.generations import RecordedSequence, load_plans, load_sequences
from replay.records import RecordedRun
from runtime.engine.plan import StepPlan, decode_plan

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger

LOOK_BACK = 64
"""Steps that are read at first when a sequence's admission lies before what is known; each look is twice as long."""


FEW = 16
"""Requests up to which slices are read one by one; for more, the whole run is read at once."""


def plans_of(ledger: Ledger, run: RecordedRun) -> dict[str, tuple[StepPlan, ...]]:
    """Return the plans of each engine that the run's requests need, ascending: all, or those of their slices only."""
    if run.whole:
        return load_plans(run.shared)
    slices: dict[str, SlicePlans] = {}
    for request in run.requests.values():
        for sequence in load_sequences(ledger, request.events):
            engine = sequence.engine_id
            slices.setdefault(engine, SlicePlans(ledger, run.run_id, engine)).add(sequence)
    return {engine: tuple(one.plans[step] for step in sorted(one.plans)) for engine, one in slices.items()}


class SlicePlans:
    """The plans of one recorded engine, read as they are needed."""

    def __init__(self, ledger: Ledger, run_id: str, engine_id: str) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._engine_id = engine_id
        self._asked: set[int] = set()
        self.plans: dict[int, StepPlan] = {}
        """By step; a step that was asked for and is not here was never recorded."""

    def add(self, sequence: RecordedSequence) -> None:
        """Read the slice of one sequence; all steps where its end, which names its own, was not recorded."""
        if sequence.result is None:
            self.read(0, self._ledger.step_count(self._run_id))
            return
        steps = sequence.result.steps
        if not steps:
            return
        self.read(min(steps), max(steps))
        self._follow_hits(range(min(steps), max(steps) + 1), of={sequence.index})

    def read(self, first: int, last: int) -> None:
        """Read the steps from `first` to `last` that were not read yet."""
        missing = [step for step in range(first, last + 1) if step not in self._asked]
        if not missing:
            return
        self._asked.update(missing)
        for event in self._ledger.steps(self._run_id, self._engine_id, first=missing[0], last=missing[-1]):
            plan = decode_plan(event.payload["plan"])
            self.plans[plan.step] = plan

    def _follow_hits(self, steps: Iterable[int], *, of: set[int]) -> None:
        """Read the lives that computed the blocks which these sequences read in these steps, and what those read."""
        work = [(step, index) for step in steps for index in of]
        seen: set[tuple[int, int]] = set()
        while work:
            step, index = work.pop()
            plan = self.plans.get(step)
            if plan is None or (step, index) in seen:
                continue
            seen.add((step, index))
            for admission in plan.admissions:
                if admission.sequence == index:
                    work += [found for hit in admission.hits if (found := self._source(hit.step, hit.call, hit.row))]

    def _source(self, step: int, call: int, row: int) -> tuple[int, int] | None:
        """Read back from the row that computed a block to the admission of its sequence; None where it was lost."""
        self.read(step, step)
        plan = self.plans.get(step)
        if plan is None or call >= len(plan.calls) or row >= len(plan.calls[call].sequences):
            return None
        index = plan.calls[call].sequences[row]
        begin, look = step, LOOK_BACK
        while True:
            for before in range(step, begin - 1, -1):
                plan = self.plans.get(before)
                if plan is not None and any(one.sequence == index for one in plan.admissions):
                    return before, index
            if begin == 0:
                return None
            step, begin = begin - 1, max(0, begin - look)
            self.read(begin, step)
            look *= 2

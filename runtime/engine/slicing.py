"""Which rows of a recorded schedule does one sequence depend on?  Its own, and those that computed blocks it read.

A sequence has a life for every admission: a preempted one is admitted again and recomputed.  A life reads its first
blocks from the cache where the plan says so; each such hit names the row that completed the block, so the rows before
it in that row's life computed the prefix.  They may have hit earlier blocks themselves, and so on.  Block ids are not
needed for any of this: bits depend on contents, never on where they lie.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.engine.errors import PlanMissing
from runtime.engine.plan import Call, Hit, Row, SequenceEntry, StepPlan

Needs = Mapping[tuple[int, int], tuple["Life", int]]
"""Lives, by their keys, that must be computed first, and how many of their first tokens."""


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row and the place in the schedule where it ran."""

    step: int
    call_number: int
    position: int
    call: Call
    row: Row


@dataclass(slots=True)
class Life:
    """One admission of a sequence and the rows it ran until it ended or was preempted."""

    sequence: int
    number: int
    step: int
    known: int
    """Tokens known at the admission."""
    hits: list[Hit]
    rows: list[PlacedRow] = field(default_factory=list[PlacedRow])

    @property
    def key(self) -> tuple[int, int]:
        """Names the life: sequence index and which admission of it."""
        return self.sequence, self.number


class Schedule:
    """The recorded plans of one engine, ready to be asked about one sequence."""

    def __init__(self, plans: Iterable[StepPlan], sequences: Iterable[SequenceEntry], *, block_size: int) -> None:
        self._block_size = block_size
        self._plans = {plan.step: plan for plan in plans}
        self._index_of = {entry.sequence_id: entry.index for entry in sequences}
        self._lives: dict[int, list[Life]] = {}
        for step in sorted(self._plans):
            self._read(self._plans[step])

    def _read(self, plan: StepPlan) -> None:
        for admission in plan.admissions:
            lives = self._lives.setdefault(admission.sequence, [])
            lives.append(Life(admission.sequence, len(lives), plan.step, admission.known, admission.hits))
        for number, call in enumerate(plan.calls):
            for position, index in enumerate(call.sequences):
                lives = self._lives.get(index)
                if lives:
                    lives[-1].rows.append(PlacedRow(plan.step, number, position, call, call.row(position)))

    def plan(self, step: int) -> StepPlan | None:
        """Return the plan of one step, or None when it is not here."""
        return self._plans.get(step)

    def with_lives(self, index: int, lives: list[Life]) -> Schedule:
        """Return the same schedule with other lives for one sequence, such as edited ones; the plans are shared."""
        other = copy.copy(self)
        other._lives = self._lives | {index: lives}
        return other

    def index_of(self, sequence_id: str) -> int | None:
        """Return a sequence's index in the plans; None when the sequence table does not name it."""
        return self._index_of.get(sequence_id)

    def knows(self, sequence_id: str) -> bool:
        """Tell whether the sequence table names this sequence."""
        return sequence_id in self._index_of

    def lives_of(self, sequence_id: str) -> list[Life]:
        """Return all lives of a sequence in order; raises PlanMissing when the schedule does not know it whole."""
        index = self._index_of.get(sequence_id)
        if index is None:
            raise _missing(f"the sequence table has no {sequence_id!r}", {"sequence_id": sequence_id})
        lives = self._lives.get(index, [])
        for life in lives:
            self._check(life, len(life.hits) * self._block_size)
        return lives

    def source_of(self, hit: Hit) -> Life:
        """Return the life that computed a hit block; raises PlanMissing when its steps were not recorded."""
        plan = self._plans.get(hit.step)
        if plan is None or hit.call >= len(plan.calls) or hit.row >= len(plan.calls[hit.call].sequences):
            raise _missing(f"step {hit.step}, which computed a shared block, was not recorded", {"step": hit.step})
        index = plan.calls[hit.call].sequences[hit.row]
        found = [life for life in self._lives.get(index, []) if life.step <= hit.step]
        if not found:
            raise _missing(f"the admission of sequence {index} was not recorded", {"sequence": index})
        self._check(found[-1], len(found[-1].hits) * self._block_size, last_step=hit.step)
        return found[-1]

    def needs(self, life: Life, *, own: int) -> dict[tuple[int, int], tuple[Life, int]]:
        """Find what must be computed before `life` can start: lives and how many of their first tokens.

        own: the replayed sequence's index; its earlier lives are on hand already and are named but not followed.
        """
        needed: dict[tuple[int, int], tuple[Life, int]] = {}
        work = [(life, len(life.hits))]
        while work:
            reader, blocks = work.pop()
            for block, hit in enumerate(reader.hits[:blocks]):
                source = self.source_of(hit)
                upto = (block + 1) * self._block_size
                if needed.get(source.key, (source, 0))[1] < upto:
                    needed[source.key] = (source, upto)
                    if source.sequence != own:
                        work.append((source, block + 1))
        return needed

    def reads(self, life: Life, needs: Needs) -> Counter[tuple[int, int]]:
        """Count the blocks that a life and its sources will take over from each source."""
        readers = [(life, len(life.hits))]
        readers += [
            (source, upto // self._block_size) for source, upto in needs.values() if source.sequence != life.sequence
        ]
        return Counter(self.source_of(hit).key for reader, blocks in readers for hit in reader.hits[:blocks])

    def most_blocks(self, lives: Sequence[Life], needs: Sequence[Needs], *, longest: int) -> int:
        """Bound the blocks that a replay of these lives has in use at once.

        needs: those of each life.  longest: blocks of the longest sequence, which the last life may become.
        """
        most = kept = 0
        for life, needed in zip(lives, needs, strict=True):
            others = [
                (source, upto // self._block_size)
                for source, upto in needed.values()
                if source.sequence != life.sequence
            ]
            computed = sum(blocks - min(len(source.hits), blocks) for source, blocks in others)
            most = max(most, kept + computed + longest)
            end = max((placed.row.start + placed.row.count for placed in life.rows), default=0)
            kept += -(-end // self._block_size)
        return most

    def _check(self, life: Life, start: int, *, last_step: int | None = None) -> None:
        """Refuse a life whose rows do not follow one another: a step between them was lost.

        last_step: what came after it is not needed, and need not be here.
        """
        for placed in life.rows:
            if last_step is not None and placed.step > last_step:
                return
            if placed.row.start != start:
                raise _missing(
                    f"a step before step {placed.step} is missing: sequence {life.sequence} jumps from token {start} "
                    f"to {placed.row.start}",
                    {"sequence": life.sequence, "before_step": placed.step},
                )
            start += placed.row.count


def _missing(message: str, evidence: dict[str, object]) -> PlanMissing:
    return PlanMissing(
        message,
        reason="plan_missing",
        evidence={"record_type": "engine.step", **evidence},
        fix="replay with --mode alone, which needs no schedule",
    )

"""What would the scheduler plan if requests arrived at other times?  The scheduler itself, with answers that are given.

Time runs in ticks: one a step while there is work, and straight on to the next arrival while there is none.  Who
answers (`Answers`) may be a real executor, or a table of how long each output was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from runtime.engine.plan import StepPlan
from runtime.engine.scheduler import SchedulerState, complete_step, new_state, plan_step, submit, withdraw
from runtime.engine.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A sequence that enters before the step of its tick is planned.

    prompt: token ids, or any numbers that are equal where the prompts are.
    leaves: tick at which its caller cancels or its deadline passes; None stays to its end.
    """

    index: int
    tick: int
    prompt: tuple[int, ...]
    max_tokens: int
    tenant: str
    salt: str = ""
    leaves: int | None = None
    reason: str = "cancelled"
    """Why it leaves."""


class Answers(Protocol):
    """Says what each step computes."""

    def answer(self, plan: StepPlan, state: SchedulerState) -> tuple[Mapping[int, int], Mapping[int, str]]:
        """Return the sampled token of each sequence that samples, and why those end that do."""
        ...


def simulate(settings: Settings, arrivals: Iterable[Arrival], answers: Answers) -> Iterator[tuple[int, StepPlan]]:
    """Plan step after step until all sequences have ended, yielding each plan with its tick.

    Arrivals of one tick enter in the order given.  Raises SequenceRefused for a sequence that can never fit.
    """
    state = new_state(settings)
    pending = deque(sorted(arrivals, key=lambda one: one.tick))
    leaving = deque(sorted((one for one in pending if one.leaves is not None), key=lambda one: one.leaves or 0))
    tick = 0
    while pending or state.has_work:
        if not state.has_work:
            tick = max(tick, pending[0].tick)
        while pending and pending[0].tick <= tick:
            _enter(state, pending.popleft())
        while leaving and (leaving[0].leaves or 0) <= tick:
            gone = leaving.popleft()
            withdraw(state, gone.index, reason=gone.reason)
        if state.has_work:
            plan, state = plan_step(state)
            sampled, ended = answers.answer(plan, state)
            complete_step(state, plan, sampled)
            yield tick, plan
            for index, reason in ended.items():
                withdraw(state, index, reason=reason)
        tick += 1


def _enter(state: SchedulerState, one: Arrival) -> None:
    submit(state, one.index, prompt=one.prompt, max_tokens=one.max_tokens, tenant=one.tenant, salt=one.salt)


class KnownLengths:
    """Answers with outputs whose lengths are known and whose tokens are stand-ins.

    lengths: output tokens of each sequence before it stops by itself.
    outputs: token ids to answer with, for sequences whose output others may read from the cache; others get numbers
    that no prompt has.
    """

    def __init__(self, lengths: Mapping[int, int], outputs: Mapping[int, tuple[int, ...]] | None = None) -> None:
        self._lengths = lengths
        self._outputs = outputs or {}
        self._given: dict[int, int] = {}

    def answer(self, plan: StepPlan, state: SchedulerState) -> tuple[Mapping[int, int], Mapping[int, str]]:
        """Give every sampling row its next token; end those that have all theirs."""
        sampled: dict[int, int] = {}
        ended: dict[int, str] = {}
        for call in plan.calls:
            for row in call.rows:
                if not row.sample:
                    continue
                place = self._given.get(row.sequence, 0)
                self._given[row.sequence] = place + 1
                known = self._outputs.get(row.sequence, ())
                sampled[row.sequence] = known[place] if place < len(known) else -1 - row.sequence * 1_000_000 - place
                if place + 1 >= self._lengths[row.sequence]:
                    ended[row.sequence] = "stop"
        return sampled, ended

"""What would the scheduler plan if requests arrived at other times?  The scheduler itself, with answers that are given.

Time runs in ticks: one a step while there is work, and straight on to the next arrival while there is none.  Who
answers (`Answers`) may be a real executor, or a table of how long each output was.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from runtime.engine.errors import SequenceRefused
from runtime.engine.plan import StepPlan
from runtime.engine.scheduler import complete_step, new_state, plan_step, submit, withdraw
from runtime.engine.settings import Settings
from runtime.engine.state import SchedulerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A sequence that enters before the step of its tick is planned.

    prompt: token ids, or any numbers that are equal where the prompts are.
    leaves: tick at which its caller cancels or its deadline passes; None stays to its end.
    reason: why it leaves.
    priority, deadline_us, now_us: what orders it, as `scheduler.submit` has it.
    """

    index: int
    tick: int
    prompt: tuple[int, ...]
    max_tokens: int
    tenant: str
    salt: str = ""
    leaves: int | None = None
    reason: str = "cancelled"
    priority: int = 0
    deadline_us: int | None = None
    now_us: int = 0


class Answers(Protocol):
    """Says what each step computes."""

    def answer(self, plan: StepPlan, state: SchedulerState) -> tuple[Mapping[int, int], Mapping[int, str]]:
        """Return the sampled token of each sequence that samples, and why those end that do."""
        ...


class Simulation:
    """An engine's steps without an engine.  Arrivals of one tick enter in the order given."""

    def __init__(self, settings: Settings, answers: Answers) -> None:
        self.state = new_state(settings)
        self.answers = answers
        self.tick = 0
        self.refused: list[int] = []
        """Sequences that the queue did not take."""

    def copy(self) -> Simulation:
        """Return one that goes on from here by itself."""
        return copy.deepcopy(self)

    def run(self, arrivals: Iterable[Arrival], *, until: int | None = None) -> Iterator[tuple[int, StepPlan]]:
        """Plan step after step until all sequences have ended, yielding each plan with its tick.

        until: stop before this tick, though there is work.
        """
        pending = deque(sorted(arrivals, key=lambda one: one.tick))
        leaving = deque(sorted((one.leaves, one.index, one.reason) for one in pending if one.leaves is not None))
        while pending or self.state.has_work:
            if not self.state.has_work:
                self.tick = max(self.tick, pending[0].tick)
            if until is not None and self.tick >= until:
                return
            while pending and pending[0].tick <= self.tick:
                self._enter(pending.popleft())
            while leaving and leaving[0][0] <= self.tick:
                _, index, reason = leaving.popleft()
                withdraw(self.state, index, reason=reason)
            if self.state.has_work:
                yield self.tick, self._step()
            self.tick += 1

    def _step(self) -> StepPlan:
        plan, self.state = plan_step(self.state)
        sampled, ended = self.answers.answer(plan, self.state)
        complete_step(self.state, plan, sampled)
        for index, reason in ended.items():
            withdraw(self.state, index, reason=reason)
        return plan

    def _enter(self, one: Arrival) -> None:
        try:
            submit(
                self.state,
                one.index,
                prompt=one.prompt,
                max_tokens=one.max_tokens,
                tenant=one.tenant,
                salt=one.salt,
                priority=one.priority,
                deadline_us=one.deadline_us,
                now_us=one.now_us,
            )
        except SequenceRefused:
            self.refused.append(one.index)


class KnownLengths:
    """Answers with outputs whose lengths are known.

    outputs: of each sequence, token ids or any numbers that are equal where the outputs are; it ends with the last.
    """

    def __init__(self, outputs: Mapping[int, tuple[int, ...]]) -> None:
        self._outputs = outputs
        self._given: dict[int, int] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> KnownLengths:
        other = KnownLengths(self._outputs)
        other._given = dict(self._given)
        return other

    def answer(self, plan: StepPlan, state: SchedulerState) -> tuple[Mapping[int, int], Mapping[int, str]]:
        """Give every sampling row its next token; end those that have all theirs."""
        sampled: dict[int, int] = {}
        ended: dict[int, str] = {}
        for call in plan.calls:
            silent = frozenset(call.silent)
            for row, index in enumerate(call.sequences):
                if row in silent:
                    continue
                place, output = self._given.get(index, 0), self._outputs[index]
                self._given[index] = place + 1
                sampled[index] = output[place] if place < len(output) else 0
                if place + 1 >= len(output):
                    ended[index] = "stop"
        return sampled, ended

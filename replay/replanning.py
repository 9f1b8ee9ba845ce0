"""What would a request have computed had arrivals been otherwise?  Its slice of the plan that the scheduler then makes.

The engine is simulated up to shortly before the request's arrival once; from there on each question plans again with
some arrivals moved, and replays the request's slice with stand-ins for all other rows.  Slices of the same shapes give
the same bits and are replayed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from replay.arrivals import EngineHistory
from replay.blame import parting
from runtime.engine.edited_replays import EditedReplays
from runtime.engine.generation import TokenRecord
from runtime.engine.plan import StepPlan
from runtime.engine.simulation import Arrival, KnownLengths, Simulation
from runtime.engine.slice_shapes import slice_shapes
from runtime.engine.slicing import Schedule
from traces.failures import ClassifiedError

WARM_UP = 256
"""Ticks before the request's arrival from which on arrivals may be moved; what came before stays as it was."""


class Replanner:
    """Plans again around one sequence of a recorded engine, and replays it.

    index: the sequence's, in the engine's plans.  recorded: its token records.
    """

    def __init__(
        self, replays: EditedReplays, history: EngineHistory, index: int, recorded: tuple[TokenRecord, ...]
    ) -> None:
        self.index = index
        self.recorded = recorded
        self._replays = replays
        self._tick_us = history.tick_us
        arrivals = [replace(one, leaves=None) if one.index == index else one for one in history.arrivals]
        own = next(one for one in arrivals if one.index == index)
        self.first_tick = max(0, own.tick - WARM_UP)
        self.moving = [one for one in arrivals if one.tick >= self.first_tick]
        before = [one for one in arrivals if one.tick < self.first_tick]
        self._start = Simulation(replays.settings, KnownLengths(history.outputs))
        self._begun = [plan for _, plan in self._start.run(before, until=self.first_tick)] if before else []
        shapes = self.shapes(replays.schedule)
        self._known: dict[Hashable, tuple[TokenRecord, ...]] = {} if shapes is None else {shapes: recorded}
        self.faithful = self.shapes(self.schedule(lambda one: 0)) in self._known
        """Whether the simulation with nothing moved gives the recorded slice."""

    def schedule(self, move: Callable[[Arrival], int]) -> Schedule:
        """Return the plans with each arrival moved by some ticks, as far as the sequence runs."""
        plans: list[StepPlan] = list(self._begun)
        given = 0
        for _, plan in self._start.copy().run([self._moved(one, move(one)) for one in self.moving]):
            plans.append(plan)
            given += sum(row.sample for call in plan.calls for row in call.rows if row.sequence == self.index)
            if given >= len(self.recorded):
                break
        return self._replays.schedule_like(plans)

    def shapes(self, schedule: Schedule) -> Hashable | None:
        """Return the shapes of the sequence's slice; None where the schedule does not hold it whole."""
        try:
            return slice_shapes(schedule, self._replays.request.sequence_id, tokens=len(self.recorded))
        except ClassifiedError:
            return None

    def outcome(self, schedule: Schedule) -> tuple[int | None, int | None]:
        """Return the first output tokens at which bits and at which tokens part from the recorded ones."""
        found = self.records(schedule)
        return parting("bits", self.recorded, found), parting("tokens", self.recorded, found)

    def records(self, schedule: Schedule) -> tuple[TokenRecord, ...]:
        """Return the sequence's token records along a schedule.

        Raises PlanMissing where the schedule lacks the slice, and the executor's errors.
        """
        shapes = self.shapes(schedule)
        if shapes not in self._known:
            lives = schedule.lives_of(self._replays.request.sequence_id)
            given = sum(placed.row.sample for life in lives for placed in life.rows)
            # one that the engine would have refused, or given up, gets no tokens past that
            records = self._replays.along(schedule, given)[:given] if given else ()
            self._known[shapes] = records
        return self._known[shapes]

    def _moved(self, one: Arrival, by: int) -> Arrival:
        by = max(self.first_tick - one.tick, by)
        if not by:
            return one
        later_us = by * self._tick_us
        return replace(
            one,
            tick=one.tick + by,
            leaves=None if one.leaves is None else one.leaves + by,
            now_us=one.now_us + later_us,
            deadline_us=None if one.deadline_us is None else one.deadline_us + later_us,
        )

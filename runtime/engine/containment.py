"""How does a call that kept nothing cost only the request that caused it?  Its rows run again, one by one.

A call whose hosting process died, or that answered what is no number, has written nothing: keys and values are put away
after it.  Which of its rows was to blame is not known, so each runs again as a call of its own.  Those calls stand in
the recorded plan in place of the lost one: the plan says what really computed each row, so a replay has the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from runtime.backends.errors import BackendError
from runtime.engine.errors import AnswerNotFinite
from runtime.engine.plan import Call, StepPlan
from runtime.engine.settings import Settings


class ContainedCalls:
    """The calls of one step as they really run."""

    def __init__(self, plan: StepPlan, settings: Settings) -> None:
        self._plan = plan
        self._settings = settings
        self._waiting = deque(plan.calls)
        self._done: list[Call] = []
        self._replaced = False

    def __iter__(self) -> Iterator[Call]:
        """Give each call that is to run, those that replace a dead one among them."""
        while self._waiting:
            call = self._waiting.popleft()
            self._done.append(call)
            yield call

    def replace(self, error: Exception) -> bool:
        """Put single rows in place of the call that has just failed; False where its failure is its rows' own."""
        call = self._done[-1]
        lost = isinstance(error, BackendError) and error.LOST_INSTANCE
        if not (lost or isinstance(error, AnswerNotFinite)) or len(call.sequences) < 2:
            return False
        self._done.pop()
        self._waiting.extendleft(reversed(single_rows(call, self._settings)))
        self._replaced = True
        return True

    def plan(self) -> StepPlan:
        """The plan with the calls that ran."""
        return msgspec.structs.replace(self._plan, calls=self._done) if self._replaced else self._plan


def single_rows(call: Call, settings: Settings) -> list[Call]:
    """Split a call into one call a row, each in the shape that its row has when it runs alone."""
    return [
        Call(
            graph=call.graph,
            batch=settings.pad_batch(1),
            tokens=call.tokens,
            context=settings.pad_context(row.start),
            sequences=[row.sequence],
            starts=[row.start],
            counts=[row.count] if call.counts else [],
            silent=[] if row.sample else [0],
        )
        for row in call.rows
    ]

"""What decides the next plan?  The queue, the running sequences, the cache, and what has ended since the last one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from runtime.engine.cache import BlockCache
from runtime.engine.plan import Release
from runtime.engine.policies import WaitingQueue, queue_for
from runtime.engine.scheduled import PlannedRow, SequenceState
from runtime.engine.settings import Settings


@dataclass(slots=True)
class SchedulerState:
    """Everything that decides the next plan."""

    settings: Settings
    cache: BlockCache
    waiting: WaitingQueue
    step: int = 0
    """Number of the next step."""
    arrivals: int = 0
    queued_tokens: int = 0
    """Tokens of all waiting sequences."""
    running: list[SequenceState] = field(default_factory=list[SequenceState])
    """In the policy's order; under `fair` in the order of admission."""
    parked: dict[int, SequenceState] = field(default_factory=dict[int, SequenceState])
    """Held up by their readers and evicted: they wait again when the reader has caught up."""
    decided: list[PlannedRow] = field(default_factory=list[PlannedRow])
    """Rows of the last step in the order in which they were decided; what must not depend on places goes by it."""
    decoding: list[int] = field(default_factory=list[int])
    """Sequence of each row of the last step's decode call."""
    releases: list[Release] = field(default_factory=list[Release])
    """Ended since the last plan; the next plan reports them."""

    def copy(self) -> SchedulerState:
        """Return an independent state that gives the same plans."""
        return copy.deepcopy(self)

    @property
    def has_work(self) -> bool:
        """Whether another plan would say anything."""
        return bool(self.releases or len(self.waiting)) or any(not one.held for one in self.running)

    def take(self) -> SequenceState:
        """Take the next sequence off the queue."""
        sequence = self.waiting.take()
        self.queued_tokens -= len(sequence.tokens)
        return sequence

    def requeue(self, sequence: SequenceState) -> None:
        """Let a sequence wait, or stand aside while its reader holds it up."""
        if sequence.held:
            self.parked[sequence.index] = sequence
        else:
            self.waiting.push(sequence)
            self.queued_tokens += len(sequence.tokens)

    def find(self, index: int) -> SequenceState | None:
        """Find a sequence that runs."""
        return next((one for one in self.running if one.index == index), None)


def new_state(settings: Settings) -> SchedulerState:
    """Return the state of an engine that has done nothing yet."""
    cache = BlockCache(settings.num_blocks, prefix_caching=settings.enable_prefix_caching)
    return SchedulerState(settings, cache, queue_for(settings))

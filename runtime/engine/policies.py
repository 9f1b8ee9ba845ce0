"""In which order does each policy serve?  The waiting sequences, who is next, and who yields first.

`fcfs`      arrival
`priority`  lower number first, then arrival; `aging_steps` steps of waiting outweigh one level
`deadline`  earliest deadline first, nobody later than `aging_us` after its arrival
`fair`      the backlogged tenant that was served least, then arrival

The first three give a sequence one rank at its arrival that never changes: linear aging moves all that wait alike, so
the order of two sequences is settled when the later one arrives.  That is also the law against starvation.  A sequence
can be overtaken only by arrivals of a bounded time: the next `aging_steps` steps for each level between them, or the
next `aging_us` microseconds.

`fair` counts tokens as the virtual token counter of Sheng et al. (OSDI 2024) does: a tenant's counter grows by the
tokens computed for it, each token of a sequence once (cached ones are free, recomputed ones are paid already).  The
waiting tenant with the smallest counter is served; the clock is the counter of the tenant admitted last, and a tenant
whose queue was empty is lifted to it when it comes back.  With S = max_num_seqs and L = longest_sequence, the counter
of a tenant with waiting sequences stays within [clock, clock + S * L], because after its last admission, when it stood
at the clock at most, no more than S of its sequences can be charged for L tokens each.  So over any time in which two
tenants both have sequences waiting, the service they receive differs by at most 2 * S * L tokens (`service_gap`).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Protocol

from runtime.engine.scheduled import SequenceState
from runtime.engine.settings import Settings

SLACK = 64
"""Removed entries that a heap may carry before it is built anew."""


class WaitingQueue(Protocol):
    """The waiting sequences under one policy; every operation costs O(log n)."""

    def __len__(self) -> int: ...
    def __contains__(self, index: object) -> bool: ...
    def push(self, sequence: SequenceState) -> None: ...
    def head(self) -> SequenceState | None: ...
    def take(self) -> SequenceState: ...
    def remove(self, index: int) -> SequenceState | None: ...
    def charge(self, sequence: SequenceState, upto: int) -> None: ...
    def yielding(self, sequence: SequenceState) -> tuple[int, int]: ...


@dataclass(slots=True)
class KeyedQueue:
    """Serves by the keys that the sequences carry."""

    entries: dict[int, SequenceState] = field(default_factory=dict[int, SequenceState])
    heap: list[tuple[tuple[int, int], int]] = field(default_factory=list[tuple[tuple[int, int], int]])
    """Keys and indices; those of removed sequences linger until they come up."""

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, index: object) -> bool:
        return index in self.entries

    def push(self, sequence: SequenceState) -> None:
        """Let a sequence wait; one that waited before stands where it stood."""
        self.entries[sequence.index] = sequence
        heapq.heappush(self.heap, (sequence.key, sequence.index))

    def head(self) -> SequenceState | None:
        """Return who is next; None when nobody waits."""
        while self.heap:
            sequence = self.entries.get(self.heap[0][1])
            if sequence is not None:
                return sequence
            heapq.heappop(self.heap)
        return None

    def take(self) -> SequenceState:
        """Take who is next; raises IndexError when nobody waits."""
        self.head()
        return self.entries.pop(heapq.heappop(self.heap)[1])

    def remove(self, index: int) -> SequenceState | None:
        """Take one out wherever it stands; None when it does not wait.  An index that was removed never comes back."""
        sequence = self.entries.pop(index, None)
        if len(self.heap) > 2 * len(self.entries) + SLACK:
            self.heap = [(one.key, one.index) for one in self.entries.values()]
            heapq.heapify(self.heap)
        return sequence

    def charge(self, sequence: SequenceState, upto: int) -> None:
        """Nothing is counted."""

    def yielding(self, sequence: SequenceState) -> tuple[int, int]:
        """Order the running sequences for yielding: the greatest yields first."""
        return sequence.key


@dataclass(slots=True)
class FairQueue:
    """Serves the waiting tenant with the smallest counter; inside a tenant, by arrival."""

    lanes: dict[str, KeyedQueue] = field(default_factory=dict[str, KeyedQueue])
    """Waiting sequences of each tenant that has some."""
    tenant_of: dict[int, str] = field(default_factory=dict[int, str])
    counters: dict[str, int] = field(default_factory=dict[str, int])
    """Tokens charged to each tenant, lifted where it was away."""
    clock: int = 0
    """Counter at which the latest admission happened."""
    entered: dict[str, int] = field(default_factory=dict[str, int])
    """When each waiting tenant's queue began: settles equal counters, and tells old heap entries from new ones."""
    entries: int = 0
    heap: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])
    """Counter, entry and tenant; counters only grow, so an entry that is right at the top is the smallest."""

    def __len__(self) -> int:
        return len(self.tenant_of)

    def __contains__(self, index: object) -> bool:
        return index in self.tenant_of

    def push(self, sequence: SequenceState) -> None:
        """Let a sequence wait; a tenant that had none waiting is lifted to the clock."""
        tenant = sequence.tenant
        lane = self.lanes.get(tenant)
        if lane is None:
            lane = self.lanes[tenant] = KeyedQueue()
            self.counters[tenant] = max(self.counters.get(tenant, 0), self.clock)
            self.entered[tenant] = self.entries
            self.entries += 1
            heapq.heappush(self.heap, (self.counters[tenant], self.entered[tenant], tenant))
        lane.push(sequence)
        self.tenant_of[sequence.index] = tenant

    def head(self) -> SequenceState | None:
        """Return who is next; None when nobody waits."""
        tenant = self._least()
        return None if tenant is None else self.lanes[tenant].head()

    def take(self) -> SequenceState:
        """Take who is next; raises IndexError when nobody waits."""
        tenant = self._least()
        if tenant is None:
            raise IndexError("nobody waits")
        self.clock = max(self.clock, self.counters[tenant])
        sequence = self.lanes[tenant].take()
        self._left(sequence.index, tenant)
        return sequence

    def remove(self, index: int) -> SequenceState | None:
        """Take one out wherever it stands; None when it does not wait."""
        tenant = self.tenant_of.get(index)
        if tenant is None:
            return None
        sequence = self.lanes[tenant].remove(index)
        self._left(index, tenant)
        return sequence

    def charge(self, sequence: SequenceState, upto: int) -> None:
        """Count the tokens before `upto` that were not counted yet."""
        if upto > sequence.charged:
            self.counters[sequence.tenant] += upto - sequence.charged
            sequence.charged = upto

    def yielding(self, sequence: SequenceState) -> tuple[int, int]:
        """Order the running sequences for yielding: the newest one of the tenant that was served most yields first."""
        return self.counters[sequence.tenant], sequence.arrival

    def _least(self) -> str | None:
        while self.heap:
            counter, entry, tenant = self.heap[0]
            if self.entered.get(tenant) != entry:
                heapq.heappop(self.heap)
            elif counter != self.counters[tenant]:
                heapq.heapreplace(self.heap, (self.counters[tenant], entry, tenant))
            else:
                return tenant
        return None

    def _left(self, index: int, tenant: str) -> None:
        del self.tenant_of[index]
        if not len(self.lanes[tenant]):
            del self.lanes[tenant], self.entered[tenant]
        if len(self.heap) > 2 * len(self.lanes) + SLACK:
            self.heap = [(self.counters[name], self.entered[name], name) for name in self.lanes]
            heapq.heapify(self.heap)


def queue_for(settings: Settings) -> WaitingQueue:
    """Return the empty queue of a policy."""
    return FairQueue() if settings.policy == "fair" else KeyedQueue()


def rank(settings: Settings, *, step: int, now_us: int, priority: int, deadline_us: int | None) -> int:
    """Return the rank of a sequence that arrives now, before `step`; least is served first."""
    if settings.policy == "priority":
        return priority * settings.aging_steps + step
    if settings.policy == "deadline":
        latest = now_us + settings.aging_us
        return latest if deadline_us is None else min(deadline_us, latest)
    return 0


def service_gap(settings: Settings) -> int:
    """Return by how many tokens the service of two tenants that both have sequences waiting may differ (`fair`)."""
    return 2 * settings.max_num_seqs * settings.longest_sequence

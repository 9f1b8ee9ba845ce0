"""Which waiting requests of a one-shot model share a call now?  Triton's dynamic batching, as a pure decision.

The words are Triton's: a batch of a preferred size goes as soon as the queue holds one; anything else waits until its
oldest request has waited `max_queue_delay_microseconds`, and then goes with all that fits beside it.  Only requests of
one shape share a call.  Equal queues at equal times give equal batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from runtime.errors import RequestRefused


@dataclass(frozen=True, kw_only=True)
class BatchingSettings:
    """How requests are gathered; every field is a pin of the recording."""

    max_batch_size: int = 8
    """Most rows of one call."""
    preferred_batch_size: tuple[int, ...] = ()
    """Rows at which a batch goes at once."""
    max_queue_delay_microseconds: int = 0
    """How long a request may wait for company while an instance is free."""
    preserve_ordering: bool = False
    """Whether answers leave in the order in which requests came."""
    max_queue_size: int = 256
    """Most waiting requests; one more is refused with a time after which to try again."""
    instance_count: int = 1
    """Executors that run at the same time, each in a thread of its own."""

    def __post_init__(self) -> None:
        low = {name: getattr(self, name) for name in ("max_batch_size", "max_queue_size", "instance_count")}
        wrong = [f"{name} is {value}, at least 1 is needed" for name, value in low.items() if value < 1]
        if self.max_queue_delay_microseconds < 0:
            wrong.append(f"max_queue_delay_microseconds is {self.max_queue_delay_microseconds}, at least 0 is needed")
        wrong += [
            f"preferred size {size} is outside 1..{self.max_batch_size}"
            for size in self.preferred_batch_size
            if not 1 <= size <= self.max_batch_size
        ]
        if wrong:
            raise RequestRefused(
                f"The batching settings do not hold together: {'; '.join(wrong)}.",
                reason="bad_batching",
                evidence={"failed_rule": wrong},
                fix="choose preferred sizes up to max_batch_size, and counts of 1 or more",
            )

    def document(self) -> dict[str, Any]:
        """Describe the settings for a record."""
        return msgspec.to_builtins(self)


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request in the queue."""

    index: int
    """The order of arrival."""
    arrival_us: int
    rows: int
    shape: str
    """Names every size but the batch; only equal ones share a call."""


class Batch(msgspec.Struct, array_like=True, frozen=True):
    """One call: which requests, in which rows of which padded size."""

    requests: list[int]
    """By index, in the order of their rows."""
    rows: list[int]
    """Rows of each request."""
    shape: str
    due: str
    """Why it goes: `preferred`, `full` or `delay`."""

    @property
    def size(self) -> int:
        """Rows that carry requests."""
        return sum(self.rows)

    def offset(self, index: int) -> int:
        """Give the first row of a request."""
        return sum(self.rows[: self.requests.index(index)])


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What goes now, and when to look again if nothing arrives."""

    batches: tuple[Batch, ...]
    wake_us: int | None
    """None where nothing waits for a time."""


def decide(queue: Sequence[Waiting], now_us: int, *, free: int, settings: BatchingSettings) -> Decision:
    """Choose at most `free` batches out of the queue, whose requests stand in order of arrival."""
    left, batches = list(queue), list[Batch]()
    while left and len(batches) < free:
        chosen = _next(left, now_us, settings)
        if chosen is None:
            break
        batches.append(chosen)
        taken = set(chosen.requests)
        left = [one for one in left if one.index not in taken]
    expiries = [one.arrival_us + settings.max_queue_delay_microseconds for one in left]
    return Decision(batches=tuple(batches), wake_us=min(expiries, default=None))


def _next(queue: Sequence[Waiting], now_us: int, settings: BatchingSettings) -> Batch | None:
    """Give the batch of the group that is due: groups whose oldest request waited its time first, then by age."""
    groups: dict[str, list[Waiting]] = {}
    for one in queue:
        groups.setdefault(one.shape, []).append(one)
    found: list[tuple[bool, int, Batch]] = []
    for group in groups.values():
        late = now_us - group[0].arrival_us >= settings.max_queue_delay_microseconds
        batch = _gather(group, late=late, settings=settings)
        if batch is not None:
            found.append((not late, group[0].index, batch))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _gather(group: Sequence[Waiting], *, late: bool, settings: BatchingSettings) -> Batch | None:
    sums: list[int] = []
    for one in group:
        total = (sums[-1] if sums else 0) + one.rows
        if total > settings.max_batch_size:
            break
        sums.append(total)
    preferred = [place for place, total in enumerate(sums) if total in settings.preferred_batch_size]
    if preferred:
        return _batch(group[: preferred[-1] + 1], "preferred")
    if len(sums) < len(group) or (sums and sums[-1] == settings.max_batch_size):
        return _batch(group[: len(sums)], "full")
    return _batch(group, "delay") if late else None


def _batch(group: Sequence[Waiting], due: str) -> Batch:
    return Batch(requests=[one.index for one in group], rows=[one.rows for one in group], shape=group[0].shape, due=due)

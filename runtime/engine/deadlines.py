"""Whose deadline has passed?"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator

SLACK = 64
"""Deadlines of ended sequences that may linger before they are swept out."""


class Deadlines:
    """The deadlines of live sequences, on the engine's clock; ended ones cost nothing for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []

    def add(self, at_us: int, index: int) -> None:
        """Watch a sequence."""
        heapq.heappush(self._heap, (at_us, index))

    def next_us(self, live: Container[int]) -> int | None:
        """Return the earliest deadline of a live sequence; None where none has one."""
        while self._heap and self._heap[0][1] not in live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def passed(self, now_us: int) -> Iterator[int]:
        """Take out every sequence whose deadline is not in the future; some may have ended already."""
        while self._heap and self._heap[0][0] <= now_us:
            yield heapq.heappop(self._heap)[1]

    def sweep(self, live: Container[int], count: int) -> None:
        """Forget the ended ones, where they are more than the `count` live ones."""
        if len(self._heap) > 2 * count + SLACK:
            self._heap = [one for one in self._heap if one[1] in live]
            heapq.heapify(self._heap)

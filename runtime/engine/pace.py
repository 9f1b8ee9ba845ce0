"""How fast has this engine worked lately?  What a refusal may honestly promise, and what no deadline can beat."""

from __future__ import annotations

from collections import deque

WINDOW = 64
"""Steps and admissions that are remembered."""


class Pace:
    """Durations of the latest steps, and when the queue let how much go."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque(maxlen=WINDOW)
        self._departures: deque[tuple[int, int, int]] = deque(maxlen=WINDOW)
        self._began_us: int | None = None

    def stepped(self, began_us: int, duration_us: int) -> None:
        """Note a step that ran something."""
        self._steps.append(duration_us)
        if self._began_us is None:
            self._began_us = began_us

    def admitted(self, now_us: int, *, sequences: int, tokens: int) -> None:
        """Note that sequences with so many tokens left the queue."""
        if len(self._departures) == WINDOW:
            self._began_us = self._departures[0][0]
        self._departures.append((now_us, sequences, tokens))

    @property
    def shortest_step_us(self) -> int | None:
        """The shortest of the latest steps; None before the first."""
        return min(self._steps, default=None)

    def wait_us(self, now_us: int, *, sequences: int, tokens: int) -> int | None:
        """Estimate when the queue will have let go of so much, at the rate at which it lately did; None if unknown."""
        gone = sum(one[1] for one in self._departures)
        gone_tokens = sum(one[2] for one in self._departures)
        if self._began_us is None or not gone or not gone_tokens:
            return None
        elapsed = max(1, now_us - self._began_us)
        return max(-(-elapsed * sequences // gone), -(-elapsed * tokens // gone_tokens), 1)

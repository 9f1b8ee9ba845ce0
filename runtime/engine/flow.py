"""How far is a stream ahead of its reader?  Counted where tokens are handed out, and where they were really taken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from runtime.engine.generation import OnToken, TokenRecord


class Flow:
    """Tokens on their way to one reader; any thread may use it.

    The reader's side calls `take` for every token that it got rid of: sent, not merely queued.
    """

    def __init__(self) -> None:
        self._behind = 0
        self._most = 0
        self._wake: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @property
    def behind(self) -> int:
        """Tokens that were handed out and not taken yet."""
        return self._behind

    def put(self) -> int:
        """Count a token that is handed out; return how many are on their way."""
        with self._lock:
            self._behind += 1
            return self._behind

    def take(self, count: int = 1) -> None:
        """Count tokens that the reader took, and wake who waits for that."""
        with self._lock:
            self._behind = max(0, self._behind - count)
            wake = None
            if self._behind <= self._most:
                wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def when_behind_at_most(self, most: int, wake: Callable[[], None]) -> bool:
        """Ask to be woken, once, from the reader's thread; False, without asking, where it is so already."""
        with self._lock:
            if self._behind <= most:
                return False
            self._most, self._wake = most, wake
            return True


@dataclass(frozen=True, slots=True)
class MeteredReceiver:
    """A receiver of tokens whose reader says how far behind it is."""

    on_token: OnToken
    flow: Flow

    def __call__(self, record: TokenRecord) -> None:
        """Hand a token on."""
        self.on_token(record)

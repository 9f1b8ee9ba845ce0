"""Is a route well enough for another request?  What runs on it now, and a breaker that opens on failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Breaker = Literal["closed", "open", "half_open"]

FAILURES_TO_OPEN = 3
OPEN_US = 10_000_000
"""How long an open breaker refuses before it lets one request try."""


@dataclass(slots=True)
class _State:
    breaker: Breaker = "closed"
    failures: int = 0
    opened_us: int = 0
    in_flight: int = 0


class RouteHealth:
    """The breakers and loads of all routes; every change of a breaker is told."""

    def __init__(
        self, *, now_us: Callable[[], int], loaded: Callable[[str], str | None], tell: Callable[[str, str, str], None]
    ) -> None:
        """Take a clock, what is loaded on a route (its package digest), and whom to tell of a change."""
        self._now_us = now_us
        self._loaded = loaded
        self._tell = tell
        self._states: dict[str, _State] = {}

    def look(self, route: str) -> dict[str, Any]:
        """Return `{loaded, package, breaker, in_flight}`; an open breaker half-opens when its time is over."""
        state = self._state(route)
        if state.breaker == "open" and self._now_us() - state.opened_us >= OPEN_US:
            self._change(route, state, "half_open")
        package = self._loaded(route)
        return {
            "loaded": package is not None,
            "package": package,
            "breaker": state.breaker,
            "in_flight": state.in_flight,
        }

    def enter(self, route: str) -> None:
        """Count a generation in."""
        self._state(route).in_flight += 1

    def leave(self, route: str, healthy: bool) -> None:
        """Count a generation out, and learn from its end."""
        state = self._state(route)
        state.in_flight = max(0, state.in_flight - 1)
        if healthy:
            state.failures = 0
            if state.breaker != "closed":
                self._change(route, state, "closed")
            return
        state.failures += 1
        if state.breaker == "half_open" or state.failures >= FAILURES_TO_OPEN:
            state.opened_us = self._now_us()
            self._change(route, state, "open")

    def _state(self, route: str) -> _State:
        return self._states.setdefault(route, _State())

    def _change(self, route: str, state: _State, breaker: Breaker) -> None:
        before, state.breaker = state.breaker, breaker
        self._tell(route, before, breaker)

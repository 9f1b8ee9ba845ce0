"""Who had a generation's time inside the engine?  Seven owners, whose parts are the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineTime:
    """Microseconds from submission to the end, by owner; each instant has exactly one."""

    queue_us: int
    prefill_us: int
    """Its own share of steps before the first output token."""
    decode_us: int
    """Its own share of steps after it."""
    interference_us: int
    """Work of others in the same steps, and steps that passed it over."""
    preemption_us: int
    """Evicted, and until what was lost was computed again."""
    sampling_us: int
    delivery_us: int

    @property
    def total_us(self) -> int:
        """All parts together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def shares(self) -> dict[str, float] | None:
        """Return each owner's part of the whole; None of no time at all."""
        total = self.total_us
        return {_word(field.name): getattr(self, field.name) / total for field in fields(self)} if total else None


OWNERS = tuple(field.name for field in fields(EngineTime))


def engine_time(recorded: Mapping[str, Any] | None, *, total_us: int | None = None) -> EngineTime | None:
    """Read what an engine recorded of one generation; None where it recorded nothing.

    Args:
        recorded: owner, as `queue_us`, to microseconds.
        total_us: submission until end by another measure, which the parts must add up to.

    Raises:
        ValueError: an owner is missing or unknown, a part is negative, or the parts are not the whole.
    """
    if recorded is None:
        return None
    if set(recorded) != set(OWNERS):
        raise ValueError(f"owners of engine time are {', '.join(OWNERS)}, not {', '.join(sorted(recorded))}")
    found = EngineTime(**{name: int(recorded[name]) for name in OWNERS})
    if min(getattr(found, name) for name in OWNERS) < 0:
        raise ValueError("a part of the engine's time is negative; are these times of one clock?")
    if total_us is not None and found.total_us != total_us:
        raise ValueError(f"the parts are {found.total_us} us and the whole is {total_us} us")
    return found


def add_up(times: Iterable[EngineTime | None]) -> tuple[EngineTime | None, int]:
    """Return the sum over generations, None of none, and how many were not measured and so are not in it."""
    known = list(times)
    measured = [one for one in known if one is not None]
    if not measured:
        return None, len(known)
    total = EngineTime(**{name: sum(getattr(one, name) for one in measured) for name in OWNERS})
    return total, len(known) - len(measured)


def _word(name: str) -> str:
    return name.removesuffix("_us")

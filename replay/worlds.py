"""What of the world may a replay touch?  Nothing, but another article index when one is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.run import Pins
from replay.errors import PinRefused
from replay.substitutes import Substitution, Way, apply_to_pins, tool_result
from runtime.effects import EffectKind, Override
from runtime.serve.articles import ArticleIndex
from runtime.serve.services import AbsentWorld, World


class ReplayWorld(AbsentWorld):
    """A world that stands still at the request's arrival; at most one article index can be read in it."""

    def __init__(self, *, arrived_us: int, index: ArticleIndex | None = None) -> None:
        self._arrived_us = arrived_us
        self._index = index

    def now_us(self) -> int:
        """Return the arrival: time past the end of the record does not pass."""
        return self._arrived_us

    def search(self, tenant: str, query: str, limit: int) -> dict[str, Any]:
        """Search the given index, or refuse."""
        return super().search(tenant, query, limit) if self._index is None else self._index.search(tenant, query, limit)


@dataclass(frozen=True, kw_only=True)
class Substitutes:
    """What stands in for recorded effects and settings under the caller's substitutions.

    overrides  answers that replace recorded ones
    anew       effects that are performed again: retrieval, when the index is another
    index      the article index that they act on
    """

    substitutions: tuple[Substitution, ...] = ()
    overrides: tuple[Override, ...] = ()
    anew: frozenset[EffectKind] = frozenset()
    index: ArticleIndex | None = None

    @property
    def frontier(self) -> frozenset[EffectKind]:
        """Effects that may be performed where the record has no answer: a changed run may take one more turn."""
        return frozenset[EffectKind]({"clock"}) if self.substitutions else frozenset[EffectKind]()

    def world(self, arrived_us: int) -> World:
        """Return what effects that are performed again may touch."""
        return ReplayWorld(arrived_us=arrived_us, index=self.index)

    def repin(self, derived: Pins) -> Pins:
        """Return the pins that the request path is to run under, given those that it derived itself."""
        pins = apply_to_pins(derived, self.substitutions, ways=frozenset({Way.REPIN}))
        if self.index is not None and pins.context.index_digest is not None:
            pins = pins.set("context.index_digest", self.index.digest)
        return pins


def substitutes_of(substitutions: Iterable[Substitution]) -> Substitutes:
    """Prepare what the substitutions need; PinRefused when another index cannot be opened."""
    chosen = tuple(substitutions)
    overrides = tuple(_override(one) for one in chosen if one.way is Way.TOOL_RESULT)
    index = next((one for one in chosen if one.way is Way.RETRIEVAL), None)
    if index is None:
        return Substitutes(substitutions=chosen, overrides=overrides)
    opened = _open_index(index)
    return Substitutes(
        substitutions=chosen, overrides=overrides, anew=frozenset[EffectKind]({"retrieval"}), index=opened
    )


def _override(substitution: Substitution) -> Override:
    name, result = tool_result(substitution)
    return Override(kind="tool", result=result, arguments={"tool": name})


def _open_index(substitution: Substitution) -> ArticleIndex:
    """Open the index whose path is the pin's value."""
    import sqlite3

    path = Path(substitution.value)
    try:
        if not path.is_file():
            raise FileNotFoundError
        return ArticleIndex(path)
    except (OSError, sqlite3.Error):
        raise PinRefused(
            f"there is no article index at {substitution.value!r}",
            pin=substitution.pin,
            fix="Give the path of another deployment's corpus.sqlite.",
        ) from None

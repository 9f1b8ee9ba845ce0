"""Which pins differ between two runs?  Down to the field, and to the entry of a mapping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from manifests.base import Manifest
from manifests.run import DIMENSIONS, Pins


@dataclass(frozen=True)
class PinDifference:
    """One pin that is not the same on both sides."""

    dimension: str
    field: str
    """Field name, or ``field.key`` for an entry of a mapping."""
    left: Any
    """The value as plain JSON; None also where an entry is absent."""
    right: Any

    @property
    def path(self) -> str:
        """Return the name that ``Pins.set`` takes."""
        return f"{self.dimension}.{self.field}"


def diff(left: Pins, right: Pins) -> tuple[PinDifference, ...]:
    """List every pin that differs, in the order of dimensions and fields."""
    found: list[PinDifference] = []
    for dimension in DIMENSIONS:
        found.extend(diff_dimension(dimension, left.dimension(dimension), right.dimension(dimension)))
    return tuple(found)


def diff_dimension(dimension: str, left: Manifest, right: Manifest) -> tuple[PinDifference, ...]:
    """List every pin of one dimension that differs, in the order of its fields; both are documents of one kind."""
    if left == right:
        return ()
    document, other = _whole(left), _whole(right)
    return tuple(
        PinDifference(dimension, name, one, two)
        for field in document
        for name, one, two in _descend(field, document[field], other[field])
    )


def _whole(manifest: Manifest) -> dict[str, Any]:
    """Return all fields, also those that the document leaves out."""
    kind, document = type(manifest), manifest.to_document()
    return {name: document[name] if name in document else kind.left_out(name) for name in kind.model_fields}


def _descend(name: str, left: Any, right: Any) -> Iterator[tuple[str, Any, Any]]:
    if left == right:
        return
    if not (isinstance(left, dict) and isinstance(right, dict)):
        yield name, left, right
        return
    first, second = cast("dict[str, Any]", left), cast("dict[str, Any]", right)
    for key in sorted(first.keys() | second.keys()):
        yield from _descend(f"{name}.{key}", first.get(key), second.get(key))

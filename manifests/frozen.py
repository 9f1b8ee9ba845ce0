"""How does a document stay as it was when it was named?  Mappings that refuse every change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar, cast

Key = TypeVar("Key")
Value = TypeVar("Value")


class FrozenDict(dict[Key, Value]):
    """A dict that cannot change after it is made, and so can be hashed and shared."""

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TypeError("this mapping belongs to a frozen document; make a changed copy with dict(...)")

    __setitem__ = _refuse
    __delitem__ = _refuse
    __ior__ = _refuse  # pyright: ignore[reportAssignmentType]
    update = _refuse  # pyright: ignore[reportAssignmentType]
    setdefault = _refuse  # pyright: ignore[reportAssignmentType]
    pop = _refuse
    popitem = _refuse
    clear = _refuse

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (dict(self),))

    def __copy__(self) -> FrozenDict[Key, Value]:
        return self

    def __deepcopy__(self, memory: dict[int, Any]) -> FrozenDict[Key, Value]:
        return self


def freeze(value: Any) -> Any:
    """Turn dicts into frozen ones and lists into tuples, all the way down."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return FrozenDict({key: freeze(item) for key, item in items})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in cast("list[Any]", value))
    return value

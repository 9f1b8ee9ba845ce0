"""Which bytes, and so which name, does a document have?

Canonical JSON in the sense of RFC 8785, over a domain in which a fast sorted encoder equals it: ASCII keys, strings
without lone surrogates, booleans, null and integers within +-(2**53 - 1).  Floats have no canonical text that every
writer agrees on, so they travel as strings or scaled integers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import msgspec

from manifests.errors import CanonicalError

# typing sees the recursion; pydantic is never given this alias
JSON: TypeAlias = "Mapping[str, JSON] | list[JSON] | tuple[JSON, ...] | str | int | bool | None"

LARGEST_INTEGER = 2**53 - 1
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"

_ENCODER = msgspec.json.Encoder(order="sorted")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def canonical_bytes(document: Any) -> bytes:
    """Encode a document as canonical JSON.

    Args:
        document: dicts with ASCII keys, lists or tuples, strings, booleans, None, integers of at most 53 bits.

    Raises:
        CanonicalError: naming the path of the first value outside this domain.
    """
    try:
        if _is_canonical(document):
            return _ENCODER.encode(document)
    except (RecursionError, UnicodeEncodeError):
        pass
    where, message = _first_refusal(document)
    raise CanonicalError(message, where=where)


def digest(document: Any) -> str:
    """Name content: ``sha256:`` and 64 hex digits, of bytes as they are or of a document's canonical bytes."""
    data = document if isinstance(document, bytes) else canonical_bytes(document)
    return "sha256:" + hashlib.sha256(data).hexdigest()


def is_digest(text: object) -> bool:
    """Say whether a value is written like a digest."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _is_canonical(value: Any) -> bool:
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return True  # the encoder itself refuses a lone surrogate
    if kind is int:
        return -LARGEST_INTEGER <= value <= LARGEST_INTEGER
    if isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            if type(key) is not str or not key.isascii() or not _is_canonical(item):
                return False
        return True
    if isinstance(value, (list, tuple)):
        return all(_is_canonical(item) for item in cast("list[Any]", value))
    return isinstance(value, str)  # a StrEnum member is its text


def _first_refusal(document: Any) -> tuple[str, str]:
    """Walk again, slowly and without recursion, to name the first value that was refused."""
    pending: list[tuple[str, Any, int]] = [("$", document, 0)]
    while pending:
        where, value, depth = pending.pop()
        if depth > 500:
            return where[:80] + "...", "the document is nested too deeply"
        message = _refusal(value)
        if message is not None:
            return where, message
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value).items()
            pending.extend((f"{where}.{key}", item, depth + 1) for key, item in reversed(list(items)))
        elif isinstance(value, (list, tuple)):
            entries = list(enumerate(cast("list[Any]", value)))
            pending.extend((f"{where}[{index}]", item, depth + 1) for index, item in reversed(entries))
    return "$", "the document is nested too deeply"


def _refusal(value: Any) -> str | None:
    if value is None or isinstance(value, (bool, list, tuple)):
        return None
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "the text has a lone surrogate, which UTF-8 cannot carry"
        return None
    if type(value) is int:
        return None if -LARGEST_INTEGER <= value <= LARGEST_INTEGER else f"the integer {value} needs more than 53 bits"
    if isinstance(value, float):
        return f"the float {value!r} has no agreed text; write it as a string or a scaled integer"
    if isinstance(value, dict):
        for key in cast("dict[Any, Any]", value):
            if type(key) is not str or not key.isascii():
                return f"the key {key!r} is not ASCII text"
        return None
    return f"a {type(value).__name__} is not JSON"

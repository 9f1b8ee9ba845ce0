"""What may be written down, and what is hidden first?

First version: keyed pseudonyms and secret patterns.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Any

MARKER = "__REDACTED__"
POLICY_VERSION = "redaction-1"
_SECRET = re.compile(
    r"sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|[Bb]earer\s+[A-Za-z0-9._~+/=-]{8,}"
    r"|[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+\.[A-Za-z0-9.-]+"
)


class Redactor:
    """Hides secrets and names, with one ledger's key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def pseudonym(self, kind: str, name: str) -> str:
        """Return ``<kind>_<24 hex>``, the same for the same name in one ledger; a pseudonym stays itself."""
        if re.fullmatch(kind + r"_[0-9a-f]{24}", name):
            return name
        return f"{kind}_{hmac.new(self._key, f'{kind}:{name}'.encode(), hashlib.sha256).hexdigest()[:24]}"

    def payload(self, payload: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return the payload with secrets hidden, and whether any was."""
        hidden = self._walk(payload)
        return hidden, hidden != payload

    def _walk(self, value: Any) -> Any:
        if isinstance(value, str):
            return _SECRET.sub(MARKER, value)
        if isinstance(value, dict):
            return {str(key): self._walk(item) for key, item in value.items()}  # pyright: ignore
        if isinstance(value, list | tuple):
            return [self._walk(item) for item in value]  # pyright: ignore
        return value

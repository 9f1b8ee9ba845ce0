"""What can be wrong with a pinned document?

ManifestError
├── CanonicalError   a value that canonical JSON does not allow
├── DigestError      bytes that do not hash to the name they were asked for by
├── DocumentError    a document that does not fit its schema
└── PinError         an unknown pin, or a value that the pin does not take
"""

from __future__ import annotations


class ManifestError(ValueError):
    """Refuse a pinned document: what is wrong, where, and what to do about it."""

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.where = where
        self.fix = fix
        parts = [message if where is None else f"{where}: {message}"]
        if fix is not None:
            parts.append(fix)
        super().__init__(". ".join(parts))


class CanonicalError(ManifestError):
    """Refuse a value that has no canonical form here."""


class DigestError(ManifestError):
    """Refuse bytes whose digest is not the one asked for."""


class DocumentError(ManifestError):
    """Refuse a document that does not fit its schema."""


class PinError(ManifestError):
    """Refuse a pin that does not exist, or a value that it does not take."""

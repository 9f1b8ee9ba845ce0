"""What does a verification say?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was sealed."""

    kind: str
    """A short stable name: edited, deleted, reordered, truncated, missing, signature, chain, head, row, blob."""
    detail: str
    """What and where, one sentence."""
    segment: int | None = None
    seq: int | None = None


@dataclass
class VerifyReport:
    """What verification found and how much it looked at."""

    findings: list[Finding] = field(default_factory=list[Finding])
    notes: list[str] = field(default_factory=list[str])
    """What is worth knowing but no damage: events not drained yet, no witness."""
    segments: int = 0
    events: int = 0
    rows: int = 0
    """Projected rows compared."""
    blobs: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_document(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return {"ok": self.ok, **document}

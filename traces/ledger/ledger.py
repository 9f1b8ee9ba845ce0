"""How is a ledger read, drained, checked and rebuilt?  (First version: reads straight from the outboxes.)"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from traces.envelope import TraceEvent, decode
from traces.evidence import hex_digest
from traces.failures import EvidenceError
from traces.ledger.blobs import BlobStore
from traces.ledger.layout import LedgerLayout


class Ledger:
    """One ledger folder."""

    def __init__(self, path: Path | str) -> None:
        self.layout = LedgerLayout(Path(path)).create()
        self._blobs = BlobStore(self.layout.blobs)

    def drain(self) -> None:
        """Seal what the outboxes hold and project it."""

    def events(
        self, run_id: str | None = None, request_ref: str | None = None, event_type: str | None = None
    ) -> list[TraceEvent]:
        """Return matching events in recorded order."""
        found: list[TraceEvent] = []
        for path in sorted(self.layout.outbox.glob("*.sqlite")):
            connection = sqlite3.connect(path)
            bodies = connection.execute("SELECT body FROM event ORDER BY seq").fetchall()
            connection.close()
            for (body,) in bodies:
                event = decode(body)
                if (
                    (run_id is None or event.run_id == run_id)
                    and (request_ref is None or event.request_ref == request_ref)
                    and (event_type is None or event.event_type == event_type)
                ):
                    found.append(event)
        return found

    def put_blob(self, data: bytes) -> str:
        """Store evidence durably."""
        return self._blobs.put(data)

    def read_blob(self, reference: str) -> bytes:
        """Return evidence, digest verified."""
        digest = hex_digest(reference)
        if not self._blobs.has(reference):
            for path in sorted(self.layout.outbox.glob("*.sqlite")):
                connection = sqlite3.connect(path)
                row = connection.execute("SELECT body FROM blob WHERE digest = ?", (digest,)).fetchone()
                connection.close()
                if row is not None:
                    return bytes(row[0])
            raise EvidenceError(f"The evidence {reference} is not in this ledger.")
        return self._blobs.get(reference)

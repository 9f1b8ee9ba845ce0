"""What still waits in the outboxes, seen from outside their writers?"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from traces.evidence import check, hex_digest
from traces.ledger.layout import LedgerLayout


def outbox_files(layout: LedgerLayout) -> list[Path]:
    """Return the SQLite files of all outboxes, sorted by name."""
    return sorted(layout.outbox.glob("*.sqlite"))


def connect(path: Path) -> sqlite3.Connection:
    """Open an existing outbox beside its writer; deletions need no fsync, they are done again after a crash."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=30.0, isolation_level=None)
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def pending_events(layout: LedgerLayout) -> int:
    """Return how many events wait to be sealed."""
    return sum(int(row[0]) for row in _ask(layout, "SELECT count(*) FROM event", ()))


def read_pending_blob(layout: LedgerLayout, reference: str) -> bytes | None:
    """Return evidence that has not been moved to its file yet, digest verified; None when no outbox has it."""
    for (body,) in _ask(layout, "SELECT body FROM blob WHERE digest = ?", (hex_digest(reference),)):
        return check(reference, bytes(body))
    return None


def holds(layout: LedgerLayout, outbox: str, seq: int) -> bool:
    """Tell whether an outbox still holds an event numbered ``seq`` or lower."""
    path = layout.outbox / f"{outbox}.sqlite"
    if not path.exists():
        return False
    try:
        with closing(connect(path)) as connection:
            return connection.execute("SELECT 1 FROM event WHERE seq <= ? LIMIT 1", (seq,)).fetchone() is not None
    except sqlite3.DatabaseError:
        return False


def _ask(layout: LedgerLayout, sql: str, parameters: tuple[str, ...]) -> Iterator[tuple[bytes]]:
    for path in outbox_files(layout):
        try:
            with closing(connect(path)) as connection:
                found = connection.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError:
            continue  # not a table yet, removed meanwhile, or damaged: the drain reports the last
        yield from found

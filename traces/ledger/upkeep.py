"""How is the projection made again, or made smaller, without touching the evidence?

``rebuild`` reads the sealed segments; ``compact`` copies the database into a fresh file (``COPY FROM DATABASE``),
because a DuckDB file keeps the free blocks that many small drains leave.  Segments are not merged: their roots are
signed one by one, and a merged file would need new signatures over old evidence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from traces.failures import TelemetryPersistenceError
from traces.ledger.drain import drain_lock
from traces.ledger.layout import LedgerLayout, sync_folder
from traces.ledger.projection import migrate, open_database, project
from traces.ledger.segments import Segments


@dataclass(frozen=True)
class CompactReport:
    """What compacting did to the projection."""

    events: int
    bytes_before: int
    bytes_after: int


def rebuild(layout: LedgerLayout, *, progress: Callable[[int], None] | None = None) -> int:
    """Build a new projection beside the old one and put it in its place; return the number of events."""
    with drain_lock(layout):
        fresh = _fresh_path(layout)
        with open_database(fresh, read_only=False) as connection:
            migrate(connection)
            events = project(connection, Segments(layout), progress=progress)
        _replace(fresh, layout.database)
        return events


def compact(layout: LedgerLayout) -> CompactReport:
    """Copy the projection into a file without free blocks and put it in its place.

    Raises:
        TelemetryPersistenceError: there is no projection yet, or the copy does not hold as many events.
    """
    with drain_lock(layout):
        if not layout.database.exists():
            raise TelemetryPersistenceError(
                f"{layout.root} has no projection to compact.", fix="run 'replaylab ledger drain' first."
            )
        before = layout.database.stat().st_size
        fresh = _fresh_path(layout)
        with open_database(layout.database, read_only=False) as connection:
            migrate(connection)
            name = connection.execute("SELECT current_database()").fetchone()
            source = str(name[0]) if name else "ledger"
            connection.execute(f"ATTACH '{_quoted(fresh)}' AS fresh")
            connection.execute(f'COPY FROM DATABASE "{source}" TO fresh')
            counts = connection.execute("SELECT (SELECT count(*) FROM event), count(*) FROM fresh.event").fetchone()
            connection.execute("DETACH fresh")
        if counts is None or counts[0] != counts[1]:
            fresh.unlink(missing_ok=True)
            raise TelemetryPersistenceError(
                "The compacted projection does not hold the same events.", fix="run 'replaylab ledger rebuild'."
            )
        _replace(fresh, layout.database)
        return CompactReport(int(counts[0]), before, layout.database.stat().st_size)


def _fresh_path(layout: LedgerLayout) -> Path:
    for stale in layout.root.glob(".rebuild-*.duckdb*"):
        stale.unlink(missing_ok=True)  # an attempt that was killed; the drain lock says that nobody else is at it
    return layout.root / f".rebuild-{os.getpid()}.duckdb"


def _replace(fresh: Path, database: Path) -> None:
    """Swap the files.  The old write-ahead log goes first: it must never be replayed into the new database."""
    descriptor = os.open(fresh, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    Path(f"{fresh}.wal").unlink(missing_ok=True)
    Path(f"{database}.wal").unlink(missing_ok=True)
    fresh.replace(database)
    sync_folder(database.parent)


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("'", "''")

"""How do events leave the outboxes so that a kill anywhere loses and doubles nothing?

Seal (the checkpoint's rename), note the head, delete from the outbox, project.  Whatever a killed drain left undone
the next one finishes first: the newest checkpoint says which rows of which outbox are already sealed, and the highest
projected segment says what the database lacks.  One process drains at a time; any process may.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from traces.failures import TelemetryPersistenceError
from traces.ledger.blobs import BlobStore
from traces.ledger.checkpoint import Checkpoint
from traces.ledger.layout import LedgerLayout
from traces.ledger.outboxes import connect, holds, outbox_files
from traces.ledger.projection import ProjectionBusy, open_database, project
from traces.ledger.segments import OutboxRow, Segments

ROWS_PER_SEGMENT = 100_000
_BLOB_BATCH = 500


@dataclass
class DrainReport:
    """What one drain did."""

    events: int = 0
    """Events sealed."""
    blobs: int = 0
    """Pieces of evidence moved to files."""
    segments: int = 0
    """Segments written."""
    projected: bool = True
    """False when a reader held the DuckDB file; the next drain catches up."""
    removed: int = 0
    """Outbox files of finished processes that were removed."""
    damaged: list[str] = field(default_factory=list[str])
    """Outbox files that SQLite cannot read; they are left in place."""


@contextmanager
def drain_lock(layout: LedgerLayout, *, wait_s: float = 60.0) -> Generator[None]:
    """Be the only process that drains, rebuilds, compacts or verifies.

    Raises:
        TelemetryPersistenceError: another process kept the lock for ``wait_s`` seconds.
    """
    descriptor = os.open(layout.drain_lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        pause = 0.005
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TelemetryPersistenceError(
                        f"Another process is draining {layout.root}.", fix="wait for it to finish and try again."
                    ) from None
                time.sleep(pause)
                pause = min(pause * 2, 0.2)
        yield
    finally:
        os.close(descriptor)


class Drainer:
    """Moves what the outboxes hold into segments and the projection.  Call with the drain lock held."""

    def __init__(self, layout: LedgerLayout, *, busy_wait_s: float = 10.0) -> None:
        self.layout = layout
        self.segments = Segments(layout)
        self.blobs = BlobStore(layout.blobs)
        self.busy_wait_s = busy_wait_s

    def drain(self) -> DrainReport:
        """Finish what an earlier drain left, then move everything that is in the outboxes now."""
        report = DrainReport()
        self.segments.discard_unfinished()
        self.blobs.discard_unfinished()
        last = self.segments.last()
        if last is not None:
            self._finish(last)
        while True:
            rows = self._collect(report)
            if rows:
                last = self.segments.seal(rows, previous=last)
                self.segments.write_head(last)
                report.events += len(rows)
                report.segments += 1
                self._delete(last)
            if len(rows) < ROWS_PER_SEGMENT:
                break
        report.projected = self._project()
        report.removed = self._remove_finished()
        return report

    def _finish(self, last: Checkpoint) -> None:
        """Do again what may have been cut off after the newest seal; all of it is idempotent."""
        try:
            noted = self.layout.head.read_bytes() == self.layout.checkpoint(last.segment).read_bytes()
        except FileNotFoundError:
            noted = False
        pending = any(holds(self.layout, part.outbox, part.last) for part in last.ranges)
        # A head that is behind while the rows are gone from the outbox was not left by a killed drain: leave it for
        # verify to find.
        if not noted and pending:
            self.segments.write_head(last)
        if pending:
            self._delete(last)

    def _collect(self, report: DrainReport) -> list[OutboxRow]:
        """Read one segment's worth of rows; their evidence is durable in ``blobs/`` before this returns."""
        rows: list[OutboxRow] = []
        for path in outbox_files(self.layout):
            room = ROWS_PER_SEGMENT - len(rows)
            if room <= 0:
                break
            try:
                with closing(connect(path)) as connection:
                    connection.execute("BEGIN")  # one snapshot: evidence is queued before the event that names it
                    found = connection.execute("SELECT seq, body FROM event ORDER BY seq LIMIT ?", (room,)).fetchall()
                    report.blobs += self._move_blobs(connection)
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    continue  # its writer has only just created the file
                raise TelemetryPersistenceError(
                    f"The outbox {path} cannot be read: {error}.", fix="try again; nothing was removed."
                ) from error
            except sqlite3.DatabaseError:
                report.damaged.append(path.name)
                continue
            name = path.stem
            rows.extend([OutboxRow(name, seq, body) for seq, body in found])
        return rows

    def _move_blobs(self, connection: sqlite3.Connection) -> int:
        digests = [str(row[0]) for row in connection.execute("SELECT digest FROM blob").fetchall()]
        for start in range(0, len(digests), _BLOB_BATCH):
            batch = digests[start : start + _BLOB_BATCH]
            marks = ",".join("?" * len(batch))
            bodies = [
                bytes(row[0]) for row in connection.execute(f"SELECT body FROM blob WHERE digest IN ({marks})", batch)
            ]
            self.blobs.put_many(bodies)
        connection.execute("COMMIT")
        for start in range(0, len(digests), _BLOB_BATCH):
            batch = digests[start : start + _BLOB_BATCH]
            connection.execute(f"DELETE FROM blob WHERE digest IN ({','.join('?' * len(batch))})", batch)
        return len(digests)

    def _delete(self, checkpoint: Checkpoint) -> None:
        for part in checkpoint.ranges:
            path = self.layout.outbox / f"{part.outbox}.sqlite"
            if path.exists():
                with closing(connect(path)) as connection:
                    connection.execute("DELETE FROM event WHERE seq <= ?", (part.last,))

    def _project(self) -> bool:
        if not self.segments.numbers():
            return True
        try:
            with open_database(self.layout.database, read_only=False, wait_s=self.busy_wait_s) as connection:
                project(connection, self.segments)
        except ProjectionBusy:
            return False
        return True

    def _remove_finished(self) -> int:
        """Remove the files of processes that are gone and whose rows are sealed."""
        removed = 0
        for path in outbox_files(self.layout):
            lock = path.with_suffix(".lock")
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_empty(path):
                    for extra in (path, Path(f"{path}-wal"), Path(f"{path}-shm"), lock):
                        extra.unlink(missing_ok=True)
                    removed += 1
            except BlockingIOError:
                pass
            finally:
                os.close(descriptor)
        return removed


def _is_empty(path: Path) -> bool:
    try:
        with closing(connect(path)) as connection:
            row = connection.execute(
                "SELECT NOT EXISTS (SELECT 1 FROM event) AND NOT EXISTS (SELECT 1 FROM blob)"
            ).fetchone()
            return bool(row[0])
    except sqlite3.OperationalError as error:
        return "no such table" in str(error)
    except sqlite3.DatabaseError:
        return False

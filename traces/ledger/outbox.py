"""How does one process write events so that an acknowledged one survives it?

One SQLite WAL file per writing process, filled by one thread from an in-memory queue in groups.  A *mandatory* event
is acknowledged only after a ``synchronous=FULL`` commit; *optional* ones ride along and are dropped, counted and
recorded when the queue is full.  After the first storage error the outbox halts: a failed fsync may have lost pages
that a later one reports as written, so nothing is acknowledged after it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from traces.envelope import TraceEvent
from traces.failures import EventRefused, TelemetryPersistenceError

SCHEMA = """
CREATE TABLE event (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE blob (digest TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
"""
GROUP_LIMIT = 4_096
QUEUE_LIMIT = 65_536
GROUP_WINDOW_US = 50_000
"""Longest that optional events wait for each other, if nothing mandatory comes: each group costs a busy engine the
writer's wake-up, and what the writer reads is cold."""
BUSY_SECONDS = 30.0


class Stamper(Protocol):
    """Gives an event its identity, hides its secrets and encodes it; the recorder is one."""

    def stamp(self, event: TraceEvent, outbox: str, *, seq: int, mandatory: bool) -> bytes:
        """Return the canonical body."""
        ...

    def report_drops(self, count: int) -> TraceEvent:
        """Return the event that says how many optional events were dropped."""
        ...


class Entry(NamedTuple):
    """One thing in the queue."""

    event: TraceEvent | None
    blob: tuple[str, bytes] | None = None
    acknowledge: Future[None] | None = None


class Outbox:
    """The queue, the writer thread and the file of one process."""

    def __init__(
        self,
        folder: Path,
        stamper: Stamper,
        *,
        group_window_us: int = GROUP_WINDOW_US,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        self.name = f"{os.getpid()}-{os.urandom(8).hex()}"
        self.path = folder / f"{self.name}.sqlite"
        self.queue_limit = queue_limit
        self.dropped = 0
        self.failure: TelemetryPersistenceError | None = None
        self._stamper = stamper
        self._window_s = group_window_us / 1_000_000
        self._queue: deque[Entry] = deque()
        self._wake = threading.Event()
        self._idle = True
        self._awaited = False
        self._closing = False
        self._stopped = False
        self._full = True
        self._drops_reported = 0
        self._drop_lock = threading.Lock()
        self._seq = 0
        self._process = os.getpid()
        try:
            self._lock_file = _hold_lock(self.path.with_suffix(".lock"))
            self._connection = _create(self.path)
        except (OSError, sqlite3.Error) as error:
            raise self._as_failure(error) from error
        self._thread = threading.Thread(target=self._run, name=f"outbox-{self.name}", daemon=True)
        self._thread.start()

    def offer(self, event: TraceEvent) -> bool:
        """Queue an optional event; return False when it was dropped.  The hot path: it never waits."""
        queue = self._queue
        if len(queue) >= self.queue_limit or self.failure is not None or self._closing:
            with self._drop_lock:
                self.dropped += 1
            return False
        queue.append(Entry(event))
        if self._idle:
            self._wake.set()
        return True

    def submit(self, event: TraceEvent | None, *, blob: tuple[str, bytes] | None = None) -> Future[None]:
        """Queue a mandatory event (or a blob, or nothing: a barrier); the future resolves when it is durable."""
        acknowledge: Future[None] = Future()
        refusal = self._refusal()
        if refusal is not None:
            acknowledge.set_exception(refusal)
            return acknowledge
        self._queue.append(Entry(event, blob, acknowledge))
        self._awaited = True
        self._wake.set()
        if self._stopped:
            self._refuse_queue()  # the writer may have gone between the check and the append
        return acknowledge

    def put_blob(self, digest: str, data: bytes) -> None:
        """Queue evidence; it is durable at the latest with the next mandatory event.

        Raises:
            TelemetryPersistenceError: the outbox has halted or is closed.
        """
        refusal = self._refusal()
        if refusal is not None:
            raise refusal
        self._queue.append(Entry(None, (digest, data)))
        if self._idle:
            self._wake.set()

    def close(self) -> None:
        """Write what is queued and stop; idempotent."""
        if self._process != os.getpid():
            return
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._lock_file.close()

    def _refusal(self) -> TelemetryPersistenceError | None:
        if self.failure is not None:
            return self.failure
        if self._process != os.getpid():
            return TelemetryPersistenceError(
                "This recorder was opened by another process.", fix="open a Recorder after the fork, one per process."
            )
        if self._closing:
            return TelemetryPersistenceError("The recorder is closed.", fix="record before closing it.")
        return None

    def _run(self) -> None:
        while self.failure is None:
            if not self._queue:
                self._idle = True
                if not self._queue and not self._closing:
                    self._wake.wait()
                self._idle = False
                if not self._queue:
                    if self._closing:
                        break
                    self._wake.clear()
                    continue
            self._wake.clear()
            if not self._closing and not self._awaited and len(self._queue) < GROUP_LIMIT:
                self._wake.wait(self._window_s)  # a mandatory event or close() cuts the window short
            self._write_group()
        self._stop()

    def _write_group(self) -> None:
        self._awaited = False
        group = [self._queue.popleft() for _ in range(min(len(self._queue), GROUP_LIMIT))]
        barriers = [entry.acknowledge for entry in group if entry.acknowledge is not None]
        # From here a waiter can no longer cancel; the event of one that did is written all the same.
        waiting = [acknowledge for acknowledge in barriers if acknowledge.set_running_or_notify_cancel()]
        try:
            bodies, refused = self._stamp(group)
            blobs = [entry.blob for entry in group if entry.blob is not None]
            self._commit(bodies, blobs, full=bool(barriers))
        except Exception as error:  # whatever stopped this write, no later one may be acknowledged
            self.failure = self._as_failure(error)
            for acknowledge in waiting:
                acknowledge.set_exception(self.failure)
            return
        for acknowledge in waiting:
            refusal = refused.get(id(acknowledge))
            if refusal is None:
                acknowledge.set_result(None)
            else:
                acknowledge.set_exception(refusal)

    def _stamp(self, group: list[Entry]) -> tuple[list[tuple[int, bytes]], dict[int, EventRefused]]:
        """Encode a group in order; an event that cannot be encoded takes no sequence number."""
        bodies: list[tuple[int, bytes]] = []
        refused: dict[int, EventRefused] = {}
        entries = group
        unreported = self.dropped - self._drops_reported
        if unreported:
            self._drops_reported += unreported
            entries = [Entry(self._stamper.report_drops(unreported)), *group]
        for event, _, acknowledge in entries:
            if event is None:
                continue
            seq = self._seq + 1
            try:
                body = self._stamper.stamp(event, self.name, seq=seq, mandatory=acknowledge is not None)
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                refusal = EventRefused(
                    f"The payload of {event.event_type} cannot be encoded: {error}.", fix="use plain JSON values."
                )
                if acknowledge is not None:
                    refused[id(acknowledge)] = refusal
                else:
                    with self._drop_lock:
                        self.dropped += 1
                continue
            self._seq = seq
            bodies.append((seq, body))
        return bodies, refused

    def _commit(self, bodies: list[tuple[int, bytes]], blobs: list[tuple[str, bytes]], *, full: bool) -> None:
        connection = self._connection
        if full is not self._full:  # optional-only groups need no fsync; the next FULL commit covers their frames
            connection.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
            self._full = full
        if not bodies and not blobs and not full:
            return
        connection.execute("BEGIN IMMEDIATE")
        if bodies:
            connection.executemany("INSERT INTO event VALUES (?, ?)", bodies)
        if blobs:
            connection.executemany("INSERT OR IGNORE INTO blob VALUES (?, ?)", blobs)
        if full and not bodies and not blobs:
            # A barrier: an empty transaction would not sync what earlier optional groups wrote.
            connection.execute("UPDATE barrier SET count = count + 1")
        connection.execute("COMMIT")

    def _refuse_queue(self) -> None:
        refusal = self.failure or self._refusal() or TelemetryPersistenceError("The outbox has stopped.")
        while self._queue:
            try:
                entry = self._queue.popleft()
            except IndexError:
                return
            if entry.acknowledge is not None:
                if entry.acknowledge.set_running_or_notify_cancel():
                    entry.acknowledge.set_exception(refusal)
            elif entry.event is not None:
                with self._drop_lock:
                    self.dropped += 1

    def _stop(self) -> None:
        try:
            self._connection.close()
        except sqlite3.Error as error:
            self.failure = self.failure or self._as_failure(error)
        self._stopped = True
        self._refuse_queue()

    def _as_failure(self, error: BaseException) -> TelemetryPersistenceError:
        return TelemetryPersistenceError(
            f"The ledger's outbox {self.path} cannot be written: {error}.",
            evidence={
                "record_type": "event",
                "storage_target": str(self.path),
                "durability": "mandatory",
                "retry_state": "halted",
                "user_warning": "nothing was acknowledged after this error",
            },
            fix="free disk space or give a writable --ledger, then start again; what was acknowledged is safe.",
        )


def _create(path: Path) -> sqlite3.Connection:
    old_mask = os.umask(0o077)
    try:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    finally:
        os.umask(old_mask)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(
        "BEGIN;" + SCHEMA + "CREATE TABLE barrier (count INTEGER); INSERT INTO barrier VALUES (0);COMMIT;"
    )
    return connection


def _hold_lock(path: Path) -> Any:
    """Hold a lock for as long as this process lives, so that a drainer knows when the file is nobody's."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    file = os.fdopen(descriptor, "r+b")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file

"""How is a ledger read, drained, checked, rebuilt and compacted?

``Ledger`` is the room's front: readers open the DuckDB projection read-only for one question and wait while a drain
holds it; everything that changes the ledger runs under the drain lock.  Importing this loads no database library.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from traces.envelope import TraceEvent, decode
from traces.failures import EvidenceError
from traces.ledger import queries
from traces.ledger.blobs import BlobStore
from traces.ledger.layout import LedgerLayout, default_ledger
from traces.ledger.outboxes import pending_events, read_pending_blob

if TYPE_CHECKING:
    import duckdb
    import polars

    from traces.ledger.drain import DrainReport
    from traces.ledger.findings import VerifyReport
    from traces.ledger.upkeep import CompactReport


class Ledger:
    """One ledger folder, by default ``REPLAYLAB_LEDGER`` or ``./ledger``.  Opening makes nothing on disk."""

    def __init__(self, path: Path | str | None = None, *, wait_s: float = 10.0) -> None:
        self.path = default_ledger() if path is None else Path(path)
        self.layout = LedgerLayout(self.path)
        self.blobs = BlobStore(self.layout.blobs)
        self._wait_s = wait_s
        self._connection: duckdb.DuckDBPyConnection | None = None

    @property
    def exists(self) -> bool:
        """Whether something was ever recorded here."""
        return self.layout.segments.is_dir()

    def pending(self) -> int:
        """Return how many events still wait in outboxes for a drain."""
        return pending_events(self.layout)

    def drain(self, *, busy_wait_s: float = 10.0) -> DrainReport:
        """Seal what the outboxes hold and project it.  Any process may call this at any time.

        Raises:
            TelemetryPersistenceError: the ledger cannot be written, or another drain does not end.
        """
        from traces.ledger.drain import Drainer, drain_lock

        self.layout.create()
        with drain_lock(self.layout):
            return Drainer(self.layout, busy_wait_s=busy_wait_s).drain()

    def verify(self, *, blobs: bool = True, progress: Callable[[int], None] | None = None) -> VerifyReport:
        """Check every segment, signature, head, projected row and (unless told otherwise) piece of evidence."""
        from traces.ledger.verify import verify

        return verify(self.layout, blobs=blobs, progress=progress)

    def rebuild(self, *, progress: Callable[[int], None] | None = None) -> int:
        """Make the projection again from the segments; return how many events it holds."""
        from traces.ledger.upkeep import rebuild

        return rebuild(self.layout, progress=progress)

    def compact(self) -> CompactReport:
        """Rewrite the projection without its free blocks.  Segments are evidence and stay as they are."""
        from traces.ledger.upkeep import compact

        return compact(self.layout)

    def put_blob(self, data: bytes) -> str:
        """Store evidence durably and return ``evidence://sha256/<hex>``."""
        self.layout.create()
        return self.blobs.put(data)

    def read_blob(self, reference: str) -> bytes:
        """Return the bytes of ``evidence://sha256/<hex>`` or ``sha256:<hex>``, drained or not, digest verified.

        Raises:
            EvidenceError: missing or damaged.
        """
        try:
            return self.blobs.get(reference)
        except EvidenceError:
            waiting = read_pending_blob(self.layout, reference)
            if waiting is not None:
                return waiting
            return self.blobs.get(reference)  # a drain may have moved it between the two looks

    def events(
        self,
        run_id: str | None = None,
        request_ref: str | None = None,
        event_type: str | Sequence[str] | None = None,
    ) -> list[TraceEvent]:
        """Return the drained events that match, in ledger order (inside one process: exactly as recorded)."""
        wanted = [event_type] if isinstance(event_type, str) else None if event_type is None else list(event_type)
        with self.reading() as connection:
            found = connection.execute(
                queries.EVENTS, {"run_id": run_id, "request_ref": request_ref, "event_types": wanted}
            ).fetchall()
        return [decode(bytes(body)) for (body,) in found]

    def events_of(self, run_id: str, request_refs: Sequence[str]) -> list[TraceEvent]:
        """Return the drained events of some requests of a run, and those of no request but engine steps, in order."""
        with self.reading() as connection:
            parameters = {"run_id": run_id, "request_refs": list(request_refs)}
            found = connection.execute(queries.RUN_EVENTS_OF, parameters).fetchall()
        return [decode(bytes(body)) for (body,) in found]

    def step_count(self, run_id: str) -> int:
        """Return how many engine steps of a run are recorded."""
        return int(self.rows(queries.STEP_COUNT, {"run_id": run_id})[0]["steps"])

    def steps(self, run_id: str, engine_id: str, *, first: int, last: int) -> list[TraceEvent]:
        """Return the drained `engine.step` events of one engine from step `first` to `last`, ascending."""
        parameters = {"run_id": run_id, "engine_id": engine_id, "first": first, "last": last}
        with self.reading() as connection:
            found = connection.execute(queries.STEP_EVENTS, parameters).fetchall()
        return [decode(bytes(body)) for (body,) in found]

    def runs(self) -> list[dict[str, Any]]:
        """Return one row a run, newest first (see the ``run`` view)."""
        return self.rows(queries.RUNS)

    def requests(self, run_id: str | None = None) -> list[dict[str, Any]]:
        """Return one row a request, newest first, of one run or of all (see the ``request`` view)."""
        return self.rows(queries.REQUESTS, {"run_id": run_id})

    def last_incident(self) -> dict[str, Any] | None:
        """Return the newest request that did not end ok, or whose replay diverged; None when there is none."""
        found = self.rows(queries.LAST_INCIDENT)
        return found[0] if found else None

    def waterfall(self, request_ref: str, *, run_id: str | None = None) -> list[dict[str, Any]]:
        """Return a request's spans in order of start, with ``offset_us`` from the first; by default of its live run."""
        return self.rows(queries.WATERFALL, {"request_ref": request_ref, "run_id": run_id})

    def rows(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Answer a question as plain rows; needs no data-frame library."""
        with self.reading() as connection:
            cursor = connection.execute(sql, dict(parameters) if parameters else None)
            names = [str(column[0]) for column in cursor.description or []]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def frame(self, sql: str, parameters: Mapping[str, Any] | None = None) -> polars.DataFrame:
        """Answer a question as a polars frame."""
        import polars

        with self.reading() as connection:
            table = connection.sql(sql, params=dict(parameters) if parameters else None).to_arrow_table()
        return cast("polars.DataFrame", polars.from_arrow(table))

    @contextmanager
    def reading(self) -> Generator[duckdb.DuckDBPyConnection]:
        """Hold the projection open read-only for several questions (a drain waits meanwhile: be short).

        Raises:
            ProjectionBusy: a drain held the file for longer than ``wait_s``.
        """
        from traces.ledger.projection import empty_database, open_database

        if self._connection is not None:
            yield self._connection
            return
        opened = (
            open_database(self.layout.database, read_only=True, wait_s=self._wait_s)
            if self.layout.database.exists()
            else empty_database()
        )
        with opened as connection:
            self._connection = connection
            try:
                yield connection
            finally:
                self._connection = None

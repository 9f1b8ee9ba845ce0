"""How do sealed segments become rows that SQL can ask, once each?

Every segment is inserted in one transaction together with its row in ``segment``, so a killed projection either has the
segment or has not.  The database is opened for the insert only: a DuckDB writer shuts every other process out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from traces.failures import TelemetryPersistenceError
from traces.ledger.schema import ENVELOPE, EVENT_COLUMNS, MIGRATIONS, Column
from traces.ledger.segments import SegmentRow, Segments

if TYPE_CHECKING:
    import duckdb

_BUSY = ("could not set lock", "different configuration", "conflicting lock", "already attached", "unique file handle")
_ROWS_PER_TRANSACTION = 100_000
_CHUNK = 4_096
_INSERT = "INSERT INTO event SELECT {columns} FROM incoming"


class ProjectionBusy(TelemetryPersistenceError):
    """Another process holds the DuckDB file; the sealed segments are safe and a later drain catches up."""


@contextmanager
def open_database(path: Path, *, read_only: bool, wait_s: float = 10.0) -> Generator[duckdb.DuckDBPyConnection]:
    """Open the projection, waiting with backoff while another process holds it.

    Raises:
        ProjectionBusy: it stayed held for ``wait_s`` seconds.
        TelemetryPersistenceError: the file is not a readable DuckDB database.
    """
    import duckdb

    config: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    if read_only:
        config["enable_external_access"] = False
    deadline = time.monotonic() + wait_s
    pause = 0.01
    while True:
        try:
            connection = duckdb.connect(str(path), read_only=read_only, config=config)
            break
        except duckdb.Error as error:
            text = str(error).lower()
            if not any(sign in text for sign in _BUSY):
                raise TelemetryPersistenceError(
                    f"The projection {path} cannot be opened: {str(error).splitlines()[0]}",
                    evidence={"record_type": "projection", "storage_target": str(path)},
                    fix="run 'replaylab ledger rebuild': the segments hold everything.",
                ) from error
            if time.monotonic() >= deadline:
                raise ProjectionBusy(
                    f"The projection {path} is held by another process.",
                    evidence={"record_type": "projection", "storage_target": str(path)},
                    fix="close the other reader or writer and try again.",
                ) from error
            time.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, 0.25)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def empty_database() -> Generator[duckdb.DuckDBPyConnection]:
    """Open an empty projection in memory: what a ledger answers before its first drain."""
    import duckdb

    connection = duckdb.connect(":memory:")
    try:
        migrate(connection)
        yield connection
    finally:
        connection.close()


def migrate(connection: duckdb.DuckDBPyConnection) -> int:
    """Bring the schema to the newest version, one numbered step a transaction; return the version."""
    connection.execute("CREATE TABLE IF NOT EXISTS migration (number INTEGER, applied_us BIGINT)")
    row = connection.execute("SELECT coalesce(max(number), 0) FROM migration").fetchone()
    done = int(row[0]) if row else 0
    if done > len(MIGRATIONS):
        raise TelemetryPersistenceError(
            f"The projection has schema version {done}; this build knows {len(MIGRATIONS)}.",
            fix="use the newer build, or run 'replaylab ledger rebuild' with this one.",
        )
    for number in range(done + 1, len(MIGRATIONS) + 1):
        connection.execute("BEGIN")
        connection.execute(MIGRATIONS[number - 1])
        connection.execute("INSERT INTO migration VALUES (?, ?)", [number, time.time_ns() // 1_000])
        connection.execute("COMMIT")
    return len(MIGRATIONS)


def high_water(connection: duckdb.DuckDBPyConnection) -> int:
    """Return the highest projected segment number, 0 in an empty database."""
    row = connection.execute("SELECT coalesce(max(number), 0) FROM segment").fetchone()
    return int(row[0]) if row else 0


def project(
    connection: duckdb.DuckDBPyConnection, segments: Segments, *, progress: Callable[[int], None] | None = None
) -> int:
    """Insert every sealed segment above the high-water mark; return how many events were inserted."""
    migrate(connection)
    done = high_water(connection)
    numbers = [number for number in segments.numbers() if number > done]
    inserted = 0
    while numbers:
        group: list[int] = []
        rows: list[tuple[int, SegmentRow]] = []
        while numbers and (not rows or len(rows) + segments.checkpoint(numbers[0]).leaves <= _ROWS_PER_TRANSACTION):
            number = numbers.pop(0)
            group.append(number)
            rows.extend((number, row) for row in segments.rows(number))
        table = event_table(rows)
        marks = [_mark(segments, number) for number in group]
        connection.execute("BEGIN")
        try:
            connection.register("incoming", table)
            connection.execute(_INSERT.format(columns=_select_list()))
            connection.unregister("incoming")
            for mark in marks:
                connection.execute("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?)", mark)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        inserted += len(rows)
        if progress is not None:
            progress(len(rows))
    return inserted


def _mark(segments: Segments, number: int) -> list[Any]:
    checkpoint = segments.checkpoint(number)
    text = segments.layout.checkpoint(number).read_text()
    return [
        number,
        checkpoint.first,
        checkpoint.leaves,
        checkpoint.root,
        checkpoint.previous,
        checkpoint.sealed_us,
        text,
    ]


def _select_list() -> str:
    return ", ".join(
        f'"{column.name}"::JSON::VARIANT' if column.type == "VARIANT" else f'"{column.name}"'
        for column in EVENT_COLUMNS
    )


def _row_type() -> type[msgspec.Struct]:
    """The envelope with plain values and the payload left as raw JSON: what the projection needs and no more."""
    types: dict[str, Any] = {"BIGINT": int, "VARCHAR": str, "VARIANT": msgspec.Raw}
    fields: list[Any] = [
        (column.name, types[column.type] | None, None) for column in ENVELOPE if column.type != "VARIANT"
    ]
    return msgspec.defstruct(
        "EventRow", [*fields, ("payload", msgspec.Raw, msgspec.Raw(b"{}"))], kw_only=True, gc=False
    )


def event_table(rows: Sequence[tuple[int, SegmentRow]]) -> Any:
    """Return (segment number, row) pairs in (run_id, seq) order as an Arrow table, the payload as JSON text."""
    import pyarrow

    decode = cast("Callable[[bytes], Any]", msgspec.json.Decoder(_row_type()).decode)
    chunks = [_chunk(rows[start : start + _CHUNK], decode) for start in range(0, max(len(rows), 1), _CHUNK)]
    table = pyarrow.concat_tables(chunks)
    runs = table.column("run_id")
    if len(runs.unique()) > 1:
        table = table.sort_by([("run_id", "ascending"), ("seq", "ascending")])
    return table


def _chunk(rows: Sequence[tuple[int, SegmentRow]], decode: Callable[[bytes], Any]) -> Any:
    """Turn a few thousand rows into columns: few enough that they are still in the processor's cache."""
    import pyarrow

    events = [msgspec.structs.astuple(decode(row.body)) for _, row in rows]
    values: list[tuple[Any, ...]] = list(zip(*events, strict=True)) if events else [()] * len(ENVELOPE)
    arrays: dict[str, Any] = {
        "seq": pyarrow.array([row.seq for _, row in rows], pyarrow.int64()),
        "segment": pyarrow.array([number for number, _ in rows], pyarrow.int32()),
        "leaf_hash": pyarrow.array([row.leaf for _, row in rows], pyarrow.binary()),
    }
    for column, entries in zip(ENVELOPE, values, strict=True):
        arrays[column.name] = _arrow_column(column, entries)
    arrays["body"] = pyarrow.array([row.body for _, row in rows], pyarrow.binary())
    return pyarrow.table(arrays)


def _arrow_column(column: Column, values: tuple[Any, ...]) -> Any:
    import pyarrow

    if column.type == "VARIANT":
        return pyarrow.array([bytes(value).decode() for value in values], pyarrow.string())
    arrow_type = pyarrow.int64() if column.type == "BIGINT" else pyarrow.string()
    if values.count(None) == len(values):
        return pyarrow.nulls(len(values), arrow_type)
    return pyarrow.array(values, arrow_type)

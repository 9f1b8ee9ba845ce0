"""Ways to damage a ledger, each of which verification must find."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow
import pyarrow.parquet

from traces.ledger.checkpoint import Signer, open_note
from traces.ledger.ledger import Ledger
from traces.ledger.merkle import leaf_hash

Damage = Callable[[Path, int], None]
"""Takes the ledger and any number that chooses the place."""


def segment_file(ledger: Path, where: int) -> Path:
    """One of the segments."""
    files = sorted((ledger / "segments").glob("*.parquet"))
    return files[where % len(files)]


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Write a segment again with other rows."""
    table = pyarrow.parquet.read_table(path)
    rows = change(table.to_pylist())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), path)


def edit_body(ledger: Path, where: int) -> None:
    """Change a body, leave its leaf hash."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        row = rows[where % len(rows)]
        row["body"] = row["body"].replace(b'"ts_us":1', b'"ts_us":2')
        return rows

    rewrite(segment_file(ledger, where), change)


def edit_body_and_leaf(ledger: Path, where: int) -> None:
    """Change a body and its leaf hash."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        row = rows[where % len(rows)]
        row["body"] = row["body"].replace(b'"run_id":"run_', b'"run_id":"ran_')
        row["leaf_hash"] = leaf_hash(row["body"])
        return rows

    rewrite(segment_file(ledger, where), change)


def delete_event(ledger: Path, where: int) -> None:
    """Take one event out and close the gap in the numbers."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first = rows[0]["seq"]
        del rows[where % len(rows)]
        return [{**row, "seq": first + number} for number, row in enumerate(rows)]

    rewrite(segment_file(ledger, where), change)


def reorder_events(ledger: Path, where: int) -> None:
    """Exchange two neighbours, keeping the numbers in place."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        place = where % (len(rows) - 1)
        rows[place], rows[place + 1] = rows[place + 1], rows[place]
        rows[place]["seq"], rows[place + 1]["seq"] = rows[place + 1]["seq"], rows[place]["seq"]
        return rows

    rewrite(segment_file(ledger, where), change)


def truncate_segment(ledger: Path, where: int) -> None:
    """Cut a segment's file short."""
    path = segment_file(ledger, where)
    data = path.read_bytes()
    path.write_bytes(data[: 1 + where % (len(data) - 1)])


def flip_bit(ledger: Path, where: int) -> None:
    """Flip one bit of a signed checkpoint."""
    path = segment_file(ledger, where).with_suffix(".checkpoint")
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1 << (where % 7)
    path.write_bytes(bytes(data))


def swap_segments(ledger: Path, where: int) -> None:
    """Exchange the files of two segments, checkpoints left in place."""
    files = sorted((ledger / "segments").glob("*.parquet"))
    one, other = files[where % len(files)], files[(where + 1) % len(files)]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def swap_segments_and_checkpoints(ledger: Path, where: int) -> None:
    """Exchange two segments whole."""
    swap_segments(ledger, where)
    files = sorted((ledger / "segments").glob("*.checkpoint"))
    one, other = files[where % len(files)], files[(where + 1) % len(files)]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def remove_segment(ledger: Path, where: int) -> None:
    """Remove a segment and its checkpoint."""
    path = segment_file(ledger, where)
    path.unlink()
    path.with_suffix(".checkpoint").unlink()


def remove_checkpoint(ledger: Path, where: int) -> None:
    """Remove a checkpoint only."""
    segment_file(ledger, where).with_suffix(".checkpoint").unlink()


def roll_back_head(ledger: Path, where: int) -> None:
    """Put an older signed head in place of the newest."""
    checkpoints = sorted((ledger / "segments").glob("*.checkpoint"))
    shutil.copy(checkpoints[where % (len(checkpoints) - 1)], ledger / "head")


def remove_head(ledger: Path, where: int) -> None:
    """Remove the head."""
    (ledger / "head").unlink()


def roll_back_everything(ledger: Path, where: int) -> None:
    """Return the whole folder, database included, to an older state: only the witness knows better."""
    newest = sorted((ledger / "segments").glob("*.checkpoint"))[-1]
    newest.with_suffix(".parquet").unlink()
    newest.unlink()
    shutil.copy(sorted((ledger / "segments").glob("*.checkpoint"))[-1], ledger / "head")
    (ledger / "ledger.duckdb").unlink()
    Ledger(ledger).rebuild()


def sign_with_another_key(ledger: Path, where: int) -> None:
    """Sign a checkpoint again, with a key of one's own."""
    path = segment_file(ledger, where).with_suffix(".checkpoint")
    own = Signer((ledger / "keys" / "signing.key").read_bytes())
    path.write_bytes(Signer(bytes(32)).sign(open_note(path.read_bytes(), own.public)))


def sql(ledger: Path, statement: str) -> None:
    """Change the projection."""
    connection = duckdb.connect(str(ledger / "ledger.duckdb"))
    connection.execute(statement)
    connection.close()


def edit_row(ledger: Path, where: int) -> None:
    """Change one column of a projected row."""
    columns = ("status = 'ok'", "duration_us = 1", "request_ref = 'req_x'", "run_id = 'run_x'", "leaf_hash = NULL")
    sql(ledger, f"UPDATE event SET {columns[where % len(columns)]} WHERE seq = {1 + where % 30}")


def edit_row_payload(ledger: Path, where: int) -> None:
    """Change the payload of a projected row."""
    sql(ledger, f"""UPDATE event SET payload = '{{"kind":"{where}"}}'::JSON::VARIANT WHERE seq = {1 + where % 30}""")


def delete_row(ledger: Path, where: int) -> None:
    """Delete a projected row."""
    sql(ledger, f"DELETE FROM event WHERE seq = {1 + where % 30}")


def double_row(ledger: Path, where: int) -> None:
    """Insert a projected row twice."""
    sql(ledger, f"INSERT INTO event SELECT * FROM event WHERE seq = {1 + where % 30}")


def move_mark(ledger: Path, where: int) -> None:
    """Change the projection's high-water mark."""
    sql(ledger, "UPDATE segment SET leaves = leaves + 1 WHERE number = 1")


def edit_blob(ledger: Path, where: int) -> None:
    """Change a piece of evidence."""
    files = sorted((ledger / "blobs").glob("*/*"))
    path = files[where % len(files)]
    path.write_bytes(path.read_bytes() + b"!")


def delete_pending_event(ledger: Path, where: int) -> None:
    """Delete an event from an outbox before it is sealed, then drain."""
    import sqlite3

    from traces.recorder import Recorder

    with Recorder(ledger, run_id="run_9", component="test") as recorder:
        for number in range(5):
            recorder.commit("x", step=number)
        path = ledger / "outbox" / f"{recorder.outbox_name}.sqlite"
        connection = sqlite3.connect(path)
        connection.execute("DELETE FROM event WHERE seq = ?", (1 + where % 4,))
        connection.commit()
        connection.close()
    Ledger(ledger).drain()


DAMAGES: tuple[Damage, ...] = (
    edit_body,
    edit_body_and_leaf,
    delete_event,
    reorder_events,
    truncate_segment,
    flip_bit,
    swap_segments,
    swap_segments_and_checkpoints,
    remove_segment,
    remove_checkpoint,
    roll_back_head,
    remove_head,
    roll_back_everything,
    sign_with_another_key,
    edit_row,
    edit_row_payload,
    delete_row,
    double_row,
    move_mark,
    edit_blob,
    delete_pending_event,
)

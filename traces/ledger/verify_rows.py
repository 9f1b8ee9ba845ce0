"""Does every projected row still say what its sealed event says?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from traces.failures import TelemetryPersistenceError
from traces.ledger.checkpoint import Checkpoint
from traces.ledger.findings import Finding, VerifyReport
from traces.ledger.layout import LedgerLayout
from traces.ledger.projection import event_table, open_database
from traces.ledger.schema import EVENT_COLUMNS, MIGRATIONS, Column
from traces.ledger.segments import SegmentError, SegmentRow, Segments

if TYPE_CHECKING:
    import duckdb

_ROWS_AT_ONCE = 20_000


def _same(column: Column) -> str:
    name = f'"{column.name}"'
    if column.type == "VARIANT":  # a VARIANT sorts keys and retypes numbers: send the sealed text the same way
        return f"incoming.{name}::JSON::VARIANT::VARCHAR IS NOT DISTINCT FROM stored.{name}::VARCHAR"
    return f"incoming.{name} IS NOT DISTINCT FROM stored.{name}"


_DIFFERENCE = f"""
WITH stored AS (SELECT * FROM event WHERE segment BETWEEN $first AND $last)
SELECT CASE WHEN stored.seq IS NULL THEN 'is missing' WHEN incoming.seq IS NULL THEN 'was added' ELSE 'was changed' END,
       coalesce(incoming.seq, stored.seq) AS seq,
       coalesce(incoming.segment, stored.segment) AS segment
FROM incoming FULL JOIN stored ON incoming.seq = stored.seq
WHERE NOT ({" AND ".join(_same(column) for column in EVENT_COLUMNS)})
UNION ALL
SELECT 'was doubled', seq, any_value(segment) FROM stored GROUP BY seq HAVING count(*) > 1
ORDER BY seq
"""


def check_rows(layout: LedgerLayout, report: VerifyReport, checkpoints: dict[int, Checkpoint]) -> None:
    """Compare the projection with the segments, row for row, all columns; call with the drain lock held."""
    try:
        with open_database(layout.database, read_only=False) as connection:
            version = connection.execute("SELECT max(number) FROM migration").fetchone()
            if version is None or version[0] != len(MIGRATIONS):
                report.notes.append("the projection has an older schema; the next drain brings it up to date")
                return
            _check(connection, layout, report, checkpoints)
    except TelemetryPersistenceError as error:
        report.findings.append(Finding("row", error.message))


def _check(
    connection: duckdb.DuckDBPyConnection,
    layout: LedgerLayout,
    report: VerifyReport,
    checkpoints: dict[int, Checkpoint],
) -> None:
    segments = Segments(layout)
    marks = {
        int(row[0]): (int(row[1]), int(row[2]), bytes(row[3]))
        for row in connection.execute("SELECT number, first, leaves, root FROM segment").fetchall()
    }
    behind = sorted(set(checkpoints) - set(marks))
    if behind and marks and behind[0] < max(marks):
        report.findings.append(Finding("row", f"segment {behind[0]} is not in the projection", behind[0]))
    elif behind:
        report.notes.append(f"{len(behind)} segments are not projected yet; the next drain does it")
    group: list[tuple[int, SegmentRow]] = []
    for number, mark in sorted(marks.items()):
        checkpoint = checkpoints.get(number)
        if checkpoint is None:
            report.findings.append(
                Finding("row", f"the projection knows segment {number}, the ledger does not", number)
            )
            continue
        if mark != (checkpoint.first, checkpoint.leaves, checkpoint.root):
            report.findings.append(Finding("row", f"the projection's mark of segment {number} was changed", number))
        try:
            group.extend((number, row) for row in segments.rows(number))
        except SegmentError:
            _compare(connection, report, group)  # the damaged segment is reported already: leave it out of every range
            group = []
            continue
        if len(group) >= _ROWS_AT_ONCE or number + 1 not in checkpoints:
            _compare(connection, report, group)
            group = []
    _compare(connection, report, group)
    stray = connection.execute(
        "SELECT count(*), min(seq) FROM event WHERE segment IS NULL OR segment NOT IN (SELECT number FROM segment)"
    ).fetchone()
    if stray is not None and stray[0]:
        report.findings.append(Finding("row", f"{stray[0]} projected rows belong to no segment", None, stray[1]))


def _compare(connection: duckdb.DuckDBPyConnection, report: VerifyReport, rows: list[tuple[int, SegmentRow]]) -> None:
    """Compare neighbouring segments' sealed rows with the projected ones."""
    if not rows:
        return
    connection.register("incoming", event_table(rows))
    found = connection.execute(_DIFFERENCE, {"first": rows[0][0], "last": rows[-1][0]}).fetchall()
    connection.unregister("incoming")
    report.rows += len(rows)
    for what, seq, segment in found:
        report.findings.append(Finding("row", f"the projected row of event {seq} {what}", segment, seq))

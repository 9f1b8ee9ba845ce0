"""How do events become a sealed, signed file, and how are they read back?

A segment is ``NNNNNNNN.parquet`` (sequence number, leaf hash, canonical body) and ``NNNNNNNN.checkpoint``.  The
checkpoint's rename is the moment of sealing: a Parquet file without one is an unfinished attempt and is written again.
Segments are never rewritten, so their leaves and roots stay verifiable for good.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from traces.envelope import SCHEMA_VERSION
from traces.ledger.checkpoint import Checkpoint, CheckpointError, OutboxRange, Signer, parse
from traces.ledger.keys import ledger_id, signing_seed
from traces.ledger.layout import LedgerLayout, sync_folder, write_durably
from traces.ledger.merkle import leaf_hash, root_of

WRITER = f"replaylab envelope-{SCHEMA_VERSION}"


class OutboxRow(NamedTuple):
    """One event as an outbox holds it."""

    outbox: str
    seq: int
    body: bytes


class SegmentRow(NamedTuple):
    """One event as a segment holds it."""

    seq: int
    leaf: bytes
    body: bytes


class SegmentError(Exception):
    """A segment's Parquet file cannot be read."""


class Segments:
    """The sealed segments of one ledger."""

    def __init__(self, layout: LedgerLayout) -> None:
        self.layout = layout

    def numbers(self) -> list[int]:
        """Return the numbers of all checkpoints, ascending."""
        return sorted(int(path.stem) for path in self.layout.segments.glob("[0-9]*.checkpoint"))

    def checkpoint(self, number: int) -> Checkpoint:
        """Return what a segment's checkpoint says (its signature is not judged here).

        Raises:
            CheckpointError: missing or unreadable.
        """
        try:
            return parse(self.layout.checkpoint(number).read_bytes())
        except OSError as error:
            raise CheckpointError(f"segment {number} has no readable checkpoint ({error.strerror})") from error

    def last(self) -> Checkpoint | None:
        """Return the newest segment's checkpoint, or None in an empty ledger."""
        numbers = self.numbers()
        return self.checkpoint(numbers[-1]) if numbers else None

    def rows(self, number: int) -> list[SegmentRow]:
        """Return a segment's events as stored, without judging them.

        Raises:
            SegmentError: the file is missing, cut short or not Parquet.
        """
        table = self._table(number)
        columns: list[list[Any]] = [table.column(name).to_pylist() for name in ("seq", "leaf_hash", "body")]
        return [SegmentRow(*row) for row in zip(*columns, strict=True)]

    def _table(self, number: int) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(
                self.layout.segment(number), columns=["seq", "leaf_hash", "body"], use_threads=False
            )
        except (OSError, pyarrow.ArrowException, KeyError) as error:
            raise SegmentError(f"segment {number} cannot be read: {error}") from error

    def all_rows(self) -> Iterator[SegmentRow]:
        """Yield every sealed event in ledger order."""
        for number in self.numbers():
            yield from self.rows(number)

    def seal(self, rows: Sequence[OutboxRow], *, previous: Checkpoint | None, now_us: int | None = None) -> Checkpoint:
        """Write rows (ordered by outbox and sequence) as the next segment; return its checkpoint once it is durable."""
        number = 1 if previous is None else previous.segment + 1
        leaves = [leaf_hash(row.body) for row in rows]
        checkpoint = Checkpoint(
            ledger_id=ledger_id(self.layout),
            segment=number,
            leaves=len(rows),
            root=root_of(leaves),
            first=1 if previous is None else previous.last + 1,
            previous=None if previous is None else previous.root,
            ranges=_ranges(rows),
            sealed_us=time.time_ns() // 1_000 if now_us is None else now_us,
            writer=WRITER,
        )
        _write_parquet(self.layout.segment(number), rows, leaves, first=checkpoint.first)
        signer = self._signer()
        write_durably(self.layout.checkpoint(number), signer.sign(checkpoint))
        return checkpoint

    def write_head(self, checkpoint: Checkpoint) -> None:
        """Note the newest checkpoint in the head, and in the witness where that place is writable."""
        note = self._signer().sign(checkpoint)
        write_durably(self.layout.head, note)
        try:
            write_durably(self.layout.witness, note)
        except OSError:
            return  # the folder above may not be ours; verify then says that there is no witness

    def _signer(self) -> Signer:
        signer = Signer(signing_seed(self.layout))
        public = self.layout.keys / "signing.pub"
        if not public.exists():
            write_durably(public, signer.public)
        return signer

    def discard_unfinished(self) -> None:
        """Remove what killed attempts left behind (call with the drain lock held)."""
        for path in self.layout.segments.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for path in self.layout.segments.glob("*.parquet"):
            if not path.with_suffix(".checkpoint").exists():
                newest = self.last()
                if newest is None or int(path.stem) > newest.segment:
                    path.unlink(missing_ok=True)


def _ranges(rows: Sequence[OutboxRow]) -> tuple[OutboxRange, ...]:
    """Return the unbroken runs of numbers: a gap starts a new one, so the signed text shows it."""
    ranges: list[OutboxRange] = []
    for row in rows:
        last = ranges[-1] if ranges else None
        if last is not None and last.outbox == row.outbox and row.seq == last.last + 1:
            ranges[-1] = OutboxRange(row.outbox, last.first, row.seq)
        else:
            ranges.append(OutboxRange(row.outbox, row.seq, row.seq))
    return tuple(ranges)


def _write_parquet(path: Path, rows: Sequence[OutboxRow], leaves: Sequence[bytes], *, first: int) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "seq": pyarrow.array(range(first, first + len(rows)), pyarrow.int64()),
            "leaf_hash": pyarrow.array(leaves, pyarrow.binary(32)),
            "body": pyarrow.array([row.body for row in rows], pyarrow.binary()),
        }
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        pyarrow.parquet.write_table(table, file, compression="zstd", use_dictionary=False, write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)

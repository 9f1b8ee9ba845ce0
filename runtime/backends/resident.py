"""Which row's context stands where between two steps?  Tables that a step fills, kept true to the pool.

A decode step needs each row's whole context again, one position longer.  The program puts the new keys and values into
the row's own columns, so the next step finds everything in place, and nothing is copied while a sequence keeps its row.
What is kept of a step is copied into the pool when somebody wants it from there, many columns at once.  A row is read
from the pool again whenever its slots, or what was written into them since, are not those that its columns came from:
what a step computes never depends on what stood in the tables before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.backends.contract import Integers
from runtime.backends.errors import InputRefused
from runtime.backends.pool import ArrayPool, aligned_zeros
from runtime.backends.protocol import Floats
from runtime.models.config import ModelConfig

UNHELD, HELD, UNSTORED = 0, 1, 2
"""Of a slot: no row holds it; some row may; only a row has it, the pool not yet."""


class Tables:
    """Keys and values of some rows: tables [rows,columns,kv width], keys, then values of layer 0, of layer 1, ...

    Zero at first.  The leading rows of a table are one piece of memory.
    """

    def __init__(self, config: ModelConfig, *, rows: int, columns: int) -> None:
        self.rows, self.columns, self.width = rows, columns, config.kv_width
        self._memory = [aligned_zeros(rows * columns, self.width) for _ in range(2 * config.num_layers)]
        self._spare = aligned_zeros(0, self.width)
        self.all = [self._shaped(memory) for memory in self._memory]

    @property
    def k(self) -> list[Floats]:
        """Keys of each layer."""
        return self.all[::2]

    @property
    def v(self) -> list[Floats]:
        """Values of each layer."""
        return self.all[1::2]

    def fill(self, rows: Integers, pool: ArrayPool, slots: Integers, *, lengths: Integers) -> None:
        """Read the first lengths[n] columns of some rows from their slots [n,S] of the pool.

        Columns behind a shorter row's get what its other slots hold: numbers, which nobody reads.
        """
        count = int(lengths.max(initial=0))
        places = slots[:, :count]
        for table, stored in zip(self.all, pool.layers(), strict=True):
            table[rows, :count] = stored.take(places, axis=0)

    def store(self, rows: Integers, columns: Integers, pool: ArrayPool, slots: Integers) -> None:
        """Write column columns[n] of row rows[n] into slot slots[n] of the pool."""
        copy_columns(self.all, rows, columns, pool.layers(), slots)

    def clear(self, rows: Integers, columns: Integers) -> None:
        """Put zeros into one column of each of some rows: even what is masked must be numbers."""
        for table in self.all:
            table[rows, columns] = 0.0

    def lay_out(self, *, rows: int, columns: int) -> None:
        """Lay the rows out anew with as many of their columns as there are; behind them stand any numbers.

        One table after the other moves into the memory that the one before it has left: pages that were never used
        cost more than what is copied into them.  Room for as much again costs nothing until it is used.
        """
        before, kept = self.all, min(columns, self.columns)
        if len(self._spare) < rows * columns:
            *memory, spare = (aligned_zeros(2 * rows * columns, self.width) for _ in range(len(before) + 1))
        else:
            memory, spare = [self._spare, *self._memory[:-1]], self._memory[-1]
        self.rows, self.columns, self._memory, self._spare = rows, columns, memory, spare
        self.all = [self._shaped(one) for one in memory]
        for table, laid_out in zip(before, self.all, strict=True):
            laid_out[: len(table), :kept] = table[:, :kept]

    def _shaped(self, memory: Floats) -> Floats:
        return memory[: self.rows * self.columns].reshape(self.rows, self.columns, self.width)


def copy_columns(
    tables: Sequence[Floats], rows: Integers, columns: Integers, stored: Sequence[Floats], slots: Integers
) -> None:
    """Copy column columns[n] of row rows[n] of each table [rows,columns,width] into slot slots[n] of a stored one."""
    for table, target in zip(tables, stored, strict=True):
        target[slots] = table.reshape(-1, table.shape[2]).take(rows * table.shape[1] + columns, axis=0)


class NewColumns:
    """Keys or values [layers,B,T,kv width] that a step put behind its rows' context, where they stand.

    They are there until the next step over the same tables; `numpy` copies them out.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, side: Sequence[Floats], starts: Integers, *, count: int = 1) -> None:
        self.shape = (len(side), len(starts), count, side[0].shape[2])
        self._tables: Sequence[Floats] | None = side
        self._starts = starts

    def put(self, rows: Integers, columns: Integers, stored: Sequence[Floats], slots: Integers) -> None:
        """Copy token (rows[n], columns[n]) into slot slots[n] of each layer's stored table [slots,kv width]."""
        copy_columns(self._side, rows, self._starts[rows] + columns, stored, slots)

    def numpy(self) -> Floats:
        """Copy them out."""
        rows, columns = np.arange(len(self._starts))[:, None], self._starts[:, None] + np.arange(self.shape[2])
        return np.stack([table[rows, columns] for table in self._side])

    @property
    def _side(self) -> Sequence[Floats]:
        """The tables; InputRefused when the next step over them has begun."""
        if self._tables is None:
            raise InputRefused(
                "the keys and values of this step stand no more where it put them",
                fix="write them into the pool before the next step",
                evidence={"guard": "one step at a time over a pool"},
            )
        return self._tables

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.numpy().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any) -> Floats:
        return self.numpy()[key]

    def end(self) -> None:
        """Say that the next step begins."""
        self._tables = None


class _Pending(NamedTuple):
    """The last step: each of its rows may keep its new column, until the next step begins."""

    starts: Integers
    new_k: NewColumns
    new_v: NewColumns


class ResidentRows:
    """The rows of decode calls over one pool: what stands in each, and where in the pool it belongs."""

    def __init__(self, config: ModelConfig, pool: ArrayPool) -> None:
        self._pool = pool
        self.watched = True
        """Whether every write into the pool is told here; if not, nothing is kept from step to step."""
        self._states = np.zeros(pool.num_slots, dtype=np.uint8)
        self._unstored = False
        self._pending: _Pending | None = None
        self._all_kept = False
        """Whether every row of the last step kept its new column."""
        self._call = (b"", b"")
        """Slots and context lengths of the last call."""
        self._own = np.zeros((0, 0), dtype=np.int64)
        """The same slots, [B,S]."""
        self._foreseen: bytes | None = None
        """Context lengths with which a call of the same slots finds every row in place."""
        self.tables = Tables(config, rows=0, columns=0)
        self._slots = np.zeros((0, 0), dtype=np.int64)
        self._filled = self._stored = np.zeros(0, dtype=np.int64)
        self._places = np.arange(0)

    def prepare(self, slots: Integers, lengths: Integers, *, columns: int) -> Tables:
        """Bring the tables to where every row holds its context.

        slots [B,S], lengths [B]: as `Executor.step` has them; columns: of a table, more than any length.
        """
        self._abandon()
        foreseen, self._foreseen = self._foreseen, None
        before, self._call = self._call[0], (slots.tobytes(), lengths.tobytes())
        batch, width = len(lengths), min(slots.shape[1], columns)
        if columns != self.tables.columns or batch > self.tables.rows:
            self._lay_out(rows=max(batch, self.tables.rows), columns=columns)
        elif foreseen == self._call[1] and before == self._call[0]:
            return self.tables
        self._own = np.frombuffer(self._call[0], dtype=np.int64).reshape(slots.shape)
        stale = np.arange(batch)
        if self.watched:
            alike = self._slots[:batch, :width] == slots[:, :width]
            alike |= self._places[:width] >= lengths[:, None]
            stale = np.flatnonzero((self._filled[:batch] < lengths) | ~alike.all(axis=1))
        if len(stale) or (self._filled[:batch] > lengths).any():
            self.store()
        if len(stale):
            self.tables.fill(stale, self._pool, slots[stale], lengths=lengths[stale])
        for row in stale.tolist():
            own = slots[row, : lengths[row]]
            self._slots[row, : len(own)] = own
            self._states[own] = HELD
        self._filled[:batch] = lengths
        self._stored[:batch] = np.minimum(self._stored[:batch], lengths)
        self._stored[stale] = lengths[stale]
        return self.tables

    def begin(self, starts: Integers) -> tuple[NewColumns, NewColumns]:
        """Note that a step is about to put a column behind the context of each row, which the result stands for."""
        starts = starts.copy()
        new_k, new_v = NewColumns(self.tables.k, starts), NewColumns(self.tables.v, starts)
        self._pending, self._all_kept = _Pending(starts, new_k, new_v), False
        return new_k, new_v

    def keep(self, slot_ids: Integers, new_k: Any, new_v: Any, rows: Integers) -> bool:
        """Let rows of the last step keep their new columns as the content of slots; False where it is not theirs."""
        pending = self._pending
        if pending is None or new_k is not pending.new_k or new_v is not pending.new_v or not self.watched:
            return False
        self.overwritten(slot_ids)
        places = pending.starts[rows]
        if not (self._filled[rows] == places).all():  # this very write changed the context of one of them
            return False
        self._slots[rows, places] = slot_ids
        self._filled[rows] = places + 1
        self._states[slot_ids] = UNSTORED
        self._unstored = True
        longer = (pending.starts + 1).tobytes()
        self._all_kept = self._filled[: len(pending.starts)].tobytes() == longer
        if self._all_kept and len(rows) == len(pending.starts) and self._owns(rows, places, slot_ids):
            self._foreseen = longer
        return True

    def _owns(self, rows: Integers, places: Integers, slot_ids: Integers) -> bool:
        """Tell whether these are the call's own slots, row by row: then the next call is known, if it has the same."""
        try:
            return self._own[rows, places].tobytes() == slot_ids.tobytes()
        except IndexError:  # no slot was given for the new token
            return False

    def overwritten(self, slot_ids: Integers) -> None:
        """Follow a write into slots: rows that hold one of them lose it, and what is behind it."""
        self._foreseen = None
        if not self._states[slot_ids].any():
            return
        self.store()
        lost = np.isin(self._slots, slot_ids) & (self._places < self._filled[:, None])
        hit = lost.any(axis=1)
        self._filled[hit] = lost.argmax(axis=1)[hit]
        self._states[:] = UNHELD
        self._states[self._slots[self._places < self._filled[:, None]]] = HELD

    def settle(self, slot_ids: Integers) -> None:
        """See to it that the pool itself holds these slots' content."""
        if self._unstored and (self._states[slot_ids] == UNSTORED).any():
            self.store()

    def store(self) -> None:
        """Copy into the pool whatever only the rows have."""
        if not self._unstored:
            return
        unstored = (self._places >= self._stored[:, None]) & (self._places < self._filled[:, None])
        rows, columns = np.nonzero(unstored)
        ids = self._slots[rows, columns]
        self.tables.store(rows, columns, self._pool, ids)
        self._stored = self._filled.copy()
        self._states[ids] = HELD
        self._unstored = False

    def _lay_out(self, *, rows: int, columns: int) -> None:
        """Give the tables another shape, with what fits of their columns."""
        before, kept = self.tables.rows, min(columns, self.tables.columns)
        if kept < self.tables.columns:
            self.store()
        self.tables.lay_out(rows=rows, columns=columns)
        slots = np.zeros((rows, columns), dtype=np.int64)
        slots[:before, :kept] = self._slots[:, :kept]
        more = (0, rows - before)
        self._slots, self._places = slots, np.arange(columns)
        self._filled, self._stored = (np.pad(np.minimum(one, kept), more) for one in (self._filled, self._stored))

    def _abandon(self) -> None:
        """Clear the columns that the last step put and nobody kept: they may be no numbers."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.new_k.end()
        pending.new_v.end()
        if self._all_kept:
            return
        unkept = np.flatnonzero(self._filled[: len(pending.starts)] <= pending.starts)
        if len(unkept):
            self.tables.clear(unkept, pending.starts[unkept])

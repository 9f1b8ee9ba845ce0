"""Which row's context stands where between two steps?  Tables that a step fills, kept true to the pool.

A decode step needs each row's whole context again, one position longer.  The program puts the new keys and values into
the row's own columns, so the next step finds everything in place, and nothing is copied while a sequence keeps its row.
What is kept of a step is copied into the pool when somebody wants it from there, many columns at once.  A row is read
from the pool again whenever its slots, or what was written into them since, are not those that its columns came from:
what a step computes never depends on what stood in the tables before.
"""

from __future__ import annotations

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
    """Keys and values of some rows, [layers,rows,kv_heads,columns,head_dim] each, at first zero.

    The leading rows of a layer are one piece of memory.
    """

    def __init__(self, config: ModelConfig, *, rows: int, columns: int) -> None:
        shape = (config.num_layers, rows, config.num_kv_heads, columns, config.head_dim)
        flat = (int(np.prod(shape[:-1])), config.head_dim)
        self.k, self.v = (aligned_zeros(*flat).reshape(shape) for _ in range(2))
        self.rows, self.columns = rows, columns

    def layers(self, rows: int) -> list[Floats]:
        """View the leading rows as the step takes them: keys, then values of layer 0, of layer 1, ..."""
        return [side[layer, :rows] for layer in range(len(self.k)) for side in (self.k, self.v)]

    def fill(self, rows: Integers, pool: ArrayPool, slots: Integers, *, lengths: Integers) -> None:
        """Read the first lengths[n] columns of some rows from their slots [n,S] of the pool.

        Columns behind a shorter row's get what its other slots hold: numbers, which nobody reads.
        """
        layers, _, heads, _, width = self.k.shape
        count = int(lengths.max(initial=0))
        places = slots[:, None, :count] * heads + np.arange(heads)[:, None]
        for side, table in ((self.k, pool.k), (self.v, pool.v)):
            # A layer at a time, by head: twice as fast as one index over all layers.
            for filled, layer in zip(side, table.reshape(layers, -1, width), strict=True):
                filled[rows, :, :count] = layer.take(places, axis=0)

    def clear(self, rows: Integers, columns: Integers) -> None:
        """Put zeros into one column of each of some rows: even what is masked must be numbers."""
        self.k[:, rows, :, columns] = 0.0
        self.v[:, rows, :, columns] = 0.0

    def copy_from(self, other: Tables, columns: int) -> None:
        """Take over the first columns of another's rows, which are no more than these."""
        self.k[:, : other.rows, :, :columns] = other.k[..., :columns, :]
        self.v[:, : other.rows, :, :columns] = other.v[..., :columns, :]

    def new_columns(self, starts: Integers, count: int) -> tuple[Floats, Floats]:
        """Copy out what a step put behind the context of its rows, [layers,B,count,kv width] each."""
        return behind(self.k, starts, count), behind(self.v, starts, count)


def behind(side: Floats, starts: Integers, count: int) -> Floats:
    """Copy out `count` columns of each row from its start on, [layers,B,count,kv width]."""
    rows, columns = np.arange(len(starts))[:, None], starts[:, None] + np.arange(count)
    # Indices around a slice come first in the result: [B,count,layers,heads,head_dim].
    found = side[:, rows, :, columns].transpose(2, 0, 1, 3, 4)
    return found.reshape(len(side), len(starts), count, -1)


class NewColumns:
    """Keys or values [layers,B,1,kv width] that a decode step put behind its rows' context, where they stand.

    They are there until the next step over the same tables; `numpy` copies them out.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, side: Floats, starts: Integers) -> None:
        layers, _, heads, _, width = side.shape
        self.shape = (layers, len(starts), 1, heads * width)
        self._side: Floats | None = side
        self._starts = starts

    def numpy(self) -> Floats:
        """Copy them out; InputRefused when the next step has begun."""
        if self._side is None:
            raise InputRefused(
                "the keys and values of this step stand no more where it put them",
                fix="write them into the pool before the next step",
                evidence={"guard": "one step at a time over a pool"},
            )
        return behind(self._side, self._starts, 1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.numpy().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any) -> Floats:
        return self.numpy()[key]

    def end(self) -> None:
        """Say that the next step begins."""
        self._side = None


class _Pending(NamedTuple):
    """The last step: each of its rows may keep its new column, until the next step begins."""

    starts: Integers
    slots: bytes
    """The call's slots."""
    new_k: NewColumns
    new_v: NewColumns


class ResidentRows:
    """The rows of decode calls over one pool: what stands in each, and where in the pool it belongs."""

    def __init__(self, config: ModelConfig, pool: ArrayPool) -> None:
        self._config, self._pool = config, pool
        self.watched = True
        """Whether every write into the pool is told here; if not, nothing is kept from step to step."""
        self._states = np.zeros(pool.num_slots, dtype=np.uint8)
        self._unstored = False
        self._pending: _Pending | None = None
        self._foreseen: tuple[bytes, bytes] | None = None
        """Slots and lengths of a call that finds every row in place."""
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
        if columns != self.tables.columns or len(lengths) > self.tables.rows:
            self._allot(rows=max(len(lengths), self.tables.rows), columns=columns)
        elif foreseen == (slots.tobytes(), lengths.tobytes()):
            return self.tables
        batch, width = len(lengths), min(slots.shape[1], columns)
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

    def begin(self, slots: Integers, starts: Integers) -> tuple[NewColumns, NewColumns]:
        """Note that a step is about to put a column behind the context of each row, which the result stands for."""
        starts = starts.copy()
        new_k, new_v = (NewColumns(side, starts) for side in (self.tables.k, self.tables.v))
        self._pending = _Pending(starts, slots.tobytes(), new_k, new_v)
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
        if len(rows) == len(pending.starts):
            self._foresee(pending, slot_ids, rows, places)
        return True

    def _foresee(self, pending: _Pending, slot_ids: Integers, rows: Integers, places: Integers) -> None:
        """Know the next call by its bytes, where it has the same slots: all rows one longer."""
        slots = np.frombuffer(pending.slots, dtype=np.int64).reshape(len(pending.starts), -1)
        if places.max() < slots.shape[1] and (slots[rows, places] == slot_ids).all():
            self._foreseen = (pending.slots, (pending.starts + 1).tobytes())

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
        layers, _, heads, _, width = self.tables.k.shape
        for side, table in ((self.tables.k, self._pool.k), (self.tables.v, self._pool.v)):
            table.reshape(layers, -1, heads, width)[:, ids] = side[:, rows, :, columns].swapaxes(0, 1)
        self._stored = self._filled.copy()
        self._states[ids] = HELD
        self._unstored = False

    def _allot(self, *, rows: int, columns: int) -> None:
        """Make other tables, with what fits of the old ones."""
        old, kept = self.tables, min(columns, self.tables.columns)
        if kept < old.columns:
            self.store()
        self.tables = Tables(self._config, rows=rows, columns=columns)
        self.tables.copy_from(old, kept)
        slots = np.zeros((rows, columns), dtype=np.int64)
        slots[: old.rows, :kept] = self._slots[:, :kept]
        more = (0, rows - old.rows)
        self._slots, self._places = slots, np.arange(columns)
        self._filled, self._stored = (np.pad(np.minimum(one, kept), more) for one in (self._filled, self._stored))

    def _abandon(self) -> None:
        """Clear the columns that the last step put and nobody kept: they may be no numbers."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.new_k.end()
        pending.new_v.end()
        unkept = np.flatnonzero(self._filled[: len(pending.starts)] <= pending.starts)
        if len(unkept):
            self.tables.clear(unkept, pending.starts[unkept])

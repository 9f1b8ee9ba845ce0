"""Which row's context stands where between two steps?  Tables that a step fills, kept true to the pool.

A decode step needs each row's whole context again, one position longer.  The program puts the new keys and values into
the row's own columns, so the next step finds everything in place, and nothing is copied while a sequence keeps its row.
The pool stays the truth: a row is read from it again whenever its slots, or what was written into them since, are not
those that its columns came from.  So what a step computes never depends on what stood in the tables before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.backends.contract import Integers
from runtime.backends.pool import ArrayPool, aligned_zeros
from runtime.backends.protocol import Floats
from runtime.models.config import ModelConfig


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

    def fill(self, row: int, pool: ArrayPool, slots: Integers) -> None:
        """Read a row's first columns from the slots [n] of the pool."""
        layers, _, heads, _, width = self.k.shape
        count = len(slots)
        for side, table in ((self.k, pool.k), (self.v, pool.v)):
            found = table.reshape(layers, -1, heads, width)[:, slots]
            side[:, row, :, :count] = found.transpose(0, 2, 1, 3)

    def clear(self, rows: Integers, columns: Integers) -> None:
        """Put zeros into one column of each of some rows: even what is masked must be numbers."""
        self.k[:, rows, :, columns] = 0.0
        self.v[:, rows, :, columns] = 0.0

    def new_columns(self, starts: Integers, count: int) -> tuple[Floats, Floats]:
        """Copy out what a step put behind the context of its rows, [layers,B,count,kv width] each."""
        batch = len(starts)
        rows, columns = np.arange(batch)[:, None], starts[:, None] + np.arange(count)
        layers = len(self.k)
        # Indices around a slice come first in the result: [B,count,layers,heads,head_dim].
        k, v = (side[:, rows, :, columns].transpose(2, 0, 1, 3, 4) for side in (self.k, self.v))
        return k.reshape(layers, batch, count, -1), v.reshape(layers, batch, count, -1)


class _Pending(NamedTuple):
    """A step whose new columns stand in the tables and not in the pool yet."""

    starts: Integers
    new_k: Any


class ResidentRows:
    """The rows of decode calls over one pool: what stands in each, and where in the pool it is."""

    def __init__(self, config: ModelConfig, pool: ArrayPool) -> None:
        self._config, self._pool = config, pool
        self.watched = True
        """Whether every write into the pool is told here; if not, nothing is kept from step to step."""
        self._resident = np.zeros(pool.num_slots, dtype=np.bool_)
        """Slots that a row may hold; some are marked that no row holds any more."""
        self._pending: _Pending | None = None
        self._allot(rows=0, columns=0)

    def _allot(self, *, rows: int, columns: int) -> None:
        self.tables = Tables(self._config, rows=rows, columns=columns)
        self._slots = np.zeros((rows, columns), dtype=np.int64)
        self._filled = np.zeros(rows, dtype=np.int64)
        self._places = np.arange(columns)
        self._resident[:] = False
        self._pending = None

    def prepare(self, slots: Integers, lengths: Integers, *, columns: int) -> Tables:
        """Bring the tables to where every row holds its context.

        slots [B,S], lengths [B]: as `Executor.step` has them; columns: of a table, more than any length.
        """
        batch = len(lengths)
        if columns != self.tables.columns or batch > self.tables.rows:
            self._allot(rows=max(batch, self.tables.rows), columns=columns)
        self._abandon()
        width = min(slots.shape[1], columns)
        if self.watched:
            alike = self._slots[:batch, :width] == slots[:, :width]
            alike |= self._places[:width] >= lengths[:, None]
            stale = np.flatnonzero((self._filled[:batch] < lengths) | ~alike.all(axis=1))
        else:
            stale = np.arange(batch)
        for row in stale.tolist():
            own = slots[row, : lengths[row]]
            self.tables.fill(row, self._pool, own)
            self._slots[row, : len(own)] = own
            self._resident[own] = True
        self._filled[:batch] = lengths
        return self.tables

    def ran(self, starts: Integers, new_k: Any) -> None:
        """Note that a step has put a column behind the context of each row; `new_k` stands for it in `wrote`."""
        self._pending = _Pending(starts.copy(), _owner(new_k))

    def wrote(self, slot_ids: Integers, new_k: Any, rows: Integers) -> None:
        """Follow a write into the pool: rows that hold one of the slots lose it, rows of the last step gain theirs."""
        if self._resident[slot_ids].any():
            self._forget(slot_ids)
        pending = self._pending
        if pending is None or _owner(new_k) is not pending.new_k:
            return
        places = pending.starts[rows]
        self._slots[rows, places] = slot_ids
        # A row whose context this very write changed has lost it, and gains nothing by a column behind it.
        self._filled[rows] += self._filled[rows] == places
        self._resident[slot_ids] = True
        self._abandon()

    def _abandon(self) -> None:
        """Clear the columns that the last step put and nobody kept: they may be no numbers."""
        if self._pending is None:
            return
        starts, self._pending = self._pending.starts, None
        unkept = np.flatnonzero(self._filled[: len(starts)] <= starts)
        if len(unkept):
            self.tables.clear(unkept, starts[unkept])

    def _forget(self, slot_ids: Integers) -> None:
        held = self._places < self._filled[:, None]
        lost = held & np.isin(self._slots, slot_ids)
        hit = lost.any(axis=1)
        self._filled[hit] = lost.argmax(axis=1)[hit]
        self._resident[:] = False
        self._resident[self._slots[self._places < self._filled[:, None]]] = True


def _owner(array: NDArray[Any]) -> Any:
    """The array whose memory a view shows."""
    return array if array.base is None else array.base

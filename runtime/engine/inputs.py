"""What does a call feed to the executor?  Padded int64 arrays, built from plans in buffers that are used again.

Padding and stand-ins are alike: token 0 at position 0 with no cached context, pointing at the scratch block.  Padding
tokens of a real row stand after its real ones, where causal attention keeps them from mattering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.engine.plan import Call

Integers = NDArray[np.int64]


class CallInputs(NamedTuple):
    """The arguments of one functional step."""

    tokens: Integers
    """[batch, tokens]"""
    positions: Integers
    """[batch, tokens]"""
    slots: Integers
    """[batch, context]"""
    context_lengths: Integers
    """[batch]"""


class Writes(NamedTuple):
    """Where a call's new keys and values go: token (rows[n], columns[n]) into slot_ids[n]."""

    slot_ids: Integers
    rows: Integers
    columns: Integers


class InputBuffers:
    """Input arrays by padded shape; shapes are few, because a pin declares them."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[int, int], tuple[Integers, Integers]] = {}
        self._slots: dict[tuple[int, int], tuple[Integers, Integers]] = {}

    def take(self, batch: int, tokens: int, context: int, *, rows: int = 0) -> CallInputs:
        """Return the buffers of a shape with all rows from `rows` on set to padding; earlier rows hold old values."""
        pair = self._tokens.get((batch, tokens))
        if pair is None:
            pair = (np.zeros((batch, tokens), dtype=np.int64), np.zeros((batch, tokens), dtype=np.int64))
            self._tokens[batch, tokens] = pair
        places = self._slots.get((batch, context))
        if places is None:
            places = (np.zeros((batch, context), dtype=np.int64), np.zeros(batch, dtype=np.int64))
            self._slots[batch, context] = places
        if rows < batch:
            for array in (*pair, *places):
                array[rows:] = 0
        return CallInputs(*pair, *places)


def place_row(
    inputs: CallInputs, row: int, *, tokens: Sequence[int], start: int, slots: Integers, last_position: int
) -> None:
    """Write one row: `tokens` from position `start` on, after `start` cached positions held in `slots` [>= start]."""
    count, width = len(tokens), inputs.tokens.shape[1]
    inputs.tokens[row, :count] = tokens
    inputs.tokens[row, count:] = 0
    inputs.positions[row] = np.minimum(np.arange(start, start + width), last_position)
    inputs.slots[row, :start] = slots[:start]
    inputs.slots[row, start:] = 0
    inputs.context_lengths[row] = start


class SlotTables:
    """The block tables of running sequences as one array of slot ids, so that a batch gathers its rows at once."""

    def __init__(self, lanes: int, *, longest: int, block_size: int, context_multiple: int) -> None:
        width = -(-longest // context_multiple) * context_multiple
        self._table = np.zeros((lanes, width), dtype=np.int64)
        self._within = np.arange(block_size, dtype=np.int64)
        self._free = list(range(lanes - 1, -1, -1))
        self._lane_of: dict[int, int] = {}
        self._filled: dict[int, int] = {}
        self._decoding: Sequence[int] = ()
        """Sequences of the last decode call, while their tables stay what they are; mostly those of the next one."""
        self._lanes = self._rows = self._columns = np.zeros(0, dtype=np.int64)

    def admit(self, index: int, blocks: Sequence[int]) -> None:
        """Open a table that begins with `blocks`."""
        self._decoding = ()
        lane = self._free.pop()
        self._lane_of[index] = lane
        self._filled[index] = 0
        self._table[lane] = 0
        self.extend(index, blocks)

    def extend(self, index: int, blocks: Sequence[int]) -> None:
        """Append blocks to a table."""
        lane, filled, size = self._lane_of[index], self._filled[index], len(self._within)
        for block in blocks:
            self._table[lane, filled : filled + size] = self._within + block * size
            filled += size
        self._filled[index] = filled

    def drop(self, index: int) -> None:
        """Close a table; one that is not open is left alone."""
        lane = self._lane_of.pop(index, None)
        if lane is not None:
            self._decoding = ()
            self._free.append(lane)
            del self._filled[index]

    def fill_decode(self, inputs: CallInputs, *, sequences: Sequence[int], starts: Sequence[int]) -> Writes:
        """Write slots, positions and context lengths of one-token rows; return where their keys and values go."""
        count = len(sequences)
        if sequences != self._decoding:
            self._lanes = np.array([self._lane_of[index] for index in sequences], dtype=np.int64)
            self._rows, self._columns = np.arange(count), np.zeros(count, dtype=np.int64)
            self._decoding = sequences
        lanes = self._lanes
        places = np.array(starts, dtype=np.int64)
        inputs.positions[:count, 0] = places
        inputs.context_lengths[:count] = places
        inputs.slots[:count] = self._table[:, : inputs.slots.shape[1]][lanes]
        return Writes(self._table[lanes, places], self._rows, self._columns)

    def slots_of(self, index: int) -> Integers:
        """The slots of a sequence's positions; zero where it has no block yet."""
        return self._table[self._lane_of[index]]


def last_tokens(call: Call) -> Integers:
    """Return the last real token of each row of a padded chunk call, counted in the row; the first one of padding."""
    last = np.zeros(call.batch, dtype=np.int64)
    last[: len(call.counts)] = call.counts
    return np.maximum(last - 1, 0)


def join_writes(parts: Sequence[tuple[int, Integers]]) -> Writes:
    """Return the writes of rows given as (row, slot ids of its real tokens)."""
    return Writes(
        np.concatenate([slots for _, slots in parts]),
        np.concatenate([np.full(len(slots), row, dtype=np.int64) for row, slots in parts]),
        np.concatenate([np.arange(len(slots), dtype=np.int64) for _, slots in parts]),
    )

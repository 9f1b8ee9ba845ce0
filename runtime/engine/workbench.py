"""How does a replay run one row of a recorded call?  In the recorded padded shape, with stand-ins for all other rows.

The workbench gives out the blocks of a pool as replayed lives need them; which block holds what, and how many there
are, has no influence on bits.  So a slice that needs more at once than the live engine had, because it computes blocks
again that were evicted meanwhile, gets a larger pool, unless the package was compiled for one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from runtime.backends.errors import CapacityExhausted
from runtime.backends.protocol import Executor, Floats
from runtime.engine.errors import SequenceRefused
from runtime.engine.inputs import CallInputs, InputBuffers, Integers, place_row
from runtime.engine.plan import DECODE, PREFILL, Call
from runtime.engine.settings import Settings, pool_slots


class StandIns(Protocol):
    """What stands where another request's content stood; the default is nothing (token 0, no context)."""

    def fill(self, inputs: CallInputs, row: int) -> None:
        """Fill all rows but `row`."""
        ...

    def tail(self, count: int) -> list[int]:
        """Return tokens for the end of a chunk that was another request's own."""
        ...


class Table:
    """The blocks of one replayed life, in order."""

    __slots__ = ("blocks", "length", "slots")

    def __init__(self, width: int) -> None:
        self.blocks: list[int] = []
        self.length = 0
        """Positions whose keys and values are there."""
        self.slots: Integers = np.zeros(width, dtype=np.int64)


class Workbench:
    """Runs single rows over one pool."""

    def __init__(self, executor: Executor, settings: Settings, *, stand_ins: StandIns | None = None) -> None:
        self.settings = settings
        self._executor = executor
        self._stand_ins = stand_ins
        self._pool = executor.new_pool(pool_slots(settings))
        self._blocks = settings.num_blocks
        self._buffers = InputBuffers()
        self._last_position = executor.contract.max_positions - 1
        self._width = settings.pad_context(settings.longest_sequence)
        self._within = np.arange(settings.block_size, dtype=np.int64)
        self.clear()

    def hold(self, blocks: int) -> None:
        """Make sure that `blocks` blocks can be in use at once; forgets all tables.

        A package that was compiled for pools of one size keeps the pool it has, which may still do: `blocks` may be
        an upper bound.
        """
        if blocks > self._blocks:
            try:
                self._pool = self._executor.new_pool((blocks + 1) * self.settings.block_size)
            except CapacityExhausted:
                return
            self._blocks = blocks
            self.clear()

    def new_table(self) -> Table:
        """Open an empty table."""
        return Table(self._width)

    def share(self, table: Table, block: int) -> None:
        """Append a block that another table filled."""
        self._readers[block] += 1
        self._append(table, block)
        table.length = len(table.blocks) * self.settings.block_size

    def release(self, table: Table) -> None:
        """Give up a table; its blocks are free when no other table reads them."""
        for block in table.blocks:
            self._readers[block] -= 1
            if not self._readers[block]:
                self._free.append(block)
        table.blocks = []
        table.length = 0

    def clear(self) -> None:
        """Forget all tables."""
        self._readers = [0] * (self._blocks + 1)
        self._free = list(range(self._blocks, 0, -1))

    def run(
        self, call: Call, position: int, table: Table, *, tokens: Sequence[int], start: int, keep: int | None = None
    ) -> Floats:
        """Run the row at `position` of a call with `tokens` from `start` on; return its last logits, [1, vocabulary].

        keep: how many of the tokens are to be cached, all by default; the rest is replaced by stand-ins.
        """
        count = len(tokens)
        kept = count if keep is None else min(keep, count)
        fed = list(tokens[:kept])
        if kept < count:
            fed += [0] * (count - kept) if self._stand_ins is None else self._stand_ins.tail(count - kept)
        self._reserve(table, start + kept)
        inputs = self._buffers.take(call.batch, call.tokens, call.context)
        if self._stand_ins is not None:
            self._stand_ins.fill(inputs, position)
        place_row(inputs, position, tokens=fed, start=start, slots=table.slots, last_position=self._last_position)
        last = None
        if call.tokens > 1:  # of all rows, as the call that is run again: how many are asked for reaches the bits
            last = np.zeros(call.batch, dtype=np.int64)
            last[position] = count - 1
        output = self._executor.step(*inputs, self._pool, last=last)
        self._pool.write(
            table.slots[start : start + kept],
            output.new_k,
            output.new_v,
            rows=np.full(kept, position, dtype=np.int64),
            columns=np.arange(kept, dtype=np.int64),
        )
        table.length = start + kept
        return output.logits[[position], 0]

    def call_alone(self, start: int, remaining: int) -> Call:
        """Return the call that an idle engine would make next for a sequence with `remaining` tokens to compute."""
        settings = self.settings
        count = min(remaining, settings.longest_chunk)
        tokens = settings.pad_tokens(count)
        return Call(
            graph=DECODE if tokens == 1 else PREFILL,
            batch=settings.pad_batch(1),
            tokens=tokens,
            context=settings.pad_context(start),
            sequences=[0],
            starts=[start],
            counts=[] if tokens == 1 else [count],
            silent=[] if count == remaining else [0],
        )

    def _reserve(self, table: Table, length: int) -> None:
        while len(table.blocks) * self.settings.block_size < length:
            if not self._free:
                raise SequenceRefused(
                    f"the slice needs more at once than the {self._blocks} cache blocks that the package was made for",
                    reason="slice_too_large",
                    fix="prepare the package with a larger pool, or replay with --mode alone",
                )
            block = self._free.pop()
            self._readers[block] = 1
            self._append(table, block)

    def _append(self, table: Table, block: int) -> None:
        size = len(self._within)
        first = len(table.blocks) * size
        table.slots[first : first + size] = self._within + block * size
        table.blocks.append(block)

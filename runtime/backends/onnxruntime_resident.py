"""How does the step over resident context run in ONNX Runtime?  Tables bound once, as input and as output."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from runtime.backends.contract import Integers
from runtime.backends.executor import StepInputs
from runtime.backends.onnxruntime import OrtExecutor
from runtime.backends.pool import ArrayPool, check_selection, foreign_pool
from runtime.backends.protocol import Floats, KVPool, StepOutput
from runtime.backends.resident import NewColumns, ResidentRows, Tables
from runtime.models.config import ModelConfig


class BoundStep:
    """The leading rows of some tables, and the small inputs beside them, bound to a session.

    wanted int64 [B,W,1]: the tokens of each row whose logits are computed.
    """

    def __init__(self, session: onnxruntime.InferenceSession, *, count: int, wanted: Integers, vocab_size: int) -> None:
        self._session = session
        batch = len(wanted)
        self._shape = (batch, wanted.shape[1], vocab_size)
        self._tokens, self._positions = (np.zeros((batch, count), dtype=np.int64) for _ in range(2))
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._tables: list[Floats] = []
        self._binding: Any = session.io_binding()
        small = {"token_ids": self._tokens, "positions": self._positions, "context_lengths": self._lengths}
        for name, array in (*small.items(), ("wanted", wanted)):
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        self._bind_logits()

    def _bind_logits(self) -> None:
        self._logits = np.empty(self._shape, dtype=np.float32)
        self._binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(self._logits))
        self._own_references = sys.getrefcount(self._logits)

    def bind(self, tables: Tables) -> None:
        """Read and fill these tables from now on."""
        if self._tables is tables.all:
            return
        self._tables = tables.all
        for number, table in enumerate(tables.all):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(table[: self._shape[0]])
            self._binding.bind_ortvalue_input(f"tables_{number}", value)
            self._binding.bind_ortvalue_output(f"filled_{number}", value)

    def run(self, tokens: Integers, positions: Integers, lengths: Integers) -> Floats:
        """Run the step once; the tables are filled in place.  Returns logits [B,W,vocab]."""
        self._tokens[...], self._positions[...], self._lengths[...] = tokens, positions, lengths
        if sys.getrefcount(self._logits) > self._own_references:  # somebody holds the last answer, or a view of it
            self._bind_logits()
        self._session.run_with_iobinding(self._binding)
        return self._logits


class ResidentOrtPool(ArrayPool):
    """The two flat tables, and beside them the context of the rows that decode."""

    def __init__(self, config: ModelConfig, num_slots: int) -> None:
        super().__init__(num_layers=config.num_layers, num_slots=num_slots, width=config.kv_width)
        self.turn = threading.RLock()
        """Held for a step, a write and a read: rows are brought in place for one at a time."""
        self.rows = ResidentRows(config, self)
        self._vocab_size = config.vocab_size
        self._bound: dict[int, BoundStep] = {}

    def adopt(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """See `ArrayPool.adopt`: who owns the tables writes them unseen, so no row is kept from step to step."""
        super().adopt(k, v)
        self.rows.watched = False

    def write(self, slot_ids: Integers, new_k: Any, new_v: Any, *, rows: Integers, columns: Integers) -> None:
        """See `KVPool.write`; what stands in a row's place already is left there until somebody reads it."""
        check_selection(slot_ids, rows, columns, shape=new_k.shape, slots=self.num_slots)
        with self.turn:
            if not self.rows.keep(slot_ids, new_k, new_v, rows):
                self.rows.overwritten(slot_ids)
                if isinstance(new_k, NewColumns) and isinstance(new_v, NewColumns):
                    stored = self.layers()
                    new_k.put(rows, columns, stored[::2], slot_ids)
                    new_v.put(rows, columns, stored[1::2], slot_ids)
                else:
                    super().write(slot_ids, new_k, new_v, rows=rows, columns=columns)

    def read(self, slot_ids: Integers) -> tuple[Floats, Floats]:
        """See `KVPool.read`."""
        with self.turn:
            self.rows.settle(slot_ids)
            return super().read(slot_ids)

    def bound(self, session: onnxruntime.InferenceSession, batch: int) -> BoundStep:
        """Give the binding of a decode call over the resident rows."""
        found = self._bound.get(batch)
        if found is None:
            wanted = np.zeros((batch, 1, 1), dtype=np.int64)
            found = self._bound[batch] = BoundStep(session, count=1, wanted=wanted, vocab_size=self._vocab_size)
        found.bind(self.rows.tables)
        return found


class ResidentOrtExecutor(OrtExecutor):
    """One inference session whose program fills the tables that it is handed."""

    def new_pool(self, num_slots: int) -> ResidentOrtPool:
        """Allocate a zeroed float32 pool."""
        return ResidentOrtPool(self.config, num_slots)

    def run(self, loaded: onnxruntime.InferenceSession, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Bring the rows' context in place, and run the session over it."""
        batch, count = inputs[0].shape
        return self._run_for(loaded, inputs, pool, np.tile(np.arange(count), (batch, 1)))

    def run_last(
        self, loaded: onnxruntime.InferenceSession, inputs: StepInputs, pool: KVPool, last: Integers
    ) -> StepOutput:
        """See `LoadedExecutor.run_last`; a row whose bits are to be its own is not left alone in the last layer."""
        alone = self.spec.batch_invariant and len(last) < self.least_rows
        wanted = np.stack([last] * (self.least_rows if alone else 1), axis=1)
        output = self._run_for(loaded, inputs, pool, wanted)
        return StepOutput(output.logits[:, :1], output.new_k, output.new_v)

    def _run_for(
        self, loaded: onnxruntime.InferenceSession, inputs: StepInputs, pool: KVPool, wanted: Integers
    ) -> StepOutput:
        """Run the session for the logits of some tokens of each row, wanted [B,W]."""
        if not isinstance(pool, ResidentOrtPool) or pool.k.shape[1] != self.config.kv_width:
            raise foreign_pool(pool)
        tokens, positions, slots, lengths = inputs
        count = tokens.shape[1]
        # The layout by position has the new tokens' columns in it already (`invariant.arrange`).
        columns = slots.shape[1] + (0 if self.spec.batch_invariant else count)
        with pool.turn:
            if count > 1:
                return self._run_chunks(loaded, inputs, pool, wanted, columns=columns)
            pool.rows.prepare(slots, lengths, columns=columns)
            new = pool.rows.begin(lengths)  # before it runs: what a failing step leaves is nobody's either
            return StepOutput(pool.bound(loaded, len(tokens)).run(tokens, positions, lengths), *new)

    def _run_chunks(
        self,
        loaded: onnxruntime.InferenceSession,
        inputs: StepInputs,
        pool: ResidentOrtPool,
        wanted: Integers,
        *,
        columns: int,
    ) -> StepOutput:
        """Run a call on tables of its own: chunks are long, and their rows seldom come again."""
        tokens, positions, slots, lengths = inputs
        batch, count = tokens.shape
        tables = Tables(self.config, rows=batch, columns=columns)
        if lengths.any():
            pool.rows.settle(slots.reshape(-1))
            tables.fill(np.arange(batch), pool, slots, lengths=lengths)
        step = BoundStep(loaded, count=count, wanted=wanted[..., None], vocab_size=self.config.vocab_size)
        step.bind(tables)
        logits = step.run(tokens, positions, lengths)
        return StepOutput(logits, *(NewColumns(side, lengths.copy(), count=count) for side in (tables.k, tables.v)))

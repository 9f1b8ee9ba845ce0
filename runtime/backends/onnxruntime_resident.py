"""How does the step over resident context run in ONNX Runtime?  Tables bound once, as input and as output."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from runtime.backends.contract import Integers
from runtime.backends.executor import StepInputs
from runtime.backends.onnxruntime import OrtExecutor
from runtime.backends.pool import ArrayPool, foreign_pool
from runtime.backends.protocol import Floats, KVPool, StepOutput
from runtime.backends.resident import ResidentRows, Tables
from runtime.models.config import ModelConfig


class BoundStep:
    """The leading rows of some tables, and the small inputs beside them, bound to a session."""

    def __init__(self, session: onnxruntime.InferenceSession, tables: Tables, *, batch: int, count: int) -> None:
        self._session = session
        self._tokens, self._positions = (np.zeros((batch, count), dtype=np.int64) for _ in range(2))
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._binding: Any = session.io_binding()
        for name in ("token_ids", "positions", "context_lengths"):
            array = {"token_ids": self._tokens, "positions": self._positions}.get(name, self._lengths)
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        self._binding.bind_output("logits")
        for number, table in enumerate(tables.layers(batch)):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(table)
            self._binding.bind_ortvalue_input(f"tables_{number}", value)
            self._binding.bind_ortvalue_output(f"filled_{number}", value)

    def run(self, tokens: Integers, positions: Integers, lengths: Integers) -> Floats:
        """Run the step once; the tables are filled in place.  Returns logits [B,T,vocab]."""
        self._tokens[...], self._positions[...], self._lengths[...] = tokens, positions, lengths
        self._binding.bind_output("logits")  # anew: the last answer belongs to whoever asked for it
        self._session.run_with_iobinding(self._binding)
        return self._binding.get_outputs()[0].numpy()


class ResidentOrtPool(ArrayPool):
    """The two flat tables, and beside them the context of the rows that decode."""

    def __init__(self, config: ModelConfig, num_slots: int) -> None:
        super().__init__(num_layers=config.num_layers, num_slots=num_slots, width=config.kv_width)
        self.turn = threading.Lock()
        """Held for a step: rows are brought in place for one at a time."""
        self.rows = ResidentRows(config, self)
        self._bound: dict[int, BoundStep] = {}
        self._bound_to: Tables | None = None

    def adopt(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """See `ArrayPool.adopt`: who owns the tables writes them unseen, so no row is kept from step to step."""
        super().adopt(k, v)
        self.rows.watched = False

    def write(self, slot_ids: Integers, new_k: Any, new_v: Any, *, rows: Integers, columns: Integers) -> None:
        """See `KVPool.write`."""
        super().write(slot_ids, new_k, new_v, rows=rows, columns=columns)
        self.rows.wrote(slot_ids, new_k, rows)

    def bound(self, session: onnxruntime.InferenceSession, batch: int) -> BoundStep:
        """Give the binding of a decode call over the resident rows."""
        if self._bound_to is not self.rows.tables:
            self._bound, self._bound_to = {}, self.rows.tables
        found = self._bound.get(batch)
        if found is None:
            found = self._bound[batch] = BoundStep(session, self.rows.tables, batch=batch, count=1)
        return found


class ResidentOrtExecutor(OrtExecutor):
    """One inference session whose program fills the tables that it is handed."""

    def new_pool(self, num_slots: int) -> Any:
        """Allocate a zeroed float32 pool."""
        return ResidentOrtPool(self.config, num_slots)

    def run(self, loaded: onnxruntime.InferenceSession, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Bring the rows' context in place, and run the session over it."""
        if not isinstance(pool, ResidentOrtPool) or pool.k.shape[1] != self.config.kv_width:
            raise foreign_pool(pool)
        tokens, positions, slots, lengths = inputs
        batch, count = tokens.shape
        # The layout by position has the new tokens' columns in it already (`invariant.arrange`).
        columns = slots.shape[1] + (0 if self.spec.batch_invariant else count)
        with pool.turn:
            if count > 1:
                tables = self._gather(slots, lengths, pool, columns=columns)
                logits = BoundStep(loaded, tables, batch=batch, count=count).run(tokens, positions, lengths)
                return StepOutput(logits, *tables.new_columns(lengths, count))
            tables = pool.rows.prepare(slots, lengths, columns=columns)
            logits = pool.bound(loaded, batch).run(tokens, positions, lengths)
            new_k, new_v = tables.new_columns(lengths, 1)
            pool.rows.ran(lengths, new_k)
            return StepOutput(logits, new_k, new_v)

    def _gather(self, slots: Integers, lengths: Integers, pool: ArrayPool, *, columns: int) -> Tables:
        """Lay out context for one call: chunks are long, and their rows seldom come again."""
        tables = Tables(self.config, rows=len(lengths), columns=columns)
        for row, length in enumerate(lengths.tolist()):
            if length:
                tables.fill(row, pool, slots[row, :length])
        return tables

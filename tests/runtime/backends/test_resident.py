"""What stands in the tables is what the pool holds, whatever was stepped, kept, dropped or overwritten before."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.backends.onnxruntime_resident import ResidentOrtPool
from runtime.models.config import ModelConfig

CONFIG = ModelConfig(
    family="llama",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=2,
    max_positions=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
SLOTS, ROWS, CONTEXT = 12, 3, 6
TABLES = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8], [9, 10, 11, 0, 1, 2]]
"""Few, so that rows find their own slots again, and those of others."""
lengths = st.lists(st.integers(0, CONTEXT), min_size=1, max_size=ROWS)


class ResidentRowsMachine(RuleBasedStateMachine):
    """Any order of decode steps, kept in part or not at all, and of writes of other calls into the same pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ResidentOrtPool(CONFIG, SLOTS)
        self.truth = np.zeros((CONFIG.num_layers, SLOTS, CONFIG.kv_width), dtype=np.float32)
        self.last: tuple[list[int], Any] = ([0], np.array(TABLES))
        self.draw = np.random.default_rng(0)
        self.write(list(range(SLOTS)))

    @rule(slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
    def write(self, slots: list[int]) -> None:
        """Another call's keys and values."""
        values = self.draw.standard_normal((CONFIG.num_layers, 1, len(slots), CONFIG.kv_width)).astype(np.float32)
        ids, columns = np.array(slots), np.arange(len(slots))
        self.pool.write(ids, values, -values, rows=np.zeros(len(slots), dtype=np.int64), columns=columns)
        self.truth[:, ids] = values[:, 0]

    @rule(
        counts=lengths,
        tables=st.lists(st.sampled_from(TABLES), min_size=ROWS, max_size=ROWS),
        kept=st.sets(st.integers(0, ROWS - 1)),
        room=st.integers(1, 2),
        broken=st.booleans(),
    )
    def step(self, counts: list[int], tables: list[list[int]], kept: set[int], room: int, broken: bool) -> None:
        """Sequences that come and go, and read what others wrote."""
        self._step(counts, np.array(tables), kept, room, broken)

    @rule(room=st.integers(1, 2))
    def go_on(self, room: int) -> None:
        """The sequences of the step before, each one token longer, whatever was written meanwhile."""
        counts, tables = self.last
        self._step([count + 1 for count in counts], tables, set(range(ROWS)), room, broken=False)

    def _step(self, counts: list[int], tables: Any, kept: set[int], room: int, broken: bool) -> None:
        starts = np.array(counts, dtype=np.int64)
        batch, width = len(counts), min(CONTEXT, tables.shape[1])
        slots = np.ascontiguousarray(tables[:batch, :width], dtype=np.int64)
        starts = np.minimum(starts, width)
        self.last = (starts.tolist(), tables)
        found = self.pool.rows.prepare(slots, starts, columns=CONTEXT + room)
        for row, start in enumerate(starts.tolist()):
            expected = self.truth[:, slots[row, :start]].reshape(CONFIG.num_layers, start, 2, 2).transpose(0, 2, 1, 3)
            np.testing.assert_array_equal(found.k[:, row, :, :start], expected)
            np.testing.assert_array_equal(found.v[:, row, :, :start], -expected)
        assert np.isfinite(found.k).all() and np.isfinite(found.v).all()
        values = self.draw.standard_normal((CONFIG.num_layers, batch, 2, 2)).astype(np.float32)
        for row, start in enumerate(starts.tolist()):  # as the program does
            found.k[:, row, :, start] = np.nan if broken else values[:, row]
            found.v[:, row, :, start] = np.nan if broken else -values[:, row]
        new_k, new_v = found.new_columns(starts, 1)
        self.pool.rows.ran(starts, new_k)
        rows = np.array([row for row in range(batch) if row in kept], dtype=np.int64)
        # Two rows may not write into one slot: the engine never shares a block that is still being filled.
        targets = np.array([tables[row, min(start, width - 1)] for row, start in zip(rows, starts[rows], strict=True)])
        if broken or not len(rows) or len(set(targets.tolist())) < len(rows):
            return
        self.pool.write(targets, new_k, new_v, rows=rows, columns=np.zeros(len(rows), dtype=np.int64))
        self.truth[:, targets] = values[:, rows].reshape(CONFIG.num_layers, len(rows), -1)

    @invariant()
    def the_pool_holds_the_truth(self) -> None:
        """Reading gives what was written last."""
        k, v = self.pool.read(np.arange(SLOTS))
        np.testing.assert_array_equal(k, self.truth)
        np.testing.assert_array_equal(v, -self.truth)


TestResidentRows = ResidentRowsMachine.TestCase
TestResidentRows.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

"""What stands in the tables is what the pool holds, whatever was stepped, kept, dropped or overwritten before."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

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
rows = st.sets(st.integers(0, ROWS - 1), max_size=2)
columns = st.sampled_from([CONTEXT + 2, CONTEXT + 2, CONTEXT + 2, None])
"""Of a table; None for as few as the step can do with."""


class ResidentRowsMachine(RuleBasedStateMachine):
    """Any order of decode steps, kept in part or not at all, and of writes of other calls into the same pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ResidentOrtPool(CONFIG, SLOTS)
        self.truth = np.zeros((CONFIG.num_layers, SLOTS, CONFIG.kv_width), dtype=np.float32)
        self.steps: list[tuple[list[int], Any]] = [([0], np.array(TABLES))]
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
        lost=rows,
        broken=rows,
        width=columns,
        elsewhere=st.booleans(),
    )
    def step(
        self,
        counts: list[int],
        tables: list[list[int]],
        lost: set[int],
        broken: set[int],
        width: int | None,
        elsewhere: bool,
    ) -> None:
        """Sequences that come and go, and read what others wrote."""
        self.decode(counts, np.array(tables), lost, broken, width=width, elsewhere=elsewhere)

    @rule(back=st.integers(1, 3), more=st.integers(0, 1), lost=rows, width=columns, pieces=st.integers(1, 3))
    def go_on(self, back: int, more: int, lost: set[int], width: int | None, pieces: int) -> None:
        """The sequences of an earlier step, each one token longer or the same, whatever was written meanwhile."""
        counts, tables = self.steps[-min(back, len(self.steps))]
        longer = [count + more for count in counts]
        self.decode(longer, tables, lost, set(), width=width, elsewhere=False, pieces=pieces)

    def decode(
        self,
        counts: list[int],
        tables: Any,
        lost: set[int],
        broken: set[int],
        *,
        width: int | None,
        elsewhere: bool,
        pieces: int = 1,
    ) -> None:
        starts = np.minimum(np.array(counts, dtype=np.int64), CONTEXT)
        self.steps.append((starts.tolist(), tables))
        batch = len(counts)
        slots = np.ascontiguousarray(tables[:batch], dtype=np.int64)
        found = self.pool.rows.prepare(slots, starts, columns=width or int(starts.max()) + 1)
        for row, start in enumerate(starts.tolist()):
            expected = self.truth[:, slots[row, :start]]
            np.testing.assert_array_equal([table[row, :start] for table in found.k], expected)
            np.testing.assert_array_equal([table[row, :start] for table in found.v], -expected)
        assert all(np.isfinite(table).all() for table in found.all)
        new_k, new_v = self.pool.rows.begin(starts)
        values = self.draw.standard_normal((CONFIG.num_layers, batch, CONFIG.kv_width)).astype(np.float32)
        for row, start in enumerate(starts.tolist()):  # as the program does
            for layer, (k, v) in enumerate(zip(found.k, found.v, strict=True)):
                k[row, start] = np.nan if row in broken else values[layer, row]
                v[row, start] = np.nan if row in broken else -values[layer, row]
        kept = np.array([row for row in range(batch) if row not in lost | broken], dtype=np.int64)
        # Two rows may not write into one slot: the engine never shares a block that is still being filled.
        targets = np.array(
            [tables[row, min(start, CONTEXT - 1)] for row, start in zip(kept, starts[kept], strict=True)]
        )
        if not len(kept) or len(set(targets.tolist())) < len(kept):
            return
        targets = (targets + elsewhere) % SLOTS
        for part in np.array_split(np.arange(len(kept)), pieces):
            columns = np.zeros(len(part), dtype=np.int64)
            self.pool.write(targets[part], new_k, new_v, rows=kept[part], columns=columns)
        self.truth[:, targets] = values[:, kept]

    @rule(slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=3))
    def read(self, slots: list[int]) -> None:
        """Reading gives what was written last; it is seldom asked for, so that much stands in rows only."""
        ids = np.array(slots)
        k, v = self.pool.read(ids)
        np.testing.assert_array_equal(k, self.truth[:, ids])
        np.testing.assert_array_equal(v, -self.truth[:, ids])

    def teardown(self) -> None:
        """In the end, the pool holds everything."""
        self.read(list(range(SLOTS)))


TestResidentRows = ResidentRowsMachine.TestCase
TestResidentRows.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_what_is_kept_in_another_slot_than_the_calls_own_is_read_again() -> None:
    machine = ResidentRowsMachine()
    machine.decode([1], np.array(TABLES), set(), set(), width=CONTEXT + 2, elsewhere=True)
    machine.decode([2], np.array(TABLES), set(), set(), width=CONTEXT + 2, elsewhere=False)


def test_the_next_call_is_foreseen_row_by_row_in_whatever_order_rows_are_kept() -> None:
    pool = ResidentOrtPool(CONFIG, SLOTS)
    slots = np.arange(SLOTS).reshape(2, CONTEXT)
    values = np.arange(2 * SLOTS * CONFIG.kv_width, dtype=np.float32).reshape(2, 1, SLOTS, CONFIG.kv_width)
    every = np.arange(SLOTS)
    pool.write(every, values, -values, rows=np.zeros(SLOTS, dtype=np.int64), columns=every)
    starts, order = np.array([2, 4]), np.array([1, 0])
    pool.rows.prepare(slots, starts, columns=CONTEXT + 2)
    new_k, new_v = pool.rows.begin(starts)
    pool.write(slots[order, starts[order]], new_k, new_v, rows=order, columns=np.zeros(2, dtype=np.int64))
    swapped = np.array([5, 3])  # as long as the rows are now, the other way round
    found = pool.rows.prepare(slots, swapped, columns=CONTEXT + 2)
    expected = pool.read(slots[0, :5])[0]
    np.testing.assert_array_equal([table[0, :5] for table in found.k], expected)

"""Whatever came and went: each row of a decode call reads its own blocks, and writes where its next token belongs."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from runtime.engine.inputs import InputBuffers, SlotTables

BLOCK, LANES, LONGEST, CONTEXT = 2, 3, 16, 8
SWAPPED = [
    *[("admit", 0, 1), ("admit", 1, 2), ("decode", 0, 1), ("drop", 0, 1), ("drop", 1, 1)],
    *[("admit", 0, 3), ("admit", 1, 4), ("decode", 0, 1)],
]
"""Two that leave and come back in each other's place, and then decode in the same rows as before."""


@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", "extend", "drop", "decode"]), st.integers(0, 4), st.integers(1, 9)),
        max_size=40,
    )
)
@example(SWAPPED)
def test_a_decode_call_is_filled_from_the_tables(script: list[tuple[str, int, int]]) -> None:
    """A sequence that comes back may have another table, and one call after the other may have the same rows."""
    tables = SlotTables(LANES, longest=LONGEST, block_size=BLOCK, context_multiple=CONTEXT)
    buffers, blocks = InputBuffers(), dict[int, list[int]]()
    for what, index, block in script:
        if what == "admit" and index not in blocks and len(blocks) < LANES:
            blocks[index] = [block]
            tables.admit(index, [block])
        elif what == "extend" and len(blocks.get(index, [0] * LONGEST)) < LONGEST // BLOCK:
            blocks[index].append(block)
            tables.extend(index, [block])
        elif what == "drop":
            blocks.pop(index, None)
            tables.drop(index)
        elif what == "decode" and blocks:
            decode(tables, buffers, blocks, turn=block)


def decode(tables: SlotTables, buffers: InputBuffers, blocks: dict[int, list[int]], *, turn: int) -> None:
    """Fill a call of all sequences in one of two orders, and look at every number of it."""
    sequences = sorted(blocks, reverse=turn > 5)
    slots = {index: [b * BLOCK + k for b in table for k in range(BLOCK)] for index, table in blocks.items()}
    starts = [min(turn, len(slots[index]) - 1, CONTEXT) for index in sequences]
    inputs = buffers.take(LANES, 1, CONTEXT, rows=len(sequences))
    writes = tables.fill_decode(inputs, sequences=sequences, starts=starts)
    for row, (index, start) in enumerate(zip(sequences, starts, strict=True)):
        assert inputs.slots[row].tolist() == (slots[index] + [0] * CONTEXT)[:CONTEXT]
        assert (inputs.positions[row, 0], inputs.context_lengths[row]) == (start, start)
        assert (writes.slot_ids[row], writes.rows[row], writes.columns[row]) == (slots[index][start], row, 0)
    assert len(writes.slot_ids) == len(writes.rows) == len(writes.columns) == len(sequences)

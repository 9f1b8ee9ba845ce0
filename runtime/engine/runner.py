"""How does a planned call reach the executor?  Slot tables, input arrays, the call, and keys and values put away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from runtime.backends.protocol import Executor, Floats
from runtime.engine.inputs import (
    CallInputs,
    InputBuffers,
    Integers,
    SlotTables,
    Writes,
    join_writes,
    last_tokens,
    place_row,
)
from runtime.engine.plan import Call, StepPlan
from runtime.engine.sampling import Peaks, find_peaks
from runtime.engine.settings import Settings, pool_slots


class CallRunner:
    """Runs the calls of live plans over one pool."""

    def __init__(self, executor: Executor, settings: Settings, *, clock: Callable[[], int]) -> None:
        self._executor = executor
        self._clock = clock
        self._pool = executor.new_pool(pool_slots(settings))
        self._buffers = InputBuffers()
        self._last_position = executor.contract.max_positions - 1
        self._tables = SlotTables(
            settings.max_num_seqs,
            longest=settings.longest_sequence,
            block_size=settings.block_size,
            context_multiple=settings.context_multiple,
        )

    def apply(self, plan: StepPlan) -> None:
        """Bring the slot tables to where the plan says."""
        for preemption in plan.preemptions:
            self._tables.drop(preemption.sequence)
        for admission in plan.admissions:
            self._tables.admit(admission.sequence, [hit.block for hit in admission.hits])
        for index, *blocks in plan.allocations:
            self._tables.extend(index, blocks)

    def drop(self, index: int) -> None:
        """Forget a sequence that ended."""
        self._tables.drop(index)

    def execute(self, call: Call, tokens_of: Mapping[int, Sequence[int]]) -> tuple[Floats, Peaks, int]:
        """Run one call and put its keys and values into the pool.

        tokens_of: all known tokens of each sequence in the call.  Returns the logits of each real row's last token,
        float32 [rows, vocabulary], their peaks, and the microseconds that executor and pool took.  `AnswerNotFinite`
        where a row's are no numbers; nothing of the call is kept then.
        """
        rows = len(call.sequences)
        inputs = self._buffers.take(call.batch, call.tokens, call.context, rows=rows)
        last = None
        if call.tokens == 1:
            inputs.tokens[:rows, 0] = [
                tokens_of[index][start] for index, start in zip(call.sequences, call.starts, strict=True)
            ]
            writes = self._tables.fill_decode(inputs, sequences=call.sequences, starts=call.starts)
        else:
            writes = self._fill_chunks(inputs, call, tokens_of)
            last = last_tokens(call)
        began = self._clock()
        output = self._executor.step(*inputs, self._pool, last=last)
        logits = output.logits[:rows, 0]
        # Before anything is kept: a masked key that is no number would reach whoever owns its block next.
        peaks = find_peaks(logits)
        self._pool.write(writes.slot_ids, output.new_k, output.new_v, rows=writes.rows, columns=writes.columns)
        return logits, peaks, self._clock() - began

    def _fill_chunks(self, inputs: CallInputs, call: Call, tokens_of: Mapping[int, Sequence[int]]) -> Writes:
        parts: list[tuple[int, Integers]] = []
        for row, (index, start, count) in enumerate(zip(call.sequences, call.starts, call.counts, strict=True)):
            slots = self._tables.slots_of(index)
            place_row(
                inputs,
                row,
                tokens=tokens_of[index][start : start + count],
                start=start,
                slots=slots,
                last_position=self._last_position,
            )
            parts.append((row, slots[start : start + count]))
        return join_writes(parts)

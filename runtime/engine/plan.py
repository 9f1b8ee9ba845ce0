"""What did one engine step do?  The schedule as data: which rows of which sequences ran, in which padded shapes.

A plan is written for every step, so its arrays are columns (about ten bytes a token as JSON text) and rows are a view
of them.  The bits of a row depend on the shapes recorded here and on nothing else that a plan does not say: padded
batch, padded tokens, padded context, the row's place in the batch, chunk boundaries, and where its cached blocks came
from.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

DECODE = "decode"
PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a call: tokens [start, start + count) of it, sampling after the last one or not."""

    sequence: int
    start: int
    count: int
    sample: bool


class Call(msgspec.Struct, array_like=True, frozen=True):
    """One execution of the functional step with padded shape [batch, tokens] over `context` gathered positions."""

    graph: str
    """`decode` (one token a row) or `prefill`."""
    batch: int
    """Padded number of rows; real rows come first, in order."""
    tokens: int
    """Padded tokens a row."""
    context: int
    """Padded cache positions gathered for a row (S of the functional step)."""
    sequences: list[int]
    """Sequence index of each real row."""
    starts: list[int]
    """Position of each row's first token."""
    counts: list[int] = []
    """Real tokens of each row; empty when every row has one."""
    silent: list[int] = []
    """Rows whose last logits are not sampled: chunks that do not reach the sequence's last known token."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """The same columns as rows."""
        counts = self.counts or [1] * len(self.sequences)
        silent = frozenset(self.silent)
        return tuple(
            Row(sequence, start, count, position not in silent)
            for position, (sequence, start, count) in enumerate(zip(self.sequences, self.starts, counts, strict=True))
        )

    def row(self, position: int) -> Row:
        """One row, without building the others."""
        count = self.counts[position] if self.counts else 1
        return Row(self.sequences[position], self.starts[position], count, position not in self.silent)


class Hit(msgspec.Struct, array_like=True, frozen=True):
    """A cached block that an admitted sequence reads, with the row that computed the block's last token."""

    block: int
    step: int
    call: int
    row: int


class Admission(msgspec.Struct, array_like=True, frozen=True):
    """A sequence that entered the running set in this step; a preempted one enters again, as its next life."""

    sequence: int
    known: int
    """Tokens known at this moment (prompt, and after a preemption what was generated before)."""
    hits: list[Hit] = []
    """Its first blocks, read from the cache, in order."""


class Release(msgspec.Struct, array_like=True, frozen=True):
    """A sequence that gave up its blocks since the step before this one."""

    sequence: int
    reason: str
    """`stop`, `length`, `cancelled`, `deadline` or `error`."""


class Preemption(msgspec.Struct, array_like=True, frozen=True):
    """A running sequence that lost its blocks in this step and waits to be recomputed."""

    sequence: int
    discarded: int
    """Computed tokens thrown away (those still cached may be hit again)."""
    reason: str = "kv_full"
    """`kv_full`: another one found no block; `priority`: for one of a better priority; `stalled`: its reader was behind
    and others needed the place."""


class Refusal(msgspec.Struct, array_like=True, frozen=True):
    """An accepted sequence that this step gave up: it never gets a row again, and its blocks are free."""

    sequence: int
    reason: str
    """`deadline_unreachable`, or `preemption_limit`: no block was left and all others may not be evicted any more."""
    now_us: int | None = None
    """The time that decided it, where time did."""
    step_us: int | None = None
    """Duration of a step that was reckoned with."""


class StepPlan(msgspec.Struct, array_like=True, frozen=True):
    """Everything one step decided, in the order it took effect: releases, preemptions, admissions, blocks, calls."""

    step: int
    calls: list[Call] = []
    admissions: list[Admission] = []
    allocations: list[list[int]] = []
    """New blocks: [sequence, block, block, ...], appended to that sequence's table."""
    releases: list[Release] = []
    preemptions: list[Preemption] = []
    refusals: list[Refusal] = []
    held: list[int] = []
    """Running sequences that were passed over because their readers are too far behind."""

    @property
    def token_count(self) -> int:
        """Real tokens fed in this step."""
        return sum(sum(call.counts) if call.counts else len(call.sequences) for call in self.calls)

    @property
    def row_count(self) -> int:
        """Real rows over all calls."""
        return sum(len(call.sequences) for call in self.calls)

    def encode(self) -> str:
        """Return the plan as compact JSON text of nested arrays; rare trailing columns are left out where empty."""
        text = msgspec.json.encode(self).decode("ascii")
        return text if self.refusals or self.held else text[: -len(",[],[]]")] + "]"


class SequenceEntry(msgspec.Struct, frozen=True):
    """One line of an engine's sequence table: which request a sequence index of the plans stands for."""

    index: int
    sequence_id: str
    request_ref: str | None = None


def decode_plan(text: str | bytes) -> StepPlan:
    """Read a plan that `StepPlan.encode` wrote; raises msgspec.ValidationError on anything else."""
    return msgspec.json.decode(text, type=StepPlan)

"""How does one replay go?  Life by life along the recorded rows, computing shared prefixes by lineage, then alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from runtime.backends.protocol import Floats
from runtime.engine.errors import PlanMissing
from runtime.engine.generation import FinishReason, GenerationRequest, GenerationResult, OnToken
from runtime.engine.sequence import Output, choose_for
from runtime.engine.slicing import Life, Needs, Schedule
from runtime.engine.workbench import Table, Workbench

BROKEN_OFF = ("cancelled", "deadline", "error")


class SliceUse(msgspec.Struct, frozen=True):
    """How much of the schedule a replay ran."""

    steps: tuple[int, ...]
    """Recorded steps it touched, ascending; empty for `alone`."""
    own_calls: int
    """Calls run for the sequence's own rows."""
    prefix_calls: int
    """Calls run to compute prefix blocks that other sequences had computed."""
    past_calls: int
    """Calls run past the recorded rows, after the replay had left the recording."""
    recorded_calls: int
    """Calls of the schedule that the player was given, for comparison."""


class Lineage(NamedTuple):
    """What one life of the sequence reads from the cache, while it is being computed."""

    schedule: Schedule
    needs: Needs
    reads: Counter[tuple[int, int]]
    """Blocks still to be read from each source."""
    own: Mapping[tuple[int, int], Table]
    """Earlier lives of the sequence, which outlast this."""
    sources: dict[tuple[int, int], Table]
    """What is there: own lives, and others as long as they are read."""


class Rerun:
    """One replay under way."""

    def __init__(
        self,
        bench: Workbench,
        request: GenerationRequest,
        output: Output,
        *,
        clock: Callable[[], int],
        on_token: OnToken | None,
    ) -> None:
        self._bench = bench
        self._request = request
        self._output = output
        self._clock = clock
        self._on_token = on_token
        self._began_us = clock()
        self._first_token_us: int | None = None
        self._tokens = list(request.prompt)
        self._steps: list[int] = []
        self._touched: set[int] = set()
        self._own_calls = self._prefix_calls = self._past_calls = 0
        self._cached_tokens = 0
        self._lives = 1

    def along(self, schedule: Schedule, recorded: GenerationResult | None) -> FinishReason:
        """Follow the recorded rows, then go on alone where the recording ends before the sequence does."""
        lives = schedule.lives_of(self._request.sequence_id)
        if lives and lives[0].known != len(self._tokens):
            raise PlanMissing(
                f"the recorded rows are for a prompt of {lives[0].known} tokens, not of {len(self._tokens)}",
                reason="prompt_differs",
                fix="replay with --mode alone: another prompt has another schedule",
            )
        self._lives = max(1, len(lives))
        needs = [schedule.needs(life, own=life.sequence) for life in lives]
        settings = self._bench.settings
        self._bench.hold(
            schedule.most_blocks(lives, needs, longest=-(-settings.longest_sequence // settings.block_size))
        )
        own: dict[tuple[int, int], Table] = {}
        table = self._bench.new_table()
        for place, life in enumerate(lives):
            table = self._open(life, schedule, needs[place], own)
            for key in [key for key in own if not any(key in later for later in needs[place + 1 :])]:
                self._bench.release(own.pop(key))
            if place == 0:
                self._cached_tokens = table.length
            reason = self._follow(life, table, recorded)
            if reason is not None:
                return reason
            own[life.key] = table
        if recorded is not None and recorded.finish_reason in BROKEN_OFF:
            return recorded.finish_reason
        return self.go_on(table)

    def alone(self) -> FinishReason:
        """Run the request as an idle engine would, without a prefix cache to hit."""
        reason = self.go_on(self._bench.new_table())
        self._own_calls, self._past_calls = self._past_calls, 0
        return reason

    def go_on(self, table: Table) -> FinishReason:
        """Run by itself, in the shapes of an idle engine, until the sequence ends."""
        step = self._steps[-1] + 1 if self._steps else 0
        while True:
            start = table.length
            call = self._bench.call_alone(start, len(self._tokens) - start)
            count = call.row(0).count
            logits = self._bench.run(call, 0, table, tokens=self._tokens[start : start + count], start=start)
            self._past_calls += 1
            self._steps.append(step)
            reason = None if call.silent else self._choose(logits, step)
            if reason is not None:
                return reason
            step += 1

    def _open(self, life: Life, schedule: Schedule, needs: Needs, own: Mapping[tuple[int, int], Table]) -> Table:
        """Make the table with which a life of the sequence begins: its cached blocks, computed by lineage."""
        return self._table_of(
            life, len(life.hits), Lineage(schedule, needs, schedule.reads(life, needs), own, dict(own))
        )

    def _table_of(self, life: Life, blocks: int, lineage: Lineage) -> Table:
        """Open a table whose first `blocks` are those that the life hit; computes their sources where not yet there.

        A source is given up with the last block that is read from it, so that few are held at once.
        """
        table = self._bench.new_table()
        for block, hit in enumerate(life.hits[:blocks]):
            source = lineage.schedule.source_of(hit)
            if source.key not in lineage.sources:
                lineage.sources[source.key] = self._compute(source, lineage)
            self._bench.share(table, lineage.sources[source.key].blocks[block])
            lineage.reads[source.key] -= 1
            if not lineage.reads[source.key] and source.key not in lineage.own:
                self._bench.release(lineage.sources.pop(source.key))
        return table

    def _compute(self, source: Life, lineage: Lineage) -> Table:
        """Compute the shared prefix as another life did, from this request's own tokens."""
        upto = lineage.needs[source.key][1]
        table = self._table_of(source, upto // self._bench.settings.block_size, lineage)
        for placed in source.rows:
            start, count = placed.row.start, placed.row.count
            if start >= upto:
                break
            tokens = self._tokens[start : min(start + count, upto)]
            tokens += [0] * (count - len(tokens))
            self._bench.run(placed.call, placed.position, table, tokens=tokens, start=start, keep=upto - start)
            self._prefix_calls += 1
            self._touched.add(placed.step)
        return table

    def _follow(self, life: Life, table: Table, recorded: GenerationResult | None) -> FinishReason | None:
        """Run the recorded rows of one life; return why the sequence ended, if it did."""
        failed = recorded is not None and recorded.finish_reason == "error"
        for placed in life.rows:
            if failed and recorded is not None and placed.step not in recorded.steps:
                return "error"  # the call in which the original failed
            start, count = placed.row.start, placed.row.count
            logits = self._bench.run(
                placed.call, placed.position, table, tokens=self._tokens[start : start + count], start=start
            )
            self._own_calls += 1
            self._touched.add(placed.step)
            self._steps.append(placed.step)
            if placed.row.sample:
                reason = self._choose(logits, placed.step)
                if reason is not None:
                    return reason
        return None

    def _choose(self, logits: Floats, step: int) -> FinishReason | None:
        choices = choose_for([self._output], logits)
        now_us = self._clock()
        if self._first_token_us is None:
            self._first_token_us = now_us
        reason = self._output.accept(choices, 0, step=step, emitted_us=now_us - self._began_us)
        self._tokens.append(self._output.tokens[-1])
        if self._on_token is not None:
            self._on_token(self._output.records[-1])
        return reason

    def result(self, reason: FinishReason, recorded: GenerationResult | None) -> GenerationResult:
        """Sum up; a replay never queues."""
        now_us = self._clock()
        first_us = now_us if self._first_token_us is None else self._first_token_us
        broken_off = reason in BROKEN_OFF and recorded is not None
        return GenerationResult(
            sequence_id=self._request.sequence_id,
            tokens=tuple(self._output.tokens),
            records=tuple(self._output.records),
            finish_reason=reason,
            queue_us=0,
            prefill_us=first_us - self._began_us,
            decode_us=now_us - first_us,
            first_token_us=None if self._first_token_us is None else first_us - self._began_us,
            prompt_tokens=len(self._request.prompt),
            cached_tokens=self._cached_tokens,
            steps=tuple(self._steps),
            preemptions=self._lives - 1,
            error=recorded.error if broken_off and recorded is not None else None,
            cancel_origin=recorded.cancel_origin if broken_off and recorded is not None else None,
            error_type=recorded.error_type if broken_off and recorded is not None else None,
        )

    def used(self, recorded_calls: int) -> SliceUse:
        """Say what was run."""
        return SliceUse(
            tuple(sorted(self._touched)), self._own_calls, self._prefix_calls, self._past_calls, recorded_calls
        )

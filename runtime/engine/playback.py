"""What would one recorded sequence compute again?  Its slice of the schedule is run, without any other request.

Every row runs in the padded shape, and at the place in it, that the plan recorded.  All other rows are stand-ins: same
shape, no content.  Prefix blocks that other sequences computed are computed again in those sequences' recorded shapes
from this request's own tokens, which are the same as far as the prefix was shared; causal attention keeps what stood
after it from mattering.

Modes: `faithful` follows the recorded rows, with the replay's own tokens; `forced` does the same but feeds the recorded
tokens; `alone` schedules the request by itself, as an idle engine would.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from manifests.scheduling import SchedulingManifest
from runtime.backends.protocol import Executor, Floats
from runtime.engine.errors import PlanMissing
from runtime.engine.generation import FinishReason, GenerationRequest, GenerationResult, OnToken
from runtime.engine.grammar import GrammarCompiler, TextTokenizer
from runtime.engine.live import LoopDelivery, monotonic_us
from runtime.engine.plan import SequenceEntry, StepPlan
from runtime.engine.scheduler import check_fits
from runtime.engine.sequence import Output, check_request, choose_for, start_output
from runtime.engine.settings import settings_for
from runtime.engine.slicing import Life, Schedule
from runtime.engine.workbench import StandIns, Table, Workbench

Mode = Literal["faithful", "alone", "forced"]
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
    """Calls of the whole schedule, for comparison."""


class Playback(msgspec.Struct, frozen=True):
    """A replayed sequence and the slice it took."""

    result: GenerationResult
    slice: SliceUse


class PlanPlayer:
    """Replays sequences of one recorded engine on an executor of its own.

    plans: in any order; only those of the slice are needed.  sequences: the engine's sequence table.
    stand_ins: fills the rows that belong to others, for tests that prove that their content does not matter.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: TextTokenizer | None,
        scheduling: SchedulingManifest,
        plans: Iterable[StepPlan],
        sequences: Iterable[SequenceEntry],
        *,
        stand_ins: StandIns | None = None,
        clock: Callable[[], int] = monotonic_us,
    ) -> None:
        self._settings = settings_for(scheduling, executor)
        self._vocab_size = executor.config.vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size=self._vocab_size)
        kept = list(plans)
        self._schedule = Schedule(kept, sequences, block_size=self._settings.block_size)
        self._recorded_calls = sum(len(plan.calls) for plan in kept)
        self._bench = Workbench(executor, self._settings, stand_ins=stand_ins)
        self._clock = clock

    def replay(
        self,
        request: GenerationRequest,
        mode: Mode = "faithful",
        recorded: GenerationResult | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> GenerationResult:
        """Replay a request and return its result; see `play`."""
        return self.play(request, mode, recorded, on_token=on_token).result

    def play(
        self,
        request: GenerationRequest,
        mode: Mode = "faithful",
        recorded: GenerationResult | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> Playback:
        """Replay a request and say which slice of the schedule that took.

        recorded: how the original ended; `forced` needs it, `faithful` uses it to stop where the original was cut off.
        A sequence that no engine recorded, with nothing known of its end, runs alone.
        Raises PlanMissing when the schedule lacks part of the slice, and the executor's errors.
        """
        if mode == "forced":
            if recorded is None:
                raise PlanMissing("forced replay needs the recorded tokens", reason="recorded_result_missing")
            request = msgspec.structs.replace(request, forced_tokens=recorded.tokens)
        check_request(request, vocab_size=self._vocab_size)
        play = _Play(self._bench, request, start_output(request, self._grammars), clock=self._clock, on_token=on_token)
        try:
            if mode == "alone" or (recorded is None and not self._schedule.knows(request.sequence_id)):
                check_fits(self._settings, len(request.prompt), request.sampling.max_tokens)
                reason = play.alone()
            else:
                reason = play.along(self._schedule, recorded)
        finally:
            self._bench.clear()
        return Playback(play.result(reason, recorded), play.used(self._recorded_calls))


class RecordedGeneration:
    """A PlanPlayer as a GenerationService: the request path does not know that it is a replay."""

    def __init__(
        self, player: PlanPlayer, recorded: Mapping[str, GenerationResult], *, mode: Mode = "faithful"
    ) -> None:
        self._player = player
        self._recorded = recorded
        self._mode: Mode = mode
        self._turn = threading.Lock()

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        """Replay the sequence with the request's sequence id; tokens are called back on the event loop."""
        delivery = None if on_token is None else LoopDelivery(asyncio.get_running_loop(), on_token)
        result = await asyncio.to_thread(self._replay, request, delivery)
        if delivery is not None:
            delivery.flush()
        return result

    def _replay(self, request: GenerationRequest, on_token: OnToken | None) -> GenerationResult:
        recorded = self._recorded.get(request.sequence_id)
        with self._turn:  # one pool, one replay at a time
            return self._player.replay(request, self._mode, recorded, on_token=on_token)


class _Play:
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

    def _open(
        self,
        life: Life,
        schedule: Schedule,
        needs: Mapping[tuple[int, int], tuple[Life, int]],
        own: Mapping[tuple[int, int], Table],
    ) -> Table:
        """Make the table with which a life of the sequence begins: its cached blocks, computed by lineage."""
        sources = dict(own)
        table = self._table_of(life, len(life.hits), schedule, needs, sources)
        for key, source in sources.items():
            if key not in own:
                self._bench.release(source)
        return table

    def _table_of(
        self,
        life: Life,
        blocks: int,
        schedule: Schedule,
        needs: Mapping[tuple[int, int], tuple[Life, int]],
        sources: dict[tuple[int, int], Table],
    ) -> Table:
        """Open a table whose first `blocks` are those that the life hit; computes their sources where not yet there."""
        table = self._bench.new_table()
        for block, hit in enumerate(life.hits[:blocks]):
            source = schedule.source_of(hit)
            if source.key not in sources:
                sources[source.key] = self._compute(source, schedule, needs, sources)
            self._bench.share(table, sources[source.key].blocks[block])
        return table

    def _compute(
        self,
        source: Life,
        schedule: Schedule,
        needs: Mapping[tuple[int, int], tuple[Life, int]],
        sources: dict[tuple[int, int], Table],
    ) -> Table:
        """Compute the shared prefix as another life did, from this request's own tokens."""
        upto = needs[source.key][1]
        table = self._table_of(source, upto // self._bench.settings.block_size, schedule, needs, sources)
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
        )

    def used(self, recorded_calls: int) -> SliceUse:
        """Say what was run."""
        return SliceUse(
            tuple(sorted(self._touched)), self._own_calls, self._prefix_calls, self._past_calls, recorded_calls
        )

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
from runtime.backends.protocol import Executor
from runtime.engine.errors import PlanMissing
from runtime.engine.generation import GenerationRequest, GenerationResult, OnToken
from runtime.engine.grammar import GrammarCompiler, TextTokenizer
from runtime.engine.live import LoopDelivery, monotonic_us
from runtime.engine.plan import SequenceEntry, StepPlan
from runtime.engine.rerun import Rerun, SliceUse
from runtime.engine.scheduler import check_fits
from runtime.engine.sequence import check_request, start_output
from runtime.engine.settings import settings_for
from runtime.engine.slicing import Schedule
from runtime.engine.workbench import StandIns, Workbench

Mode = Literal["faithful", "alone", "forced"]


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
        play = Rerun(self._bench, request, start_output(request, self._grammars), clock=self._clock, on_token=on_token)
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

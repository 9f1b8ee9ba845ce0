"""What does one sequence compute under an edited plan?  The slice runs again on the real executor, as the plan says.

Replays are counted, and what has run is kept by its shapes: two plans that reach the bits in the same way are one
replay.  That rests on equal shapes giving equal bits, which `again` puts to the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from manifests.scheduling import SchedulingManifest
from runtime.backends.protocol import Executor
from runtime.engine.generation import GenerationRequest, TokenRecord
from runtime.engine.grammar import GrammarCompiler, TextTokenizer
from runtime.engine.live import monotonic_us
from runtime.engine.plan import SequenceEntry, StepPlan
from runtime.engine.plan_edits import EditedPlan
from runtime.engine.rerun import Rerun
from runtime.engine.sequence import check_request, start_output
from runtime.engine.settings import settings_for
from runtime.engine.slicing import Schedule
from runtime.engine.workbench import Workbench


class EditedReplays:
    """Replays one recorded sequence under edited plans.

    plans: of its slice at least.  on_replay: called after each replay with how many there were.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: TextTokenizer | None,
        scheduling: SchedulingManifest,
        plans: Iterable[StepPlan],
        sequences: Iterable[SequenceEntry],
        request: GenerationRequest,
        *,
        on_replay: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.settings = settings_for(scheduling, executor)
        self.request = request
        self._sequences = tuple(sequences)
        self.schedule = self.schedule_like(plans)
        self.count = 0
        vocab_size = executor.config.vocab_size
        check_request(request, vocab_size=vocab_size)
        self._grammars = GrammarCompiler(tokenizer, vocab_size=vocab_size)
        self._bench = Workbench(executor, self.settings)
        self._on_replay = on_replay
        self._known: dict[tuple[object, ...], tuple[TokenRecord, ...]] = {}

    def recorded_plan(self, tokens: int) -> EditedPlan:
        """Return the recorded plan of the first `tokens` output tokens, to be edited."""
        return EditedPlan(self.schedule, self.request.sequence_id, self.settings, tokens=tokens)

    def knows(self, plan: EditedPlan, tokens: int) -> bool:
        """Tell whether a plan of the same shapes has run already."""
        return (tokens, plan.signature()) in self._known

    def outcome(self, plan: EditedPlan, tokens: int) -> tuple[TokenRecord, ...]:
        """Return the first `tokens` token records under a plan; runs only what has not run in the same shapes."""
        key = (tokens, plan.signature())
        if key not in self._known:
            self._known[key] = self.again(plan, tokens)
        return self._known[key]

    def again(self, plan: EditedPlan, tokens: int) -> tuple[TokenRecord, ...]:
        """Run a plan, whether or not its shapes have run before."""
        return self.along(plan.as_schedule(), tokens)

    def schedule_like(self, plans: Iterable[StepPlan]) -> Schedule:
        """Return other plans as a schedule in which the sequence has the same index."""
        return Schedule(plans, self._sequences, block_size=self.settings.block_size)

    def along(self, schedule: Schedule, tokens: int) -> tuple[TokenRecord, ...]:
        """Return the first `tokens` token records along any schedule."""
        return self._run(tokens, lambda play: play.along(schedule, None))

    def alone(self, tokens: int) -> tuple[TokenRecord, ...]:
        """Return the token records of an idle engine."""
        return self._run(tokens, lambda play: play.alone())

    def _run(self, tokens: int, go: Callable[[Rerun], object]) -> tuple[TokenRecord, ...]:
        request = msgspec.structs.replace(
            self.request, sampling=msgspec.structs.replace(self.request.sampling, max_tokens=tokens)
        )
        output = start_output(request, self._grammars)
        try:
            go(Rerun(self._bench, request, output, clock=monotonic_us, on_token=None))
        finally:
            self._bench.clear()
        self.count += 1
        self._on_replay(self.count)
        return tuple(output.records)

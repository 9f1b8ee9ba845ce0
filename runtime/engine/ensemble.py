"""What do all sequences of a recorded engine compute again, together?  Every recorded call runs once, all rows real.

A slice replays one request without any other's content, at the price of one row a call.  Who replays a whole run, and
may see all of it, can have every row of a call at once instead.  The plans say what runs; each sequence's tokens are
its own, so that one that leaves the recording touches no other: a row is blind to what stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from manifests.scheduling import SchedulingManifest
from runtime.backends.protocol import Executor
from runtime.engine.errors import PlanMissing
from runtime.engine.generation import FinishReason, GenerationRequest, GenerationResult
from runtime.engine.grammar import GrammarCompiler, TextTokenizer
from runtime.engine.live import monotonic_us
from runtime.engine.plan import Call, StepPlan
from runtime.engine.rerun import BROKEN_OFF
from runtime.engine.runner import CallRunner
from runtime.engine.sampling import Scratch
from runtime.engine.sequence import Output, check_request, choose_for, start_output
from runtime.engine.settings import settings_for


@dataclass(slots=True)
class Member:
    """One sequence under way."""

    request: GenerationRequest
    recorded: GenerationResult
    output: Output
    tokens: list[int]
    steps: list[int] = field(default_factory=list[int])
    lives: int = 0
    cached_tokens: int = 0
    first_token_us: int | None = None
    ended: FinishReason | None = None


class Ensemble:
    """Runs one engine's recorded plans with real rows.

    members: what was asked and how it ended, by sequence index; rows of others are stand-ins.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: TextTokenizer | None,
        scheduling: SchedulingManifest,
        members: Mapping[int, tuple[GenerationRequest, GenerationResult]],
        *,
        clock: Callable[[], int] = monotonic_us,
    ) -> None:
        settings = settings_for(scheduling, executor)
        self.calls = 0
        self._block_size = settings.block_size
        self._clock = clock
        self._began_us = clock()
        self._scratch = Scratch()
        self._runner = CallRunner(executor, settings, clock=clock)
        grammars = GrammarCompiler(tokenizer, vocab_size=executor.config.vocab_size)
        self._members: dict[int, Member] = {}
        for index, (request, recorded) in members.items():
            check_request(request, vocab_size=executor.config.vocab_size)
            self._members[index] = Member(request, recorded, start_output(request, grammars), list(request.prompt))

    def play(self, plans: Sequence[StepPlan]) -> dict[int, GenerationResult]:
        """Run all plans of an engine, from its first step on; return the results of the members that came to an end.

        Raises PlanMissing when a step is not there: slices may still be whole, blocks given out by it are not known.
        """
        ordered = sorted(plans, key=lambda plan: plan.step)
        for step, plan in enumerate(ordered):
            if plan.step != step:
                raise PlanMissing(f"step {step} was not recorded", reason="plan_missing", evidence={"step": step})
            self._take_in(plan)
            for call in plan.calls:
                self._run(call, step)
        return {index: self._result(one) for index, one in self._members.items() if self._reason(one) is not None}

    def _take_in(self, plan: StepPlan) -> None:
        """Do what a plan says before its calls."""
        for gone in (*plan.releases, *plan.refusals):
            self._runner.drop(gone.sequence)
        self._runner.apply(plan)
        for admission in plan.admissions:
            member = self._members.get(admission.sequence)
            if member is not None:
                member.lives += 1
                if member.lives == 1:
                    member.cached_tokens = len(admission.hits) * self._block_size

    def _run(self, call: Call, step: int) -> None:
        """Run one call, and choose a token for each member that samples in it."""
        live = [(row, self._members.get(one.sequence), one) for row, one in enumerate(call.rows)]
        taking = [(row, member, one.sample) for row, member, one in live if member is not None and _runs(member, step)]
        if not taking and any(member is not None for _, member, _ in live):
            return  # nobody's: all have ended, or the call failed when it was recorded
        tokens_of = {
            one.sequence: _padded([] if member is None else member.tokens, one.start + one.count)
            for _, member, one in live
        }
        logits, peaks, _ = self._runner.execute(call, tokens_of)
        self.calls += 1
        for _, member, _ in taking:
            member.steps.append(step)
        sampling = [(row, member) for row, member, samples in taking if samples]
        if not sampling:
            return
        rows = [row for row, _ in sampling]
        outputs = [member.output for _, member in sampling]
        choices = choose_for(outputs, logits[rows], found=peaks.of(rows), scratch=self._scratch)
        now_us = self._clock() - self._began_us
        for place, (_, member) in enumerate(sampling):
            if member.first_token_us is None:
                member.first_token_us = now_us
            member.ended = member.output.accept(choices, place, step=step, emitted_us=now_us)
            member.tokens.append(member.output.tokens[-1])

    def _reason(self, member: Member) -> FinishReason | None:
        """Return why a member ended; None when its own tokens went on past the recording."""
        if member.ended is None and member.recorded.finish_reason in BROKEN_OFF:
            return member.recorded.finish_reason
        return member.ended

    def _result(self, member: Member) -> GenerationResult:
        reason = self._reason(member) or "error"
        took_us = self._clock() - self._began_us
        first_us = took_us if member.first_token_us is None else member.first_token_us
        broken_off = reason in BROKEN_OFF
        return GenerationResult(
            sequence_id=member.request.sequence_id,
            tokens=tuple(member.output.tokens),
            records=tuple(member.output.records),
            finish_reason=reason,
            queue_us=0,
            prefill_us=first_us,
            decode_us=took_us - first_us,
            first_token_us=member.first_token_us,
            prompt_tokens=len(member.request.prompt),
            cached_tokens=member.cached_tokens,
            steps=tuple(member.steps),
            preemptions=max(0, member.lives - 1),
            error=member.recorded.error if broken_off else None,
            cancel_origin=member.recorded.cancel_origin if broken_off else None,
        )


def _runs(member: Member, step: int) -> bool:
    """Tell whether a member still runs in a step; one that failed in its call when it was recorded does not."""
    if member.ended is not None:
        return False
    return member.recorded.finish_reason != "error" or step in member.recorded.steps


def _padded(tokens: list[int], length: int) -> list[int]:
    """Return at least `length` tokens, with stand-ins where a sequence has ended early or is nobody's."""
    return tokens if len(tokens) >= length else tokens + [0] * (length - len(tokens))

"""A live engine's steps without its thread: arrivals at exact steps, so that a recording is the same every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifests.scheduling import SchedulingManifest
from runtime.engine.generation import GenerationRequest, GenerationResult
from runtime.engine.grammar import GrammarCompiler
from runtime.engine.plan import SequenceEntry, StepPlan
from runtime.engine.runner import CallRunner
from runtime.engine.sequence import Output, choose_for, start_output
from runtime.engine.settings import settings_for
from runtime.engine.simulation import Arrival, Simulation
from runtime.engine.state import SchedulerState
from tests.runtime.engine.recorded import Recording
from tests.runtime.engine.toy import ListRecorder

TICK_US = 1_000
"""What a step takes here."""


class RealAnswers:
    """Runs each planned call on the executor, all its real rows together, as the engine does."""

    def __init__(self, model: Any, scheduling: SchedulingManifest, requests: Sequence[GenerationRequest]) -> None:
        executor = model.executor
        grammars = GrammarCompiler(model.tokenizer, vocab_size=executor.config.vocab_size)
        self.outputs: list[Output] = [start_output(request, grammars) for request in requests]
        self.steps: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.preemptions: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self._block = settings_for(scheduling, executor).block_size
        self._runner = CallRunner(executor, settings_for(scheduling, executor), clock=lambda: 0)

    def answer(self, plan: StepPlan, state: SchedulerState) -> tuple[Mapping[int, int], Mapping[int, str]]:
        """Run the calls and choose the tokens."""
        for release in plan.releases:
            self.ended.setdefault(release.sequence, release.reason)
            self._runner.drop(release.sequence)
        for refusal in plan.refusals:
            self.ended[refusal.sequence] = "error"
            self._runner.drop(refusal.sequence)
        self._runner.apply(plan)
        for preemption in plan.preemptions:
            self.preemptions[preemption.sequence] = self.preemptions.get(preemption.sequence, 0) + 1
        for admission in plan.admissions:
            self.cached.setdefault(admission.sequence, len(admission.hits) * self._block)
        tokens_of = {sequence.index: sequence.tokens for sequence in state.running}
        sampled: dict[int, int] = {}
        ended: dict[int, str] = {}
        for call in plan.calls:
            logits, *_ = self._runner.execute(call, tokens_of)
            for row in call.rows:
                self.steps.setdefault(row.sequence, []).append(plan.step)
            rows = [place for place, row in enumerate(call.rows) if row.sample]
            if not rows:
                continue
            indices = [call.sequences[row] for row in rows]
            choices = choose_for([self.outputs[index] for index in indices], logits[rows])
            for place, index in enumerate(indices):
                reason = self.outputs[index].accept(choices, place, step=plan.step, emitted_us=0)
                sampled[index] = self.outputs[index].tokens[-1]
                if reason is not None:
                    ended[index] = reason
        self.ended.update(ended)
        return sampled, ended


def arrivals_of(
    requests: Sequence[GenerationRequest], ticks: Sequence[int], leaves: Mapping[int, int] | None = None
) -> list[Arrival]:
    """Let requests arrive at ticks; `leaves` cancels some."""
    return [
        Arrival(
            index=index,
            tick=tick,
            prompt=request.prompt,
            max_tokens=request.sampling.max_tokens,
            tenant=request.tenant,
            salt=request.cache_salt,
            leaves=None if leaves is None else leaves.get(index),
            priority=request.priority,
            deadline_us=None if request.deadline_us is None else tick * TICK_US + request.deadline_us,
            now_us=tick * TICK_US,
        )
        for index, (request, tick) in enumerate(zip(requests, ticks, strict=True))
    ]


def record_steps(
    model: Any,
    scheduling: SchedulingManifest,
    requests: Sequence[GenerationRequest],
    ticks: Sequence[int],
    *,
    leaves: Mapping[int, int] | None = None,
) -> Recording:
    """Run requests that arrive at exact ticks, and return what an engine would have left behind."""
    answers = RealAnswers(model, scheduling, requests)
    settings = settings_for(scheduling, model.executor)
    arrivals = arrivals_of(requests, ticks, leaves)
    plans = [plan for _, plan in Simulation(settings, answers).run(arrivals)]
    results = [
        GenerationResult(
            sequence_id=request.sequence_id,
            tokens=tuple(answers.outputs[index].tokens),
            records=tuple(answers.outputs[index].records),
            finish_reason=answers.ended[index],  # type: ignore[arg-type]
            queue_us=0,
            prefill_us=0,
            decode_us=0,
            first_token_us=None,
            prompt_tokens=len(request.prompt),
            cached_tokens=answers.cached.get(index, 0),
            steps=tuple(answers.steps.get(index, ())),
            preemptions=answers.preemptions.get(index, 0),
            cancel_origin="caller" if answers.ended[index] == "cancelled" else None,
        )
        for index, request in enumerate(requests)
    ]
    entries = [SequenceEntry(index, request.sequence_id) for index, request in enumerate(requests)]
    return Recording(list(requests), results, plans, entries, ListRecorder())

"""Who turns requests into steps?  One thread: take arrivals, plan, run the calls, choose tokens, record, hand out.

The order of a step stands in `Engine._step`.  Nothing a single request does can end the loop: a request that cannot fit
is refused at the door, a failing call fails its own rows, a raising callback cancels its own sequence.
"""

from __future__ import annotations

import asyncio
import heapq
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from manifests.scheduling import SchedulingManifest
from runtime.backends.protocol import Executor, Floats
from runtime.engine.containment import ContainedCalls
from runtime.engine.errors import EngineFailed, SequenceRefused, given_up
from runtime.engine.generation import FinishReason, GenerationRequest, GenerationResult, OnToken
from runtime.engine.grammar import GrammarCompiler, TextTokenizer
from runtime.engine.live import Handle, LiveSequence, LoopDelivery, monotonic_us
from runtime.engine.pace import Pace
from runtime.engine.plan import Call, Refusal, StepPlan
from runtime.engine.recording import EngineJournal, EventRecorder, StepTimes
from runtime.engine.runner import CallRunner
from runtime.engine.sampling import Scratch
from runtime.engine.scheduler import check_fits, complete_step, new_state, plan_step, submit, withdraw
from runtime.engine.sequence import check_request, choose_for, start_output
from runtime.engine.settings import settings_for
from traces.failures import ClassifiedError


class Model(Protocol):
    """What is needed of a loaded package."""

    @property
    def executor(self) -> Executor: ...
    @property
    def tokenizer(self) -> TextTokenizer | None: ...


class _Message(NamedTuple):
    """To the engine's thread: a new sequence, or (with an origin) the wish to end one."""

    sequence: LiveSequence
    origin: str | None = None


class Engine:
    """A live engine over one loaded package; a GenerationService."""

    def __init__(
        self,
        model: Model,
        scheduling: SchedulingManifest,
        recorder: EventRecorder,
        engine_id: str | None = None,
        *,
        clock: Callable[[], int] = monotonic_us,
    ) -> None:
        executor = model.executor
        self.engine_id = engine_id or scheduling.engine_id
        self.settings = settings_for(scheduling, executor)
        self._vocab_size = executor.config.vocab_size
        self._clock = clock
        self._grammars = GrammarCompiler(model.tokenizer, vocab_size=self._vocab_size)
        self._journal = EngineJournal(recorder, engine_id=self.engine_id)
        self._runner = CallRunner(executor, self.settings, clock=clock)
        self._scratch = Scratch()
        self._pace = Pace()
        self._state = new_state(self.settings)
        self._live: dict[int, LiveSequence] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._arrived = 0
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._closed = False
        self._drain = False
        self._failure: EngineFailed | None = None
        self._journal.started(scheduling, self.settings, backend=executor.backend, precision=executor.precision)
        self._thread = threading.Thread(target=self._run, name=f"engine-{self.engine_id}", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_token: OnToken | None = None) -> Handle:
        """Queue a request; `on_token` is called on the engine's thread and must be quick.

        Raises SequenceRefused when it can never fit or the engine is closed, SamplingRefused or GrammarRefused when the
        request is malformed, EngineFailed when the engine has stopped.
        """
        check_request(request, vocab_size=self._vocab_size)
        check_fits(self.settings, len(request.prompt), request.sampling.max_tokens)
        output = start_output(request, self._grammars)
        sequence = LiveSequence(request, output, on_token=on_token, submitted_us=self._clock())
        sequence.input_ref = self._journal.store(request.encode())
        with self._door:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise SequenceRefused("the engine is closed", reason="engine_closed", fix="send it to a live engine")
            self._inbox.put(_Message(sequence))
        return Handle(sequence, self._ask_end)

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        """Generate one sequence; `on_token` is called on the event loop.  A cancelled caller cancels the sequence."""
        delivery = None if on_token is None else LoopDelivery(asyncio.get_running_loop(), on_token)
        handle = self.submit(request, delivery)
        try:
            result = await handle.result()
        except asyncio.CancelledError:
            handle.cancel("caller")
            raise
        if delivery is not None:
            delivery.flush()
        return result

    def close(self, *, drain: bool = False) -> None:
        """Stop; unfinished sequences are cancelled with origin `engine_closed`, or finished first with `drain`."""
        with self._door:
            if not self._closed:
                self._closed, self._drain = True, drain
                self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_end(self, sequence: LiveSequence, origin: str) -> None:
        self._inbox.put(_Message(sequence, origin))

    def _run(self) -> None:
        closing = False
        try:
            while True:
                closing = self._take_messages(wait=not self._state.has_work and not closing) or closing
                if closing and not self._drain:
                    for sequence in tuple(self._live.values()):
                        sequence.cancel_origin = "engine_closed"
                        self._finish(sequence, "cancelled")
                self._pass_deadlines()
                if self._state.has_work:
                    self._step()
                elif closing and self._inbox.empty():
                    return
        except BaseException as error:  # a defect of ours: nobody may wait for ever on an engine that is gone
            with self._door:
                self._failure = EngineFailed(f"the engine stopped: {error!r}", reason="engine_stopped")
            self._abandon(self._failure)

    def _abandon(self, failure: EngineFailed) -> None:
        for sequence in self._live.values():
            sequence.future.set_exception(failure)
        self._live.clear()
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None and message.origin is None:
                message.sequence.future.set_exception(failure)

    def _take_messages(self, *, wait: bool) -> bool:
        """Take what has arrived, waiting for the first if asked; True when the engine is to close."""
        closing = False
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            wait = False
            if message is None:
                closing = True
            elif message.origin is None:
                self._enter(message.sequence)
            elif not message.sequence.future.done():
                message.sequence.cancel_origin = message.origin
                self._finish(message.sequence, "cancelled")
        return closing

    def _enter(self, sequence: LiveSequence) -> None:
        request = sequence.request
        sequence.index = self._arrived
        try:
            submit(
                self._state,
                sequence.index,
                prompt=request.prompt,
                max_tokens=request.sampling.max_tokens,
                tenant=request.tenant,
                salt=request.cache_salt,
                priority=request.priority,
                deadline_us=sequence.deadline_us,
                now_us=sequence.submitted_us,
            )
        except SequenceRefused as refusal:
            self._turn_away(sequence, refusal)
            return
        self._arrived += 1
        self._live[sequence.index] = sequence
        if sequence.deadline_us is not None:
            heapq.heappush(self._deadlines, (sequence.deadline_us, sequence.index))
        self._journal.admitted(
            sequence.index, request, submitted_us=sequence.submitted_us, input_ref=sequence.input_ref
        )

    def _turn_away(self, sequence: LiveSequence, refusal: SequenceRefused) -> None:
        """Refuse a sequence at the door; it never was in the queue."""
        excess = refusal.evidence.get("excess")
        if excess is not None:
            refusal.evidence["retry_after_us"] = self._pace.wait_us(self._clock(), **excess)
        refusal.evidence["deadline_us"] = sequence.request.deadline_us
        self._journal.refused(sequence.request, refusal, input_ref=sequence.input_ref)
        sequence.future.set_exception(refusal)

    def _pass_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            sequence = self._live.get(heapq.heappop(self._deadlines)[1])
            if sequence is not None:
                self._finish(sequence, "deadline")

    def _step(self) -> None:
        times = StepTimes(self._clock())
        plan, self._state = plan_step(self._state, now_us=times.started_us, step_us=self._pace.shortest_step_us)
        for refusal in plan.refusals:
            self._give_up(refusal)
        self._runner.apply(plan)
        self._note_admissions(plan, times.started_us)
        tokens_of = {sequence.index: sequence.tokens for sequence in self._state.running}
        times.plan_us = self._clock() - times.started_us
        sampled: dict[int, int] = {}
        ended: list[tuple[LiveSequence, FinishReason]] = []
        calls = ContainedCalls(plan, self.settings)
        for call in calls:
            try:
                logits, took = self._runner.execute(call, tokens_of)
                times.calls_us.append(took)
                self._choose(call, logits, plan.step, sampled, ended)
            except Exception as error:  # contained: the rows of this call fail, everything else goes on
                if not calls.replace(error):
                    self._fail_rows(call, error, sampled)
        plan = calls.plan()
        complete_step(self._state, plan, sampled)
        times.total_us = self._clock() - times.started_us
        if plan.calls:
            self._pace.stepped(times.started_us, times.total_us)
        kv_blocks = self.settings.num_blocks - self._state.cache.available
        self._journal.stepped(
            plan, times, queue_depth=len(self._state.waiting), kv_blocks=kv_blocks, sampled=len(sampled)
        )
        for sequence, reason in ended:
            if not sequence.future.done():
                self._finish(sequence, reason)

    def _note_admissions(self, plan: StepPlan, now_us: int) -> None:
        for preemption in plan.preemptions:
            self._live[preemption.sequence].preemptions += 1
        if plan.admissions:
            known = sum(admission.known for admission in plan.admissions)
            self._pace.admitted(now_us, sequences=len(plan.admissions), tokens=known)
        for admission in plan.admissions:
            sequence = self._live[admission.sequence]
            if sequence.first_step_us is None:
                sequence.first_step_us = now_us
                sequence.cached_tokens = len(admission.hits) * self.settings.block_size

    def _give_up(self, refusal: Refusal) -> None:
        """Fail a sequence that the scheduler refused after it had been accepted."""
        sequence = self._live[refusal.sequence]
        failure = given_up(
            refusal.reason,
            queue_depth=len(self._state.waiting),
            free_blocks=self._state.cache.available,
            deadline_us=sequence.request.deadline_us,
            preemptions=sequence.preemptions,
        )
        self._finish(sequence, "error", failure)

    def _choose(
        self,
        call: Call,
        logits: Floats,
        step: int,
        sampled: dict[int, int],
        ended: list[tuple[LiveSequence, FinishReason]],
    ) -> None:
        """Choose the next token of every sampling row, hand it out, and note which sequences end with it."""
        live = [self._live[index] for index in call.sequences]
        for sequence in live:
            sequence.steps.append(step)
        if call.silent:
            rows = [row for row in range(len(live)) if row not in call.silent]
            if not rows:
                return
            live, logits = [live[row] for row in rows], logits[rows]
        choices = choose_for([sequence.output for sequence in live], logits, scratch=self._scratch)
        now_us = self._clock()
        for row, sequence in enumerate(live):
            if sequence.first_token_us is None:
                sequence.first_token_us = now_us
            output = sequence.output
            reason = output.accept(choices, row, step=step, emitted_us=now_us - sequence.submitted_us)
            sampled[sequence.index] = output.tokens[-1]
            if reason is not None:
                ended.append((sequence, reason))
            if sequence.on_token is not None:
                self._hand_out(sequence)

    def _hand_out(self, sequence: LiveSequence) -> None:
        try:
            if sequence.on_token is not None:
                sequence.on_token(sequence.output.records[-1])
        except Exception:  # the receiver is gone or broken; only its own sequence suffers
            sequence.on_token = None
            self._ask_end(sequence, "token_callback_failed")

    def _fail_rows(self, call: Call, error: Exception, sampled: dict[int, int]) -> None:
        failure = (
            error
            if isinstance(error, ClassifiedError)
            else EngineFailed(
                f"a step failed: {error!r}", reason="step_failed", evidence={"error_class": type(error).__name__}
            )
        )
        for index in call.sequences:
            sampled.pop(index, None)
            sequence = self._live.get(index)
            if sequence is not None:
                self._finish(sequence, "error", failure)

    def _finish(self, sequence: LiveSequence, reason: FinishReason, failure: ClassifiedError | None = None) -> None:
        """End a sequence, once: free its blocks, record its result, release whoever waits."""
        now_us = self._clock()
        withdraw(self._state, sequence.index, reason=reason)
        self._runner.drop(sequence.index)
        del self._live[sequence.index]
        error = None if failure is None else failure.failure_class.value
        result = sequence.result(reason, now_us=now_us, error=error)
        self._journal.finished(sequence.index, sequence.request, result, total_us=now_us - sequence.submitted_us)
        if failure is None:
            sequence.future.set_result(result)
        else:
            sequence.future.set_exception(failure)

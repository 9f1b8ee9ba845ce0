"""What happens in one step?  Plan, calls, tokens, receivers, accounts, record: for one engine's live sequences.

The order stands in `Stepper.step`.  Nothing a single request does can end a step: a failing call fails its own rows, a
raising receiver cancels its own sequence, one that falls behind holds its own sequence up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from runtime.backends.protocol import Floats
from runtime.engine.account import CallTimes, settle_step
from runtime.engine.containment import ContainedCalls
from runtime.engine.deadlines import Deadlines
from runtime.engine.errors import SequenceRefused, given_up, step_failure
from runtime.engine.generation import FinishReason
from runtime.engine.live import LiveSequence
from runtime.engine.pace import Pace
from runtime.engine.plan import Call, Refusal, StepPlan
from runtime.engine.recording import EngineJournal, StepTimes
from runtime.engine.runner import CallRunner
from runtime.engine.sampling import Peaks, Scratch
from runtime.engine.scheduler import complete_step, hold, new_state, plan_step, resume, submit, withdraw
from runtime.engine.sequence import choose_for
from runtime.engine.settings import Settings
from traces.failures import ClassifiedError


class Stepper:
    """The engine as its thread sees it; no other thread may touch it.

    tell: called to have a sequence ended (with an origin) or resumed (None), on this thread or a reader's.
    """

    def __init__(
        self,
        settings: Settings,
        runner: CallRunner,
        journal: EngineJournal,
        *,
        clock: Callable[[], int],
        tell: Callable[[LiveSequence, str | None], None],
    ) -> None:
        self.state = new_state(settings)
        self.live: dict[int, LiveSequence] = {}
        self.ignore_readers = False
        """Whether sequences go on however far behind their readers are."""
        self._settings = settings
        self._runner = runner
        self._journal = journal
        self._clock = clock
        self._tell = tell
        self._scratch = Scratch()
        self._pace = Pace()
        self._deadlines = Deadlines()
        self._slow: list[LiveSequence] = []
        self._arrived = 0

    @property
    def has_work(self) -> bool:
        """Whether another step would do anything."""
        return self.state.has_work

    def patience_us(self) -> int | None:
        """Microseconds until the next deadline; None where no live sequence has one."""
        next_us = self._deadlines.next_us(self.live)
        return None if next_us is None else max(0, next_us - self._clock())

    def enter(self, sequence: LiveSequence) -> None:
        """Queue a sequence, or turn it away."""
        request = sequence.request
        sequence.index = self._arrived
        try:
            submit(
                self.state,
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
        self.live[sequence.index] = sequence
        if sequence.deadline_us is not None:
            self._deadlines.add(sequence.deadline_us, sequence.index)
            self._deadlines.sweep(self.live, len(self.live))
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

    def pass_deadlines(self) -> None:
        """End every sequence whose deadline has come, with what it has."""
        for index in self._deadlines.passed(self._clock()):
            sequence = self.live.get(index)
            if sequence is not None:
                self.finish(sequence, "deadline")

    def cancel(self, sequence: LiveSequence, origin: str) -> None:
        """End a sequence early, wherever it is; one that has ended stays as it is."""
        if not sequence.future.done():
            sequence.cancel_origin = origin
            self.finish(sequence, "cancelled")

    def step(self) -> None:
        """Plan, run the calls, choose tokens, hand them out, account, record."""
        times = StepTimes(self._clock())
        plan, self.state = plan_step(self.state, now_us=times.started_us, step_us=self._pace.shortest_step_us)
        for refusal in plan.refusals:
            self._give_up(refusal)
        self._runner.apply(plan)
        self._note_admissions(plan, times.started_us)
        tokens_of = {sequence.index: sequence.tokens for sequence in self.state.running}
        times.plan_us = self._clock() - times.started_us
        sampled: dict[int, int] = {}
        ended: list[tuple[LiveSequence, FinishReason]] = []
        calls = ContainedCalls(plan, self._settings)
        for call in calls:
            began_us = self._clock()
            try:
                logits, peaks, took = self._runner.execute(call, tokens_of)
                times.calls.append(CallTimes(call, took))
                self._choose(times.calls[-1], logits, peaks, plan.step, sampled, ended)
            except Exception as error:  # contained: the rows of this call fail, everything else goes on
                if not calls.replace(error):
                    self._fail_rows(call, error, sampled, times, began_us)
        plan = calls.plan()
        complete_step(self.state, plan, sampled)
        self._account(plan, times, sampled=len(sampled))
        for sequence, reason in ended:
            if not sequence.future.done():
                self.finish(sequence, reason)
        self._hold_slow()

    def _account(self, plan: StepPlan, times: StepTimes, *, sampled: int) -> None:
        """Say where the step's time went: to its sequences, to the pace, and to the record."""
        now_us = self._clock()
        times.total_us = now_us - times.started_us
        settle_step(times.calls, self.live, [one.index for one in self.state.running], now_us=now_us)
        if plan.calls:
            self._pace.stepped(times.started_us, times.total_us)
        kv_blocks = self._settings.num_blocks - self.state.cache.available
        self._journal.stepped(plan, times, queue_depth=len(self.state.waiting), kv_blocks=kv_blocks, sampled=sampled)

    def _note_admissions(self, plan: StepPlan, now_us: int) -> None:
        for preemption in plan.preemptions:
            evicted = self.live[preemption.sequence]
            evicted.preemptions += 1
            evicted.account.evict(now_us, discarded=preemption.discarded)
        if plan.admissions:
            known = sum(admission.known for admission in plan.admissions)
            self._pace.admitted(now_us, sequences=len(plan.admissions), tokens=known)
        for admission in plan.admissions:
            sequence = self.live[admission.sequence]
            cached = len(admission.hits) * self._settings.block_size
            sequence.account.admit(now_us, cached=cached)
            if sequence.first_step_us is None:
                sequence.first_step_us = now_us
                sequence.cached_tokens = cached

    def _give_up(self, refusal: Refusal) -> None:
        """Fail a sequence that the scheduler refused after it had been accepted."""
        sequence = self.live[refusal.sequence]
        failure = given_up(
            refusal.reason,
            queue_depth=len(self.state.waiting),
            free_blocks=self.state.cache.available,
            deadline_us=sequence.request.deadline_us,
            preemptions=sequence.preemptions,
        )
        self.finish(sequence, "error", failure)

    def _choose(
        self,
        times: CallTimes,
        logits: Floats,
        peaks: Peaks,
        step: int,
        sampled: dict[int, int],
        ended: list[tuple[LiveSequence, FinishReason]],
    ) -> None:
        """Choose the next token of every sampling row, hand it out, and note which sequences end with it."""
        began_us, call = self._clock(), times.call
        known = self.live
        live = [known[index] for index in call.sequences]
        for sequence in live:
            sequence.steps.append(step)
        if call.silent:
            rows = [row for row in range(len(live)) if row not in call.silent]
            if not rows:
                return
            live, logits, peaks = [live[row] for row in rows], logits[rows], peaks.of(rows)
        choices = choose_for([sequence.output for sequence in live], logits, found=peaks, scratch=self._scratch)
        now_us = self._clock()
        for row, sequence in enumerate(live):
            if sequence.first_token_us is None:
                sequence.first_token_us = now_us
            output = sequence.output
            reason = output.accept(choices, row, step=step, emitted_us=now_us - sequence.submitted_us)
            sampled[sequence.index] = output.tokens[-1]
            if reason is not None:
                ended.append((sequence, reason))
        self._hand_out(live, times, began_us)

    def _hand_out(self, live: list[LiveSequence], times: CallTimes, began_us: int) -> None:
        """Give each receiver its token; what a receiver takes its time for is its own sequence's time."""
        before_us = self._clock()
        times.chose_us = before_us - began_us
        limit = self._settings.max_undelivered_tokens
        for sequence in live:
            if sequence.on_token is None:
                continue
            if sequence.flow is not None and sequence.flow.put() > (limit or 0) and limit is not None:
                self._slow.append(sequence)
            try:
                sequence.on_token(sequence.output.records[-1])
            except Exception:  # the receiver is gone or broken; only its own sequence suffers
                sequence.on_token = None
                self._tell(sequence, "token_callback_failed")
            after_us = self._clock()
            times.receivers[sequence.index] = after_us - before_us
            times.gave_us += after_us - before_us
            before_us = after_us

    def _hold_slow(self) -> None:
        """Pass over the sequences whose readers fell too far behind, until half of that is read."""
        slow, self._slow = self._slow, []
        most = (self._settings.max_undelivered_tokens or 0) // 2
        for sequence in slow:
            flow = sequence.flow
            if flow is None or sequence.future.done() or self.ignore_readers:
                continue
            if flow.when_behind_at_most(most, partial(self._tell, sequence, None)):
                hold(self.state, sequence.index)
                sequence.account.hold(self._clock())
                sequence.held = True

    def resume(self, sequence: LiveSequence) -> None:
        """Let a sequence go on whose reader caught up."""
        if sequence.held and not sequence.future.done():
            sequence.held = False
            running = self.state.find(sequence.index) is not None
            resume(self.state, sequence.index)
            sequence.account.resume(self._clock(), running=running)

    def _fail_rows(
        self, call: Call, error: Exception, sampled: dict[int, int], times: StepTimes, began_us: int
    ) -> None:
        now_us = self._clock()
        if not times.calls or times.calls[-1].call is not call:
            times.calls.append(CallTimes(call, now_us - began_us))
        lost = {index: self.live[index] for index in call.sequences if index in self.live}
        settle_step(times.calls, lost, (), now_us=now_us)
        for index, sequence in lost.items():
            sampled.pop(index, None)
            self.finish(sequence, "error", step_failure(error))

    def finish(self, sequence: LiveSequence, reason: FinishReason, failure: ClassifiedError | None = None) -> None:
        """End a sequence, once: free its blocks, record its result, release whoever waits."""
        now_us = self._clock()
        withdraw(self.state, sequence.index, reason=reason)
        self._runner.drop(sequence.index)
        del self.live[sequence.index]
        result = sequence.result(reason, now_us=now_us, failure=failure)
        self._journal.finished(sequence.index, sequence.request, result, total_us=now_us - sequence.submitted_us)
        if failure is None:
            sequence.future.set_result(result)
        else:
            sequence.future.set_exception(failure)

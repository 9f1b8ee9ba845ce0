"""Who turns requests into steps?  One thread: take arrivals, plan, run the calls, choose tokens, record, hand out.

What a step does stands in `stepping`.  Nothing a single request does can end the loop: a request that cannot fit is
refused at the door, and a step contains the failures of its own sequences.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from manifests.scheduling import SchedulingManifest
from runtime.backends.protocol import Executor
from runtime.engine.errors import EngineFailed, SequenceRefused
from runtime.engine.flow import Flow, MeteredReceiver
from runtime.engine.generation import GenerationRequest, GenerationResult, OnToken
from runtime.engine.grammar import GrammarCompiler, TextTokenizer
from runtime.engine.live import Handle, LiveSequence, LoopDelivery, monotonic_us
from runtime.engine.recording import EngineJournal, EventRecorder
from runtime.engine.runner import CallRunner
from runtime.engine.scheduler import check_fits
from runtime.engine.sequence import check_request, start_output
from runtime.engine.settings import settings_for
from runtime.engine.stepping import Stepper


class Model(Protocol):
    """What is needed of a loaded package."""

    @property
    def executor(self) -> Executor: ...
    @property
    def tokenizer(self) -> TextTokenizer | None: ...


class _Message(NamedTuple):
    """To the engine's thread: a new sequence, or (with an origin) the wish to end one, or that its reader caught up."""

    sequence: LiveSequence
    origin: str | None = None
    new: bool = False


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
        runner = CallRunner(executor, self.settings, clock=clock)
        self._stepper = Stepper(self.settings, runner, self._journal, clock=clock, tell=self._tell)
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._closed = False
        self._drain = False
        self._failure: EngineFailed | None = None
        self._journal.started(scheduling, self.settings, backend=executor.backend, precision=executor.precision)
        self._thread = threading.Thread(target=self._run, name=f"engine-{self.engine_id}", daemon=True)
        self._thread.start()

    def submit(
        self, request: GenerationRequest, on_token: OnToken | None = None, *, flow: Flow | None = None
    ) -> Handle:
        """Queue a request; `on_token` is called on the engine's thread and must be quick.

        flow: says how far the reader is behind; where the pins limit that, the sequence waits for it.

        Raises SequenceRefused when it can never fit or the engine is closed, SamplingRefused or GrammarRefused when the
        request is malformed, EngineFailed when the engine has stopped.
        """
        check_request(request, vocab_size=self._vocab_size)
        check_fits(self.settings, len(request.prompt), request.sampling.max_tokens)
        output = start_output(request, self._grammars)
        sequence = LiveSequence(request, output, on_token=on_token, submitted_us=self._clock(), flow=flow)
        sequence.input_ref = self._journal.store(request.encode())
        with self._door:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise SequenceRefused("the engine is closed", reason="engine_closed", fix="send it to a live engine")
            self._inbox.put(_Message(sequence, new=True))
        return Handle(sequence, self._tell)

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        """Generate one sequence; `on_token` is called on the event loop.  A cancelled caller cancels the sequence.

        A `MeteredReceiver` says how far its reader is behind.
        """
        delivery = None if on_token is None else LoopDelivery(asyncio.get_running_loop(), on_token)
        flow = on_token.flow if isinstance(on_token, MeteredReceiver) else None
        handle = self.submit(request, delivery, flow=flow)
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

    def _tell(self, sequence: LiveSequence, origin: str | None) -> None:
        self._inbox.put(_Message(sequence, origin))

    def _run(self) -> None:
        stepper, closing = self._stepper, False
        try:
            while True:
                closing = self._take_messages(wait=not stepper.has_work and not closing) or closing
                if closing:
                    self._wind_up()
                stepper.pass_deadlines()
                if stepper.has_work:
                    stepper.step()
                elif closing and self._inbox.empty():
                    return
        except BaseException as error:  # a defect of ours: nobody may wait for ever on an engine that is gone
            with self._door:
                self._failure = EngineFailed(f"the engine stopped: {error!r}", reason="engine_stopped")
            self._abandon(self._failure)

    def _take_messages(self, *, wait: bool) -> bool:
        """Take what has arrived, waiting for the first if asked; True when the engine is to close."""
        stepper, closing = self._stepper, False
        while wait or not self._inbox.empty():
            patience_us = stepper.patience_us() if wait else None
            try:
                message = self._inbox.get(timeout=None if patience_us is None else patience_us / 1_000_000)
            except queue.Empty:  # the deadline of a sequence that waits for its reader
                return closing
            wait = False
            if message is None:
                closing = True
            elif message.new:
                stepper.enter(message.sequence)
            elif message.origin is None:
                stepper.resume(message.sequence)
            else:
                stepper.cancel(message.sequence, message.origin)
        return closing

    def _wind_up(self) -> None:
        """End everything, or with `drain` let everything run to its end, whether it is read or not."""
        self._stepper.ignore_readers = True
        for sequence in tuple(self._stepper.live.values()):
            if self._drain:
                self._stepper.resume(sequence)
            else:
                self._stepper.cancel(sequence, "engine_closed")

    def _abandon(self, failure: EngineFailed) -> None:
        for sequence in self._stepper.live.values():
            sequence.future.set_exception(failure)
        self._stepper.live.clear()
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None and message.new:
                message.sequence.future.set_exception(failure)

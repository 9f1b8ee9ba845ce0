"""What does a live engine keep of one sequence, and how does its caller hold it?"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from runtime.engine.account import Account
from runtime.engine.flow import Flow
from runtime.engine.generation import FinishReason, GenerationRequest, GenerationResult, OnToken, TokenRecord
from runtime.engine.sequence import Output
from traces.failures import ClassifiedError


def monotonic_us() -> int:
    """The default clock."""
    return time.monotonic_ns() // 1_000


class LiveSequence:
    """One submitted request until it ends.  All times are monotonic microseconds."""

    __slots__ = (
        "account",
        "cached_tokens",
        "cancel_origin",
        "first_step_us",
        "first_token_us",
        "flow",
        "future",
        "held",
        "index",
        "input_ref",
        "on_token",
        "output",
        "preemptions",
        "request",
        "steps",
        "submitted_us",
    )

    def __init__(
        self,
        request: GenerationRequest,
        output: Output,
        *,
        on_token: OnToken | None,
        submitted_us: int,
        flow: Flow | None = None,
    ) -> None:
        self.index = 0
        self.account = Account(submitted_us)
        self.flow = flow
        self.held = False
        """Passed over until its reader has caught up."""
        self.request = request
        self.output = output
        self.on_token = on_token
        self.submitted_us = submitted_us
        self.input_ref: str | None = None
        self.first_step_us: int | None = None
        self.first_token_us: int | None = None
        self.cached_tokens = 0
        self.preemptions = 0
        self.steps: list[int] = []
        self.cancel_origin: str | None = None
        self.future: Future[GenerationResult] = Future()
        self.future.set_running_or_notify_cancel()

    @property
    def deadline_us(self) -> int | None:
        """When the engine gives up."""
        allowed = self.request.deadline_us
        return None if allowed is None else self.submitted_us + allowed

    @property
    def has_output(self) -> bool:
        """Whether a token was chosen."""
        return self.first_token_us is not None

    def result(self, reason: FinishReason, *, now_us: int, failure: ClassifiedError | None = None) -> GenerationResult:
        """Sum up the sequence at its end; queue, prefill and decode add up to its whole time."""
        first_step = now_us if self.first_step_us is None else self.first_step_us
        first_token = now_us if self.first_token_us is None else self.first_token_us
        return GenerationResult(
            sequence_id=self.request.sequence_id,
            tokens=tuple(self.output.tokens),
            records=tuple(self.output.records),
            finish_reason=reason,
            queue_us=first_step - self.submitted_us,
            prefill_us=first_token - first_step,
            decode_us=now_us - first_token,
            first_token_us=None if self.first_token_us is None else self.first_token_us - self.submitted_us,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            steps=tuple(self.steps),
            preemptions=self.preemptions,
            error=None if failure is None else failure.failure_class.value,
            cancel_origin=self.cancel_origin,
            latency=self.account.close(now_us, by_itself=reason in ("stop", "length")),
            error_type=None if failure is None else failure.error_type,
        )


class Handle:
    """A caller's hold on a submitted request; any thread may use it."""

    def __init__(self, sequence: LiveSequence, cancel: Callable[[LiveSequence, str], None]) -> None:
        self._sequence = sequence
        self._cancel = cancel

    @property
    def sequence_id(self) -> str:
        """The request's sequence id."""
        return self._sequence.request.sequence_id

    @property
    def done(self) -> bool:
        """Whether the sequence has ended."""
        return self._sequence.future.done()

    async def result(self) -> GenerationResult:
        """Wait for the end; raises the ClassifiedError of a sequence that failed."""
        return await asyncio.shield(asyncio.wrap_future(self._sequence.future))

    def wait(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the end in a thread without an event loop; raises TimeoutError, or the sequence's error."""
        return self._sequence.future.result(timeout_s)

    def cancel(self, origin: str = "caller") -> None:
        """Ask for an early end; blocks are free before the next step, the result says `cancelled` and who asked."""
        self._cancel(self._sequence, origin)


class LoopDelivery:
    """Hands tokens from the engine's thread to a callback on an event loop, one wake-up for all that wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_token: OnToken) -> None:
        self._loop = loop
        self._on_token = on_token
        self._pending: deque[TokenRecord] = deque()
        self._awake = False

    def __call__(self, record: TokenRecord) -> None:
        self._pending.append(record)
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self.flush)

    def flush(self) -> None:
        """Call back for everything that waits; runs on the event loop."""
        self._awake = False  # before draining: what arrives from now on asks for another wake-up
        while self._pending:
            self._on_token(self._pending.popleft())

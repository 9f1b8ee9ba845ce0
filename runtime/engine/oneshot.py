"""Who runs one-shot requests?  Instances in threads of their own, fed by the dynamic batcher; one answer a request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray
from safetensors.numpy import save

from runtime.backends.one_shot import OneShotExecutor, array_digest
from runtime.backends.tensor_contract import Arrays
from runtime.engine.assembly import cut, most_rows, of_request, padded_rows, place, rows_of, shape_of
from runtime.engine.batching import Batch, BatchingSettings, Waiting, decide
from runtime.engine.errors import EngineFailed, SequenceRefused, step_failure
from runtime.engine.recording import EventRecorder
from runtime.errors import DeadlineExceeded, RequestCancelled
from traces.failures import ClassifiedError, TelemetryPersistenceError

Status = Literal["ok", "error", "cancelled", "deadline"]


@dataclass(frozen=True, kw_only=True)
class OneShotResult:
    """What became of a request; the four parts of its time add up to the whole."""

    request_ref: str
    status: Status
    outputs: dict[str, NDArray[Any]] | None
    failure: ClassifiedError | None
    queue_us: int
    """Until a batch took it."""
    batch_us: int
    """Until the batch was assembled."""
    compute_us: int
    """Until its instance had answered."""
    delivery_us: int
    """Until the answer was handed over; waiting for earlier requests counts here."""
    batch: int | None
    """Number of the call that it was in; None if none took it."""
    batch_size: int | None
    instance: int | None

    @property
    def total_us(self) -> int:
        """From arrival to hand-over."""
        return self.queue_us + self.batch_us + self.compute_us + self.delivery_us

    def output_digests(self) -> dict[str, str]:
        """Name every output by dtype, shape and bytes."""
        return {name: array_digest(value) for name, value in sorted((self.outputs or {}).items())}


@dataclass
class _Request:
    """A request on its way; times on the monotonic clock."""

    waiting: Waiting
    ref: str
    inputs: Arrays
    deadline_us: int | None
    future: Future[OneShotResult]
    taken_us: int | None = None
    started_us: int | None = None
    finished_us: int | None = None
    cancelled: bool = False
    done: bool = False
    batch: int | None = None
    size: int | None = None
    padded: int | None = None
    offset: int | None = None
    instance: int | None = None
    outputs: dict[str, NDArray[Any]] | None = None
    failure: ClassifiedError | None = None


class OneShotEngine:
    """Answers one-shot requests of one package, on one executor an instance."""

    def __init__(
        self,
        executors: Sequence[OneShotExecutor],
        settings: BatchingSettings,
        *,
        recorder: EventRecorder | None = None,
        engine_id: str = "one-shot",
        package: str = "",
        clock: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        if len(executors) != settings.instance_count:
            raise ValueError(f"{settings.instance_count} instances need as many executors, not {len(executors)}")
        self.contract = executors[0].contract
        self._accepts = of_request(self.contract)
        self._settings, self._clock = settings, clock
        self._recorder, self._engine_id = recorder, engine_id
        self._changed = threading.Condition()
        self._delivering = threading.Lock()
        self._queue: list[_Request] = []
        self._open: list[_Request] = []
        self._arrived = self._batches = self._recent_us = 0
        self._closing = False
        self._most = min(settings.max_batch_size, most_rows(self.contract))
        self._emit("oneshot.started", {"package": package, "settings": settings.document()})
        self._threads = [
            threading.Thread(target=self._work, args=(instance, executor), name=f"one-shot-{instance}", daemon=True)
            for instance, executor in enumerate(executors)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, inputs: Arrays, *, request_ref: str, deadline_us: int | None = None) -> Future[OneShotResult]:
        """Queue a request; its future always ends with a result, once.

        Args:
            inputs: named arrays that satisfy the package's contract.
            request_ref: names the request in the record.
            deadline_us: how long it may take, from now.
        Raises InputRefused where the inputs break the contract; SequenceRefused where the queue is full or the engine
        closes, or where the request has more rows than a call.
        """
        sizes = self._accepts.check(inputs)
        rows, now = rows_of(self.contract, sizes), self._clock()
        with self._changed:
            self._check_room(rows)
            waiting = Waiting(self._arrived, now, rows, shape_of(self.contract, sizes))
            limit = None if deadline_us is None else now + deadline_us
            request = _Request(waiting, request_ref, inputs, limit, Future())
            self._arrived += 1
            self._queue.append(request)
            self._open.append(request)
            self._changed.notify_all()
        return request.future

    def cancel(self, request_ref: str) -> bool:
        """End a request that waits, or drop the answer of one that runs; False where it has ended or is unknown."""
        with self._changed:
            found = next((one for one in self._open if one.ref == request_ref and not one.done), None)
            if found is None or found.cancelled:
                return False
            found.cancelled = True
            if found in self._queue:
                self._queue.remove(found)
                found.done = True
        self._deliver()
        return True

    def close(self) -> None:
        """Answer what is queued, then end the instances."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _check_room(self, rows: int) -> None:
        full = len(self._queue) >= self._settings.max_queue_size
        if not (self._closing or full or rows > self._most):
            return
        reason = "engine_closed" if self._closing else "batch_too_large" if rows > self._most else "queue_full"
        calls = -(-len(self._queue) // (self._most * self._settings.instance_count))
        retry = calls * max(self._recent_us, self._settings.max_queue_delay_microseconds, 1000)
        text = {
            "engine_closed": "The engine is closing.",
            "batch_too_large": f"A request of {rows} rows is larger than a batch of {self._most}.",
            "queue_full": f"{len(self._queue)} requests are waiting already.",
        }
        raise SequenceRefused(
            text[reason],
            reason=reason,
            evidence={
                "queue_depth": len(self._queue),
                "reservation_failure": reason,
                "retry_after_us": retry if reason == "queue_full" else None,
            },
            fix="send fewer rows at once" if reason == "batch_too_large" else "try again later, or add instances",
        )

    def _work(self, instance: int, executor: OneShotExecutor) -> None:
        while True:
            taken = self._take(instance)
            if taken is not None:
                self._run(executor, *taken)
            self._deliver()
            with self._changed:
                if self._closing and not self._queue:
                    return

    def _take(self, instance: int) -> tuple[Batch, list[_Request]] | None:
        """Wait for a batch of this instance; None where requests ended without one, or the engine closes."""
        with self._changed:
            while True:
                now = self._clock()
                if self._drop_late(now) or (self._closing and not self._queue):
                    return None
                queue = [one.waiting for one in self._queue]
                decision = decide(queue, now, free=1, settings=self._rules())
                if decision.batches:
                    return self._claim(decision.batches[0], instance, now)
                wait = None if decision.wake_us is None else max(0, decision.wake_us - now) / 1e6
                limits = [one.deadline_us - now for one in self._queue if one.deadline_us is not None]
                due = None if not limits else max(0, min(limits)) / 1e6
                self._changed.wait(min((one for one in (wait, due) if one is not None), default=None))

    def _rules(self) -> BatchingSettings:
        if not self._closing and self._most == self._settings.max_batch_size:
            return self._settings
        delay = 0 if self._closing else self._settings.max_queue_delay_microseconds
        sizes = tuple(size for size in self._settings.preferred_batch_size if size <= self._most)
        return BatchingSettings(
            max_batch_size=self._most, preferred_batch_size=sizes, max_queue_delay_microseconds=delay
        )

    def _drop_late(self, now: int) -> bool:
        late = [one for one in self._queue if one.deadline_us is not None and now >= one.deadline_us]
        for one in late:
            self._queue.remove(one)
            one.done = True
            one.failure = _too_late("in the queue")
        return bool(late)

    def _claim(self, batch: Batch, instance: int, now: int) -> tuple[Batch, list[_Request]]:
        wanted = set(batch.requests)
        members = [one for one in self._queue if one.waiting.index in wanted]
        self._queue = [one for one in self._queue if one.waiting.index not in wanted]
        for one in members:
            one.taken_us, one.batch, one.size, one.instance = now, self._batches, batch.size, instance
            one.offset, one.padded = batch.offset(one.waiting.index), padded_rows(self.contract, batch.size)
        self._batches += 1
        return batch, members

    def _run(self, executor: OneShotExecutor, batch: Batch, members: list[_Request]) -> None:
        padded = padded_rows(self.contract, batch.size)
        outputs: Arrays | None = None
        failure: ClassifiedError | None = None
        started = self._clock()
        try:
            rows = [(one.offset or 0, one.inputs) for one in members]
            call = place(self.contract, rows, padded=padded, shape=batch.shape)
            started = self._clock()
            outputs = executor.run(call)
        except Exception as error:  # whatever it was, every member must end
            failure = step_failure(error)
        finished = self._clock()
        with self._changed:
            self._recent_us = finished - started
            for one in members:
                one.started_us, one.finished_us, one.failure, one.done = started, finished, failure, True
                if outputs is not None:
                    offset, count = one.offset or 0, one.waiting.rows
                    one.outputs = cut(self.contract, outputs, offset=offset, rows=count)
        self._emit(
            "oneshot.batch",
            {
                "batch": members[0].batch,
                "requests": batch.requests,
                "rows": batch.rows,
                "shape": batch.shape,
                "due": batch.due,
                "padded": padded,
                "instance": members[0].instance,
                "failed": failure is not None,
            },
            batch_size=batch.size,
            duration_us=finished - started,
        )

    def _deliver(self) -> None:
        """Hand over what has ended, in order of arrival where that is asked for."""
        with self._delivering:
            with self._changed:
                ready: list[_Request] = []
                for one in self._open:
                    if one.done:
                        ready.append(one)
                    elif self._settings.preserve_ordering:
                        break
                self._open = [one for one in self._open if one not in ready]
            for one in ready:
                result = _result(one, self._clock())
                self._record(one, result)
                one.future.set_result(result)

    def _record(self, request: _Request, result: OneShotResult) -> None:
        self._emit(
            "oneshot.request",
            {
                "index": request.waiting.index,
                "batch": request.batch,
                "offset": request.offset,
                "padded": request.padded,
                "shape": request.waiting.shape,
                "instance": request.instance,
                "queue_us": result.queue_us,
                "batch_us": result.batch_us,
                "compute_us": result.compute_us,
                "delivery_us": result.delivery_us,
                "outputs": result.output_digests(),
                **({"error": result.failure.to_payload()} if result.failure else {}),
            },
            request_ref=request.ref,
            duration_us=result.total_us,
            batch_size=result.batch_size,
            status=result.status if result.status != "deadline" else "error",
            failure_class=None if result.failure is None else result.failure.failure_class.value,
            input_ref=self._store(request.inputs),
            result_ref=None if result.outputs is None else self._store(result.outputs),
        )

    def _store(self, arrays: Arrays) -> str | None:
        if self._recorder is None:
            return None
        try:
            return self._recorder.put_blob(save(dict(arrays)))
        except TelemetryPersistenceError:
            return None

    def _emit(self, event_type: str, payload: dict[str, Any], **columns: Any) -> None:
        if self._recorder is not None:
            self._recorder.emit(event_type, payload=payload, track="B", engine_id=self._engine_id, **columns)


def _result(request: _Request, now: int) -> OneShotResult:
    """Close the account: what a request did not reach takes no time."""
    taken = now if request.taken_us is None else request.taken_us
    started = taken if request.started_us is None else request.started_us
    finished = started if request.finished_us is None else request.finished_us
    failure, status = request.failure, "ok"
    if request.cancelled:
        failure, status = RequestCancelled("The caller cancelled the request.", reason="cancelled"), "cancelled"
    elif isinstance(failure, DeadlineExceeded) or (request.deadline_us is not None and finished > request.deadline_us):
        failure, status = failure or _too_late("while it was computed"), "deadline"
    elif failure is not None or request.outputs is None:
        failure, status = failure or EngineFailed("the call gave no answer", reason="step_failed"), "error"
    return OneShotResult(
        request_ref=request.ref,
        status=status,
        outputs=request.outputs if status == "ok" else None,
        failure=failure,
        queue_us=taken - request.waiting.arrival_us,
        batch_us=started - taken,
        compute_us=finished - started,
        delivery_us=now - finished if request.taken_us is not None else 0,
        batch=request.batch,
        batch_size=request.size,
        instance=request.instance,
    )


def _too_late(where: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The deadline passed {where}.", reason="deadline", fix="allow more time, or send it when less is waiting"
    )

"""When is each request sent, and what becomes of those under way when a person stops the run?

Arrival times are kept whatever the answers do (an open loop): a slow server gets its requests on time all the same.
How late a request was really sent is measured, because a late client would hide the server's queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from experiments.workloads import ActivatePackage, Workload, WorkloadRequest

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Sent(Generic[Answer]):
    """One request that was sent.

    lag_us  how much later than its arrival time it was sent
    answer  what came back; None when it was cancelled before an answer
    error   what was raised instead of an answer
    """

    request: WorkloadRequest
    lag_us: int
    answer: Answer | None
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Time as the player needs it: microseconds that only grow, and a way to wait until a moment."""

    now_us: Callable[[], int]
    sleep_us: Callable[[int], Awaitable[Any]]


def loop_clock() -> Clock:
    """Return the clock of the running event loop."""
    loop = asyncio.get_running_loop()
    return Clock(now_us=lambda: int(loop.time() * 1_000_000), sleep_us=lambda us: asyncio.sleep(us / 1_000_000))


async def play(
    workload: Workload,
    *,
    submit: Callable[[WorkloadRequest], Awaitable[Answer]],
    activate: Callable[[ActivatePackage], Awaitable[None]],
    speed: float = 1.0,
    stop: asyncio.Event | None = None,
    on_sent: Callable[[], None] = lambda: None,
    on_done: Callable[[Sent[Answer]], None] = lambda sent: None,
    clock: Clock | None = None,
) -> list[Sent[Answer]]:
    """Send every item of the workload at its time and return the requests in order of arrival.

    Args:
        workload: what is sent.
        submit: sends one request and returns its answer; cancelled when the run is stopped.
        activate: carries out a control; later requests wait for it, those under way do not.
        speed: 2 sends everything in half the time.
        stop: set from outside to send nothing more and cancel what is under way.
        on_sent: called when a request is sent.
        on_done: called when a request has its answer, an error or was cancelled.
        clock: time; the event loop's own when None.
    """
    time = clock or loop_clock()
    stopped = stop or asyncio.Event()
    start = time.now_us()
    under_way: list[asyncio.Task[Sent[Answer]]] = []
    for item in workload.items:
        due = start + round(item.at_us / speed)
        if not await _wait_until(due, time, stopped):
            break
        if isinstance(item, ActivatePackage):
            await activate(item)
            continue
        on_sent()
        under_way.append(asyncio.create_task(_one(item, due, time, submit, on_done)))
    await _finish(under_way, stopped)
    return [task.result() for task in under_way]


async def _wait_until(due: int, time: Clock, stopped: asyncio.Event) -> bool:
    """Wait for a moment; return False at once when the run is stopped."""
    left = due - time.now_us()
    if left <= 0:
        await asyncio.sleep(0)  # requests under way get their turn even when the client is late
        return not stopped.is_set()
    sleeping = asyncio.ensure_future(time.sleep_us(left))
    stopping = asyncio.ensure_future(stopped.wait())
    await asyncio.wait({sleeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for waiter in (sleeping, stopping):
        waiter.cancel()
    return not stopped.is_set()


async def _finish(under_way: list[asyncio.Task[Sent[Answer]]], stopped: asyncio.Event) -> None:
    """Wait for all answers; when the run is stopped, cancel what is left and wait for its end."""
    stopping = asyncio.ensure_future(stopped.wait())
    pending: set[asyncio.Future[Any]] = {task for task in under_way if not task.done()}
    while pending and not stopping.done():
        _, pending = await asyncio.wait({*pending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        pending.discard(stopping)
    stopping.cancel()
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)


async def _one(
    request: WorkloadRequest,
    due_us: int,
    time: Clock,
    submit: Callable[[WorkloadRequest], Awaitable[Answer]],
    on_done: Callable[[Sent[Answer]], None],
) -> Sent[Answer]:
    """Send one request; its failure is an outcome of the run, not the end of it."""
    lag_us = max(0, time.now_us() - due_us)  # here, not where the task was made: a busy loop begins it later
    try:
        sent = Sent(request=request, lag_us=lag_us, answer=await submit(request))
    except asyncio.CancelledError:
        sent = Sent[Answer](request=request, lag_us=lag_us, answer=None)
    except Exception as error:
        sent = Sent[Answer](request=request, lag_us=lag_us, answer=None, error=error)
    on_done(sent)
    return sent

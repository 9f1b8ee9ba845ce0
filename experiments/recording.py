"""How does a workload go through a serving session, so that a run is left in the ledger?"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.arrivals import Sent, play
from experiments.errors import WorkloadError
from experiments.workloads import ActivatePackage, Workload, WorkloadRequest

if TYPE_CHECKING:
    from runtime.engine.generation import TokenRecord
    from runtime.prepare.store import PackageStore
    from runtime.serve.deployment import Deployment
    from runtime.serve.services import Outcome
    from runtime.serve.session import ServingSession


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One request's outcome and how its tokens came.

    generations  the chunks of each generation, one after another (an answer after a tool call is a new one): when the
                 chunk came, in microseconds after the request was sent, and how many tokens it carried
    """

    outcome: Outcome
    generations: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def first_token_us(self) -> int | None:
        """When the first token came, in microseconds after the request was sent; None without a token."""
        return self.generations[0][0][0] if self.generations else None


@dataclass(kw_only=True)
class Recording:
    """What a recorded run left behind, beside the ledger.

    wall_us   from the first arrival until the last answer
    stopped   whether a person ended it early
    dropped   optional events that the recorder could not take
    """

    run_id: str
    sent: list[Sent[Answered]] = field(default_factory=list[Sent[Answered]])
    wall_us: int = 0
    stopped: bool = False
    dropped: int = 0


async def record_workload(
    workload: Workload,
    *,
    ledger: Path,
    deployment: Deployment,
    store: PackageStore,
    threads: int = 1,
    speed: float = 1.0,
    label: str = "",
    on_sent: Callable[[], None] = lambda: None,
    on_done: Callable[[Sent[Answered]], None] = lambda sent: None,
) -> Recording:
    """Serve the deployment, play the workload into it, and return what came of it.

    Errors: ClassifiedError when the deployment cannot be served; a request's own failure is part of the result.
    """
    from runtime.prepare.load import load_package
    from runtime.probe import probe
    from runtime.serve.session import ServingSession

    loop = asyncio.get_running_loop()
    keys = deployment.keys()
    session = ServingSession(
        ledger,
        deployment,
        load=lambda package: load_package(store, package, threads=threads),
        hardware=probe(threads=threads),
        label=label,
    )
    recording = Recording(run_id=session.run_id)
    stop = asyncio.Event()
    async with session:
        with _interrupted_by(stop):
            start = loop.time()
            recording.sent = await play(
                workload,
                submit=lambda request: _submit(session, request, keys),
                activate=lambda control: _activate(session, control, store),
                speed=speed,
                stop=stop,
                on_sent=on_sent,
                on_done=on_done,
            )
            recording.wall_us = int((loop.time() - start) * 1_000_000)
        recording.stopped = stop.is_set()
    recording.dropped = session.recorder.dropped
    return recording


def envelope_of(request: WorkloadRequest) -> dict[str, Any]:
    """Return the request envelope, as JSON values, that asks what a workload's line asks."""
    task: dict[str, Any] = {"kind": "support", "question": request.question}
    if request.prompt_tokens is not None:
        task = {"kind": "completion", "prompt_tokens": list(request.prompt_tokens)}
    generation = dict(request.generation)
    for name in ("temperature", "top_p"):
        if name in generation:
            generation[name] = _decimal(generation[name])
    envelope: dict[str, Any] = {"tenant": request.tenant, "actor": f"{request.tenant}-client", "task": task}
    if request.conversation is not None:
        envelope["conversation"] = request.conversation
    if request.deadline_us is not None:
        envelope["timeout_us"] = request.deadline_us
    if request.priority is not None:
        envelope["priority"] = request.priority
    if request.route is not None:
        envelope["model"] = {"route": request.route}
    return envelope | {"generation": generation}


async def _submit(session: ServingSession, request: WorkloadRequest, keys: Mapping[str, str]) -> Answered:
    import json

    body = json.dumps(envelope_of(request)).encode()
    chunks = TokenChunks()
    outcome = await session.run(body, keys.get(request.tenant), on_token=chunks.add)
    return Answered(outcome=outcome, generations=chunks.seen())


class TokenChunks:
    """Notes when tokens come: those of one wake-up of the event loop are one chunk, as a stream would send them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._generations: list[list[list[int]]] = []
        self._next_position: int | None = None
        self._open = False

    def add(self, record: TokenRecord) -> None:
        """Note a token; one that does not continue the last one's sequence begins another generation."""
        if record.position != self._next_position:
            self._generations.append([])
            self._open = False
        self._next_position = record.position + 1
        if not self._open:
            self._generations[-1].append([int((self._loop.time() - self._begun) * 1_000_000), 0])
            self._open = True
            self._loop.call_soon(self._close)
        self._generations[-1][-1][1] += 1

    def _close(self) -> None:
        self._open = False

    def seen(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Return when each chunk came and how many tokens it carried, by generation."""
        return tuple(tuple((at, count) for at, count in chunks) for chunks in self._generations)


async def _activate(session: ServingSession, control: ActivatePackage, store: PackageStore) -> None:
    """Carry out a control; a package that cannot be activated leaves the one before it, which the run records."""
    from traces.failures import ClassifiedError

    with suppress(ClassifiedError):
        await session.activate(control.route, store.resolve(control.package))


def check_controls(workload: Workload, deployment: Deployment, store: PackageStore, *, path: Path) -> None:
    """Refuse controls that name no route or no package, before anything runs."""
    from traces.failures import ClassifiedError

    for item in workload.items:
        if not isinstance(item, ActivatePackage):
            continue
        if deployment.document.route(item.route) is None:
            known = ", ".join(route.name for route in deployment.document.routes)
            raise WorkloadError(f"no route is called {item.route!r}", path=path, fix=f"The routes are: {known}.")
        try:
            store.resolve(item.package)
        except ClassifiedError as error:
            raise WorkloadError(str(error), path=path, fix=error.fix) from None


@contextmanager
def _interrupted_by(stop: asyncio.Event) -> Generator[None]:
    """Turn the first Ctrl-C into an orderly stop; a second one ends the process as usual."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or no signals on this loop
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _decimal(value: Any) -> Any:
    """Write a number as text: floats are not hashed."""
    return value if isinstance(value, str) else repr(value)

"""How is a backend that can take its process down kept from taking ours?  An executor whose steps run in a child.

The parent checks the contract, writes the inputs into shared memory, and waits; keys and values stay in memory of the
parent's that the child maps read-only.  A child that dies or hangs is a classified failure of one call, and the next
call finds a new child over the same pools, until it dies too often.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import msgspec

from runtime.backends.contract import InputContract, Integers
from runtime.backends.errors import BackendError, BackendRefused, InputRefused, InstanceRefused
from runtime.backends.hosted_memory import HostedPool, SharedBlock, StepViews
from runtime.backends.hosted_process import Hosting, HostProcess
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput
from runtime.models.config import ModelConfig

_SMALLEST_ARENA = 1 << 20


class HostedExecutor:
    """A package loaded in a child process; steps are made one at a time."""

    hosted = True

    def __init__(self, backend: str, package: Path, spec: LoadSpec, hosting: Hosting) -> None:
        self.backend, self.hosting = backend, hosting
        self._package, self._spec = package, spec
        self._turn = threading.Lock()
        self._arena = SharedBlock("arena", _SMALLEST_ARENA)
        self._pools = 0
        self._dropped: list[int] = []
        self._mapped: set[int] = set()
        self._steps = 0
        self._deaths: list[int] = []
        """The number of completed steps at each death."""
        self._closed = False
        self._process: HostProcess | None = None
        self._stored = "float32"
        self._contract = spec.contract
        self._views = StepViews(config=spec.config, stored=self._stored)
        self._start()

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._spec.config

    @property
    def precision(self) -> str:
        """Working precision of weights, cache and activations."""
        return self._spec.precision

    @property
    def contract(self) -> InputContract:
        """What a step's inputs must satisfy."""
        return self._contract

    @property
    def threads(self) -> int:
        """Compute threads of a step."""
        return self._spec.threads

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def deaths(self) -> int:
        """How often the child was lost."""
        return len(self._deaths)

    def new_pool(self, num_slots: int) -> HostedPool:
        """Allocate a zeroed pool in shared memory."""
        self._pools += 1
        pool = HostedPool(self._pools, num_slots, config=self.config, stored=self._stored)
        weakref.finalize(pool, self._dropped.append, pool.number)
        return pool

    def step(
        self,
        tokens: Integers,
        positions: Integers,
        slots: Integers,
        context_lengths: Integers,
        pool: KVPool,
        *,
        last: Integers | None = None,
    ) -> StepOutput:
        """Check the inputs here, then run the step in the child; see `Executor.step`.

        Errors besides the backend's own: `HostDied`, `HostOutOfMemory`, `HostTimedOut`, `InstanceRefused`.
        """
        self._contract.check(tokens, positions, slots, context_lengths, num_slots=pool.num_slots, last=last)
        if not isinstance(pool, HostedPool) or not 0 < pool.number <= self._pools:
            raise InputRefused(
                "step input pool: not a pool of this executor",
                fix="allocate the pool with new_pool",
                evidence={"input_signature": type(pool).__name__, "guard": "pool kind"},
            )
        shape = (tokens.shape[0], tokens.shape[1], slots.shape[1])
        with self._turn:
            process = self._living()
            self._map_pool(process, pool)
            arrays = self._arrays(shape)
            for place, value in zip(arrays[:4], (tokens, positions, slots, context_lengths), strict=True):
                place[...] = value
            dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
            wanted = None if last is None else last.tolist()
            message = {"do": "step", "shape": shape, "pool": pool.number, "dropped": dropped, "last": wanted}
            self._ask(process, message, deadline_us=self.hosting.step_deadline_us, what="step", shape=shape)
            self._steps += 1
            # Copied: the next step writes into the same memory.
            answered, *new = arrays[4:]
            logits = (answered if last is None else answered[:, :1]).copy()
            new_k, new_v = (place.copy() for place in new)
        return StepOutput(logits, new_k, new_v)

    def close(self) -> None:
        """End the child; pools stay readable as long as somebody holds them."""
        with self._turn:
            self._closed = True
            if self._process is not None:
                self._process.close()
                self._process = None
            self._arena.close()

    def _arrays(self, shape: tuple[int, int, int]) -> list[Any]:
        if self._arena.grow(self._views.layout(shape).size):
            self._views.forget()
        return self._views.arrays(shape, self._arena.memory)

    def _living(self) -> HostProcess:
        """Give a child that runs, starting another where the last one is gone; refuse when too many are."""
        if self._closed:
            raise BackendRefused("the executor has been closed", fix="load the package again")
        if self._process is not None and not self._process.alive:  # died while nothing was asked of it
            self._lost(self._process.death({"what": "nothing"}))
        if self._process is None:
            recent = [at for at in self._deaths if at >= self._steps - self.hosting.calm_steps]
            if len(recent) >= self.hosting.max_deaths:
                raise InstanceRefused(
                    f"the process that hosts {self.backend} was lost {len(recent)} times in "
                    f"{self._steps - recent[0]} completed steps; it is not started again",
                    fix="activate another package on the route; the evidence of each death is recorded",
                    evidence={
                        "provider": self.backend,
                        "attempt": len(recent),
                        "error_class": "instance_refused",
                        "device_state": "hosting process not started",
                        "output_completeness": "none",
                    },
                )
            self._start()
        if self._process is None:
            raise BackendRefused("the hosting process did not start", fix="load the package again")
        return self._process

    def _start(self) -> None:
        process = HostProcess(self.backend, threads=self._spec.threads)
        self._process, self._mapped = process, set()
        message = {
            "do": "load",
            "backend": self.backend,
            "package": str(self._package),
            "spec": msgspec.json.encode(self._spec).decode(),
            "memory_bytes": self.hosting.memory_bytes,
        }
        try:
            told = self._ask(
                process,
                message,
                self._arena.descriptor(),
                deadline_us=self.hosting.load_deadline_us,
                what="load",
            )
        except BackendError:
            process.close()
            self._process = None
            raise
        self._stored = told["stored"]
        self._views = StepViews(config=self.config, stored=self._stored)
        self._contract = InputContract.from_document(told["contract"])

    def _map_pool(self, process: HostProcess, pool: HostedPool) -> None:
        if pool.number in self._mapped:
            return
        message = {"do": "pool", "number": pool.number, "slots": pool.num_slots, "shape": pool.shape}
        descriptors = [block.descriptor() for block in pool.blocks]
        self._ask(process, message, *descriptors, deadline_us=self.hosting.load_deadline_us, what="pool")
        self._mapped.add(pool.number)

    def _ask(
        self, process: HostProcess, message: dict[str, Any], *descriptors: int, deadline_us: int, **doing: Any
    ) -> dict[str, Any]:
        try:
            return process.ask(message, descriptors, deadline_us=deadline_us, doing=doing)
        except BackendError as error:
            if error.LOST_INSTANCE:
                self._lost(error)
            if doing["what"] == "load":
                error.stage = error.stage or "a08"
            raise

    def _lost(self, error: BackendError) -> None:
        self._deaths.append(self._steps)
        error.evidence |= {"attempt": len(self._deaths), "model": str(self._package.name)}
        self._process = None


def load_hosted(backend: str, package: Path, spec: LoadSpec, hosting: Hosting) -> HostedExecutor:
    """Load a verified package folder in a process of its own; a load that dies there is a classified failure here."""
    return HostedExecutor(backend, package, spec, hosting)

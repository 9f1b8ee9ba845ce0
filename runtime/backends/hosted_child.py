"""How does a backend run where its death costs nobody else?  The child: loads one package, steps on shared memory.

Run as `python -m runtime.backends.hosted_child DESCRIPTOR`; the descriptor is its end of the parent's socket pair.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import resource
import select
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.backends.errors import (
    CAPACITY_SIGNS,
    BackendError,
    BackendRefused,
    CapacityExhausted,
    classify_execution,
)
from runtime.backends.hosted_channel import Channel, inherited
from runtime.backends.hosted_memory import STORED, StepViews
from runtime.backends.protocol import Executor, KVPool, LoadSpec
from traces.failures import ClassifiedError


class Host:
    """One loaded package and the memory it shares with the parent."""

    def __init__(self) -> None:
        self._executor: Executor | None = None
        self._stored = "float32"
        self._views: StepViews
        self._pools: dict[int, KVPool] = {}
        self._arena: mmap.mmap | None = None
        self._arena_descriptor = -1
        self._hard_limit = False

    def load(self, message: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Load the package under the memory limit; say what its pools hold and what its contract is."""
        from runtime.backends.registry import backend_named

        (self._arena_descriptor,) = descriptors
        backend = backend_named(message["backend"])
        backend.import_loader()
        if message["memory_bytes"] is not None:
            self._hard_limit = True
            _raise_limit(_address_space() + int(message["memory_bytes"]))
        spec = msgspec.json.decode(message["spec"], type=LoadSpec)
        try:
            self._executor = executor = backend.load(Path(message["package"]), spec)
            self._stored = stored_kind(executor.new_pool(2))
        except Exception as error:
            raise out_of_memory(error, message["backend"]) or error from error
        self._views = StepViews(config=executor.config, stored=self._stored)
        return {"stored": self._stored, "contract": executor.contract.document()}

    def pool(self, message: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Map a pool of the parent's, for reading only."""
        executor = self._loaded()
        dtype, shape = STORED[self._stored], tuple(message["shape"])
        size = int(np.prod(shape)) * dtype.itemsize
        if self._hard_limit:
            _raise_limit(resource.getrlimit(resource.RLIMIT_AS)[0] + 4 * size)
        pool: Any = executor.new_pool(message["slots"])
        tables: list[NDArray[Any]] = []
        for descriptor in descriptors:
            mapped = mmap.mmap(descriptor, max(size, 1), prot=mmap.PROT_READ)
            os.close(descriptor)
            tables.append(np.frombuffer(mapped, dtype=dtype, count=size // dtype.itemsize).reshape(shape))
        pool.adopt(*tables)
        self._pools[message["number"]] = pool
        return {}

    def step(self, message: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Run one step on the inputs in the arena and leave its outputs there."""
        executor = self._loaded()
        for number in message["dropped"]:
            self._pools.pop(number, None)
        batch, tokens, context = message["shape"]
        shape = (batch, tokens, context)
        if self._arena is None or len(self._arena) < self._views.layout(shape).size:
            self._arena = mmap.mmap(self._arena_descriptor, os.fstat(self._arena_descriptor).st_size)
            self._views.forget()
        token_ids, positions, slots, lengths, *places = self._views.arrays(shape, self._arena)
        last = None if message["last"] is None else np.array(message["last"], dtype=np.int64)
        output = executor.step(token_ids, positions, slots, lengths, self._pools[message["pool"]], last=last)
        places[0][:, : output.logits.shape[1]] = output.logits
        for place, value in zip(places[1:], (output.new_k, output.new_v), strict=True):
            place[...] = as_stored(value)
        return {}

    def _loaded(self) -> Executor:
        if self._executor is None:
            raise BackendRefused("nothing is loaded", fix="load a package first")
        return self._executor


def stored_kind(pool: Any) -> str:
    """Tell how a backend's pool stores numbers; refuse one that cannot read tables of another process."""
    if not hasattr(pool, "adopt"):
        raise BackendRefused(
            f"a {type(pool).__name__} cannot read memory of another process",
            fix="load the package without isolation",
            evidence={"operator_details": type(pool).__name__},
        )
    kind = str(pool.k.dtype).removeprefix("torch.")
    if kind not in STORED:
        raise BackendRefused(f"a pool of {kind} cannot be shared", fix="load the package without isolation")
    return kind


def as_stored(value: Any) -> NDArray[Any]:
    """View a step's output as the arena holds it."""
    if isinstance(value, np.ndarray):
        return value
    if str(value.dtype) == "torch.bfloat16":
        import torch

        return value.view(torch.uint16).numpy()
    return value.numpy()


def out_of_memory(error: BaseException, backend: str) -> CapacityExhausted | None:
    """Find a memory limit behind a refused load: loaders wrap the allocator's words."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{seen} {getattr(seen, 'evidence', '')}"
        if isinstance(seen, MemoryError) or any(sign in text for sign in CAPACITY_SIGNS):
            return CapacityExhausted(
                f"{backend} ran out of memory while loading",
                fix="raise the memory limit of the hosting process, or prepare a smaller model",
                evidence={"memory_pressure": text[:500], "reservation_failure": "load"},
                stage="a08",
            )
        seen = seen.__cause__ or seen.__context__
    return None


def serve(channel: Channel) -> None:
    """Answer the parent until it hangs up."""
    host = Host()
    verbs = {"load": host.load, "pool": host.pool, "step": host.step}
    backend = ""
    while (received := channel.receive()) is not None:
        message, descriptors = received
        backend = message.get("backend", backend)
        try:
            channel.send({"done": verbs[message["do"]](message, descriptors)})
        except ClassifiedError as error:
            channel.send({"failed": _shortened(error)})
        except Exception as error:  # contained: whatever a backend raises is told, and the process goes on
            channel.send({"failed": _shortened(classify_execution(error, backend))})


def main(arguments: list[str]) -> int:
    """Serve the parent at the other end of the inherited descriptor."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    descriptor = int(arguments[0])
    threading.Thread(target=_follow_parent, args=(descriptor,), name="parent-watch", daemon=True).start()
    serve(inherited(descriptor))
    return 0


def _follow_parent(descriptor: int) -> None:
    """End at once when the parent does, even in the middle of a step that hangs."""
    watch = select.poll()
    watch.register(descriptor, select.POLLHUP)
    watch.poll()
    os._exit(0)


def _shortened(error: ClassifiedError) -> dict[str, Any]:
    return {
        "message": error.message[:2000],
        "error_type": error.error_type if isinstance(error, BackendError) else "backend_refused",
        "fix": error.fix,
        "stage": error.stage,
        "evidence": {name: _cut(value) for name, value in error.evidence.items()},
    }


def _cut(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int) else str(value)[:2000]


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _raise_limit(size: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

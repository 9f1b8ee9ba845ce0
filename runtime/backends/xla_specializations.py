"""Which compiled shapes does a loaded package hold, and may it compile another one now?

Ahead of time, every bucket comes with the package and nothing is ever compiled.  Lazily, a bucket is compiled at its
first use: so many compiles at once, so many shapes held, every one of them kept as an event.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from runtime.backends.errors import InputRefused
from runtime.backends.protocol import CompileEvent


class FixedSizes(Protocol):
    """What names a compiled shape: hashable, with a name of its own."""

    @property
    def name(self) -> str: ...


Shape = TypeVar("Shape", bound=FixedSizes)


class Specializations(Generic[Shape]):
    """Executables by shape; safe to share between threads."""

    def __init__(
        self,
        ready: Mapping[Shape, Any],
        *,
        compile_bucket: Callable[[Shape], Any] | None,
        cache_key: Callable[[Shape], str],
        limit: int,
        concurrency: int,
        evict: bool,
    ) -> None:
        """Hold `ready`; with `compile_bucket` None a missing bucket is a defect of the package and is refused."""
        self._ready: OrderedDict[Shape, Any] = OrderedDict(ready)
        self._compile, self._cache_key = compile_bucket, cache_key
        self._limit, self._evict = limit, evict
        self._lock = threading.Lock()
        self._turn = threading.Semaphore(concurrency)
        self._underway: dict[Shape, threading.Event] = {}
        self._events: list[CompileEvent] = []

    def events(self) -> tuple[CompileEvent, ...]:
        """Give every compile so far, in order."""
        with self._lock:
            return tuple(self._events)

    def held(self) -> tuple[Shape, ...]:
        """List the buckets that are compiled now, least recently used first."""
        with self._lock:
            return tuple(self._ready)

    def get(self, bucket: Shape) -> Any:
        """Give a bucket's executable, compiling it where that is allowed.

        Raises InputRefused where the package compiles nothing or holds its limit already; whatever compiling raises.
        """
        while True:
            with self._lock:
                found = self._ready.get(bucket)
                if found is not None:
                    self._ready.move_to_end(bucket)
                    return found
                other = self._underway.get(bucket)
                if other is None:
                    compile_bucket = self._admitted(bucket)
                    self._underway[bucket] = threading.Event()
                    break
            other.wait()  # another thread compiles this bucket; look again when it is done
        return self._make(bucket, compile_bucket)

    def _admitted(self, bucket: Shape) -> Callable[[Shape], Any]:
        if self._compile is None:
            raise self._refused(bucket, "its executables were all made ahead of time", "none: nothing is compiled")
        if self._evict or len(self._ready) + len(self._underway) < self._limit:
            return self._compile
        raise self._refused(bucket, f"it holds its limit of {self._limit} shapes", "none: on_limit=refuse")

    def _make(self, bucket: Shape, compile_bucket: Callable[[Shape], Any]) -> Any:
        evicted: Shape | None = None
        try:
            with self._turn:
                start = time.perf_counter_ns()
                made = compile_bucket(bucket)
                spent = (time.perf_counter_ns() - start) // 1000
            with self._lock:
                self._ready[bucket] = made
                if len(self._ready) > self._limit:
                    evicted, _ = self._ready.popitem(last=False)
                self._events.append(
                    CompileEvent(
                        shape=bucket.name,
                        cache_key=self._cache_key(bucket),
                        duration_us=spent,
                        evicted=evicted.name if evicted else None,
                    )
                )
        finally:
            with self._lock:
                self._underway.pop(bucket).set()
        return made

    def _refused(self, bucket: Shape, why: str, fallback: str) -> InputRefused:
        held = ", ".join(entry.name for entry in self._ready)
        return InputRefused(
            f"the shape {bucket.name} is not compiled and the package compiles no more: {why}",
            fix="prepare with specialization=ahead, a larger max_specializations, or on_limit=evict",
            evidence={
                "input_signature": bucket.name,
                "guard": f"held: {held}",
                "cache_key": self._cache_key(bucket),
                "compile_event": f"refused; {len(self._events)} compiled so far",
                "selected_fallback": fallback,
            },
        )

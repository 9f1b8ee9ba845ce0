"""How does the functional step run in ExecuTorch?  A program file whose methods read torch pools in place."""

from __future__ import annotations

import io
import os
import re
import resource
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import finalize

import numpy as np
import psutil
import torch

from runtime.backends.errors import BackendRefused, CapacityExhausted
from runtime.backends.executor import StepInputs
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput
from runtime.backends.torch_executor import TorchExecutor, hold_threads

PROGRAM = "step.pte"
MAGIC = b"ET12"
"""The file identifier at offset 4; with another one the runtime would end the process."""
DECODE, PREFILL = "decode", "prefill"
"""Methods of few tokens a row and of few rows: planned for the largest sizes, both dimensions at once need ten times
the memory."""
WHOLE = "forward"
"""The only method of a package that was prepared with `methods=single`."""
ARENA = "arena_bytes"
"""The compiler manifest's flag that tells how much memory the plan of all methods takes."""


TELLING = re.compile(r"missing|not found|not registered|don't have|invalid|fail|error", re.IGNORECASE)
"""Lines of ExecuTorch's log that name a fault; beside them it lists every kernel that it has."""


class ThreadPool:
    """The process's one pool of compute threads, which delegates keep pointers into from the time they are loaded."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0

    def hold(self, native: Any, threads: int) -> None:
        """Set the pool's threads for one more program; a pool in use is never made anew, since that would be fatal."""
        with self._lock:
            present = native._threadpool_get_thread_count()
            if present != threads:
                if self._users:
                    raise BackendRefused(
                        f"another ExecuTorch program of this process computes with {present} threads, not {threads}",
                        fix="close it first, or host one of them in a process of its own",
                        evidence={"provider_log": f"thread pool of {present}, {self._users} programs"},
                    )
                native._unsafe_reset_threadpool(threads)
            self._users += 1

    def release(self) -> None:
        """Count a program that is gone."""
        with self._lock:
            self._users -= 1


THREADS = ThreadPool()


class ExecutorchExecutor(TorchExecutor[Any]):
    """A loaded program; a corrupted one can end the process, so digests and inputs are checked before every call."""

    backend = "executorch"

    def device_memory(self) -> dict[str, int]:
        """Tell the planned arena of all methods, which is allocated with them."""
        return {ARENA: int(self.spec.flags.get(ARENA, "0"))}

    def run(self, loaded: Any, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Call the method for the shape: rows of one token together, rows of many tokens one by one."""
        tokens, positions, k_pool, v_pool, slots, lengths = self.tensors(inputs, pool)
        hold_threads(self.threads)
        if WHOLE in loaded.method_names():
            outputs = loaded.run_method(WHOLE, (tokens, positions, k_pool, v_pool, slots, lengths))
        elif tokens.shape[1] == 1:
            outputs = loaded.run_method(DECODE, (tokens, positions, k_pool, v_pool, slots, lengths))
        else:
            rows: list[Any] = []
            for row in range(len(tokens)):
                one = slice(row, row + 1)
                small = (tokens[one], positions[one], k_pool, v_pool, slots[one], lengths[one])
                rows.append(loaded.run_method(PREFILL, small))
            outputs = rows[0] if len(rows) == 1 else [torch.cat(parts, axis) for parts, axis in _places(rows)]
        logits, new_k, new_v = outputs
        return StepOutput(logits.numpy(), new_k, new_v)


def _places(rows: list[Any]) -> list[tuple[list[Any], int]]:
    """Gather each output of the rows, with the axis along which rows lie: logits 0, keys and values 1."""
    return [([row[place] for row in rows], axis) for place, axis in ((0, 0), (1, 1), (2, 1))]


def load_executorch(package: Path, spec: LoadSpec) -> ExecutorchExecutor:
    """Load `step.pte` of a verified package folder and run one token through every method.

    Errors: `CapacityExhausted` before anything is loaded where the memory plan does not fit; `BackendRefused` where the
    file is none, or needs operators or delegates that this runtime lacks.
    """
    executor = ExecutorchExecutor(open_program(package / PROGRAM, threads=spec.threads, flags=spec.flags), spec)
    pool = executor.new_pool(2)  # the smallest that the program admits

    def first_calls() -> None:
        for tokens in (1, min(2, spec.contract.bounds.max_tokens)):
            zeros, none = np.zeros((1, tokens), dtype=np.int64), np.zeros(1, dtype=np.int64)
            executor.step(zeros, zeros, none.reshape(1, 1), none, pool)

    called_once(first_calls)
    return executor


def called_once(first_calls: Callable[[], object]) -> None:
    """Run a program for the first time; a missing operator or delegate shows only then, and is a refusal to load."""
    log: list[str] = []
    try:
        with noted_log(log):
            first_calls()
    except Exception as error:
        raise _refused(error, log) from error


def open_program(path: Path, *, threads: int, flags: Mapping[str, str]) -> Any:
    """Map a program file, after checking that it is one and that its memory plan fits."""
    from executorch.extension.pybindings import _C  # the public module imports the whole compiler

    native: Any = _C
    with path.open("rb") as file:
        head = file.read(8)
    if head[4:8] != MAGIC:
        raise BackendRefused(
            f"{path.name} is not an ExecuTorch program of this version",
            fix="prepare the model again",
            evidence={"provider_log": f"identifier {head[4:8]!r}, expected {MAGIC!r}"},
        )
    check_memory(int(flags.get(ARENA, "0")))
    log: list[str] = []
    with noted_log(log):
        THREADS.hold(native, threads)
    try:
        with noted_log(log):
            module = native._load_for_executorch(str(path))
    except Exception as error:
        THREADS.release()
        raise _refused(error, log) from error
    finalize(module, THREADS.release)
    return module


def check_memory(needed: int) -> None:
    """Refuse a plan beyond the memory that is left: loading it would succeed, and the process would die later."""
    available = psutil.virtual_memory().available
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        available = min(available, max(0, soft - psutil.Process().memory_info().vms))
    if needed > available:
        raise CapacityExhausted(
            f"the program's memory plan takes {needed} bytes, {available} are available",
            fix="prepare the model with smaller bounds: --max-batch, --max-tokens or --max-context",
            evidence={"requested_bytes": needed, "memory_pressure": f"{available} bytes available"},
        )


@contextmanager
def noted_log(lines: list[str]) -> Generator[None]:
    """Add to `lines` what native code writes to standard error: only there does ExecuTorch say what is wrong.

    Parts of it write to the descriptor, parts to Python's stream.
    """
    written = io.StringIO()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            with redirect_stderr(written):
                yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            lines += [*written.getvalue().splitlines(), *held.read().decode(errors="replace").splitlines()]


def _refused(error: Exception, log: list[str]) -> BackendRefused:
    text = str(error).strip().splitlines()
    first = text[0][:300] if text else type(error).__name__
    telling = [line for line in log if TELLING.search(line)]
    return BackendRefused(
        f"ExecuTorch cannot load the program: {first}",
        fix="prepare the model again with this version of ExecuTorch",
        evidence={"provider_log": " ".join([*text, *telling])[:1000], "exception": type(error).__name__},
    )

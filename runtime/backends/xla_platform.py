"""How does this process run XLA?  JAX set up once: 64-bit integers, the CPU only, a pinned number of threads.

XLA's own thread settings do not hold (`--xla_cpu_multi_thread_eigen=false` still starts a pool).  What holds is the
environment variable NPROC while the client is made, and dispatch in the calling thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from runtime.backends.errors import BackendRefused

POOL_THREAD = "tf_XLAEigen"
FLAGS = "XLA_FLAGS"
COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that JAX's monitoring sends for every program that XLA compiles."""
FLAG_CHECK_SECONDS = 120


class CompileCounter:
    """Counts the programs that XLA compiled in this process."""

    def __init__(self) -> None:
        self.count = 0

    def heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Take one event of JAX's monitoring."""
        self.count += event == COMPILED


@cache
def compile_counter() -> CompileCounter:
    """Listen to JAX's monitoring from the first call on."""
    import jax.monitoring

    counter = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter.heard)
    return counter


def client(threads: int) -> Any:
    """Give XLA's client with `threads` compute threads; BackendRefused where this process already has another number.

    A flag in XLA_FLAGS that this version does not know would end the process, so flags are tried in a child first.
    """
    started = _start(threads)
    found = pool_threads()
    if found is not None and found != threads:
        raise BackendRefused(
            f"XLA runs on {found} threads in this process, {threads} were asked for",
            fix="use the same number of threads for every xla package of a process",
            evidence={"runtime_version": f"{found} threads", "validation_output": f"asked {threads}"},
        )
    return started


def pool_threads() -> int | None:
    """Count the threads of XLA's pool as the system shows them; None where it does not show names."""
    names = list(Path("/proc/self/task").glob("*/comm"))
    if not names:
        return None
    return sum(_read(name).startswith(POOL_THREAD) for name in names)


@cache
def _start(threads: int) -> Any:
    check_flags()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # a module would otherwise name the source lines, and so the folders, of whoever called for it
    jax.config.update("jax_traceback_in_locations_limit", 0)
    compile_counter()
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(threads)  # read once, when the client is made
    try:
        return jax.devices("cpu")[0].client
    finally:
        if before is None:
            del os.environ["NPROC"]
        else:
            os.environ["NPROC"] = before


@cache
def check_flags() -> None:
    """Try XLA_FLAGS in a child process: XLA ends the process that holds a flag it does not know."""
    flags = os.environ.get(FLAGS, "")
    if not flags.strip():
        return
    code = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=FLAG_CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _flags_refused(flags, f"no answer in {FLAG_CHECK_SECONDS} s") from error
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "nknown flag" in line), lines[-1] if lines else "no message")
        raise _flags_refused(flags, said)


def _flags_refused(flags: str, said: str) -> BackendRefused:
    return BackendRefused(
        f"XLA refuses XLA_FLAGS={flags!r}: {said[:300]}",
        fix="correct or unset XLA_FLAGS",
        evidence={"provider_log": said[:1000], "operator_details": flags},
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the thread has ended since it was listed
        return ""

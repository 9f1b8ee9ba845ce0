"""What does the parent know of a hosting process?  Its answers, its deadline, and what its death was."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.errors import (
    CAPACITY_SIGNS,
    BackendError,
    HostDied,
    HostOutOfMemory,
    HostTimedOut,
    restored_error,
)
from runtime.backends.hosted_channel import channel_pair

_LOG_TAIL = 1500
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")


ISOLATION = ("none", "faulty", "all")
"""Which packages get a process of their own: none, those whose backend can end it, all."""


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """How a backend is hosted in a process of its own."""

    step_deadline_us: int = 60_000_000
    """A step that takes longer is ended with its process."""
    load_deadline_us: int = 300_000_000
    memory_bytes: int | None = None
    """Address space that the package may take beyond the libraries and the shared pools; None is no limit."""
    max_deaths: int = 6
    """Deaths within the last `calm_steps` completed steps after which the instance is refused."""
    calm_steps: int = 200
    only_faulty: bool = False
    """Host only backends that can end their process; the others are loaded into this one."""

    @classmethod
    def named(cls, isolate: str) -> Hosting | None:
        """Read the choice `none`, `faulty` or `all`."""
        return None if isolate == "none" else cls(only_faulty=isolate == "faulty")


class HostProcess:
    """One child; when it is gone, it is gone: whoever wants another starts another."""

    def __init__(self, backend: str, *, threads: int) -> None:
        self.backend = backend
        self._channel, theirs = channel_pair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._oom_kills = _oom_kills()
        command = [sys.executable, "-W", "ignore", "-m", "runtime.backends.hosted_child", str(theirs.fileno())]
        with theirs:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )
        self._release = weakref.finalize(self, _end, self._child, self._channel, self._log)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._child.poll() is None

    def ask(
        self, message: Mapping[str, Any], descriptors: Sequence[int] = (), *, deadline_us: int, doing: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Send a message and return the answer; a death, a hang and the child's own error are classified errors.

        doing: what the call was, for the evidence (`what`, and the shape of a step).
        """
        try:
            self._channel.send(message, descriptors)
            answer = self._channel.answer(deadline_us / 1e6)
        except TimeoutError:
            raise self._timed_out(deadline_us, doing) from None
        except OSError:
            answer = None
        if answer is None:
            raise self.death(doing)
        if "failed" in answer:
            raise restored_error(answer["failed"])
        return answer["done"]

    def death(self, doing: Mapping[str, Any]) -> BackendError:
        """Say of what the child died; ends it if it only hung up."""
        code = self._wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        tail = self._tail()
        killed = _oom_kills() > self._oom_kills
        evidence = {
            "provider": self.backend,
            "error_class": name,
            "device_state": "hosting process gone",
            "output_completeness": "none",
            "exit_code": code,
            "log": tail,
            **doing,
        }
        self.close()
        if any(sign in tail for sign in CAPACITY_SIGNS) or (killed and name == "SIGKILL"):
            return HostOutOfMemory(
                f"the process that hosted {self.backend} ran out of memory ({name}) during {doing['what']}",
                fix="raise the memory limit of the hosting process, or lower max_num_batched_tokens",
                evidence={"memory_pressure": tail or "killed by the kernel", "reservation_failure": name, **evidence},
            )
        return HostDied(
            f"the process that hosted {self.backend} died ({name}) during {doing['what']}",
            fix="the log's end is in the evidence; compare with the eager backend",
            evidence=evidence,
        )

    def close(self) -> None:
        """End the child and release what it held."""
        self._release()

    def _timed_out(self, deadline_us: int, doing: Mapping[str, Any]) -> HostTimedOut:
        tail = self._tail()
        self.close()
        return HostTimedOut(
            f"the process that hosted {self.backend} passed its deadline of {deadline_us} us during {doing['what']}",
            fix="raise the deadline, or see what the backend waits for in the log",
            evidence={
                "deadline_us": deadline_us,
                "cancellation_origin": f"{doing['what']} deadline",
                "emitted_output_count": 0,
                "released_resources": "hosting process; the shared pools are kept",
                "log": tail,
                **doing,
            },
        )

    def _wait(self) -> int:
        try:
            return self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()

    def _tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _LOG_TAIL, max(0, size - _LOG_TAIL)).decode(errors="replace")


def _end(child: subprocess.Popen[bytes], channel: Any, log: Any) -> None:
    channel.close()
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    log.close()


def _oom_kills() -> int:
    """Count what the kernel killed in this control group for want of memory; 0 where it does not say."""
    try:
        lines = _MEMORY_EVENTS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

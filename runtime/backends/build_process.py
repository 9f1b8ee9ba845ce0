"""How does the parent follow a compiling child?  Reports with a deadline; a death is a classified failure."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.backends.errors import (
    CAPACITY_SIGNS,
    BackendError,
    BuildFailed,
    BuildTimedOut,
    CapacityExhausted,
    ExecutionFailed,
)

DISK_SIGNS = (*CAPACITY_SIGNS, "File too large", "Disk quota exceeded")


class BuildProcess:
    """A child that compiles one program and reports as it passes each stage; see `build_child.py` for its side."""

    def __init__(
        self,
        module: str,
        request: Mapping[str, Any],
        work: Path,
        *,
        environment: Mapping[str, str],
        deadline_seconds: int,
        fix: str,
    ) -> None:
        """Start `python -m module`; `fix` is what a user may do where the compiler fails."""
        path = work / "request.json"
        path.write_text(json.dumps(request))
        self._module, self._fix = module.rpartition(".")[2], fix
        self._deadline = time.monotonic() + deadline_seconds
        self._deadline_seconds = deadline_seconds
        self._log = work / "compiler.log"
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module, str(path)],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._reports: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=self._module, daemon=True)
        self._reader.start()

    def wait_for(self, event: str, *, stage: str) -> dict[str, Any]:
        """Return the next report, which must be `event`; a failed, dead or late child is a classified error."""
        try:
            line = self._reports.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            self.close()
            raise BuildTimedOut(
                f"the compiler passed its deadline of {self._deadline_seconds} s",
                fix="raise the deadline, or lower the optimization level",
                evidence={
                    "deadline_us": self._deadline_seconds * 1_000_000,
                    "cancellation_origin": "build deadline",
                    "last_completed_span": stage,
                    "released_resources": "compiler process group",
                },
                stage=stage,
            ) from None
        if line is None:
            raise self._death(stage)
        report: dict[str, Any] = json.loads(line)
        if report["event"] == "failed":
            raise self._failure(report, stage)
        if report["event"] != event:
            raise BuildFailed(
                f"the compiler reported {report['event']!r} where {event!r} was due",
                fix="this version of the compiler works in another order; use the eager or onnxruntime backend",
                evidence={"validation_output": report["event"]},
                stage=stage,
            )
        return report

    def close(self) -> None:
        """End the child and everything it started."""
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._reader.join(timeout=5)
        if self._child.stdout is not None:
            self._child.stdout.close()

    def _read(self) -> None:
        if self._child.stdout is not None:
            for line in self._child.stdout:
                self._reports.put(line)
        self._reports.put(None)

    def _death(self, stage: str) -> BackendError:
        code = self._child.wait()
        tail = self._log.read_bytes()[-1500:].decode(errors="replace")
        return self._crash(signal.Signals(-code).name if code < 0 else f"exit code {code}", tail, stage)

    def _crash(self, name: str, log: str, stage: str) -> BackendError:
        return ExecutionFailed(
            f"the compiler process died: {name}",
            fix="see the compiler log in the evidence",
            evidence={
                "provider": self._module,
                "error_class": name,
                "device_state": "compiler process gone",
                "log": log,
            },
            stage=stage,
        )

    def _failure(self, report: Mapping[str, Any], stage: str) -> BackendError:
        text, name = str(report["text"]), str(report["exception"])
        if report.get("signal"):
            return self._crash(str(report["signal"]), text[-1500:], stage)
        evidence = {"provider_log": text[-1500:], "exception": name}
        if any(sign in text for sign in DISK_SIGNS) or report.get("errno") == 28:
            return CapacityExhausted(
                "the compiler ran out of memory or disk",
                fix="free disk space under the temporary folder",
                evidence={"memory_pressure": text[-500:], "reservation_failure": name},
                stage=stage,
            )
        first = next((line for line in text.splitlines() if line.strip()), name)
        return BuildFailed(
            f"the compiler failed: {name}: {first[:300]}",
            fix=self._fix,
            evidence=evidence,
            stage=stage,
        )

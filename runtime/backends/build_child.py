"""How does a compiling child report?  JSON lines on its original standard output, the last one `failed` if it fails.

Everything else that libraries print goes to standard error, which the parent keeps as the compiler's log.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class Reporter:
    """Writes reports, one JSON line each."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = time.perf_counter_ns()

    def send(self, event: str, **fields: Any) -> None:
        """Write one report with the microseconds since the start."""
        spent = (time.perf_counter_ns() - self._start) // 1000
        self._stream.write(json.dumps({"event": event, "elapsed_us": spent, **fields}) + "\n")
        self._stream.flush()


class ToolCrashed(Exception):
    """A compiler that this child started was ended by a signal."""

    def __init__(self, tool: str, number: int, log: str) -> None:
        super().__init__(f"{tool} died: {signal.Signals(number).name}\n{log}")
        self.signal = signal.Signals(number).name


def run_build(arguments: list[str], build: Callable[[dict[str, Any], Reporter], None]) -> int:
    """Read the request file named in `arguments` and build; exit code 0, or 1 after a `failed` report."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not disturb the reports
    reporter = Reporter(reports)
    request = json.loads(Path(arguments[0]).read_text())
    try:
        build(request, reporter)
    except Exception as error:
        reporter.send(
            "failed",
            exception=type(error).__name__,
            text=str(error)[-4000:],
            errno=getattr(error, "errno", None),
            signal=getattr(error, "signal", None),
        )
        return 1
    return 0

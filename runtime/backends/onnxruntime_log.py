"""What does ONNX Runtime say while it opens a session?  Its log lines, also from versions without a log callback."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import onnxruntime


@contextmanager
def session_log() -> Generator[list[tuple[int | None, str]]]:
    """Collect the log lines of the block, each with the nanosecond at which it came; complete when the block has ended.

    The default logger writes to the process's standard error.  Versions without `set_default_logger_callback` are heard
    there, which takes the descriptor for the time of the block and gives no times.
    """
    lines: list[tuple[int | None, str]] = []
    set_callback: Any = getattr(onnxruntime, "set_default_logger_callback", None)
    if set_callback is None:
        with _standard_error(lines):
            yield lines
        return
    set_callback(lambda *parts: lines.append((time.perf_counter_ns(), str(parts[-1]))))
    try:
        yield lines
    finally:
        set_callback(None)


@contextmanager
def _standard_error(lines: list[tuple[int | None, str]]) -> Generator[None]:
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as taken:
            os.dup2(taken.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                taken.seek(0)
                lines.extend((None, line) for line in taken.read().decode(errors="replace").splitlines())
    finally:
        os.close(kept)

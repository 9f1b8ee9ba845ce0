"""What does ONNX Runtime say while it opens a session?  Its log lines, also from versions without a log callback."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import onnxruntime


@contextmanager
def session_log() -> Generator[list[str]]:
    """Collect the log lines of the block; they are in the list when the block has ended.

    The default logger writes to the process's standard error.  Versions without `set_default_logger_callback` are heard
    there, which takes the descriptor for the time of the block.
    """
    lines: list[str] = []
    set_callback: Any = getattr(onnxruntime, "set_default_logger_callback", None)
    if set_callback is None:
        with _standard_error(lines):
            yield lines
        return
    set_callback(lambda *parts: lines.append(str(parts[-1])))
    try:
        yield lines
    finally:
        set_callback(None)


@contextmanager
def _standard_error(lines: list[str]) -> Generator[None]:
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as taken:
            os.dup2(taken.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                taken.seek(0)
                lines.extend(taken.read().decode(errors="replace").splitlines())
    finally:
        os.close(kept)

"""Which process compiles for AOTInductor, and what are its bytes pinned by?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.backends.build_process import BuildProcess
from runtime.backends.errors import BackendRefused


def cache_folder() -> Path:
    """Give the one cache path of this user: compiled files carry it, so a fixed path is what makes builds repeat."""
    folder = Path(tempfile.gettempdir()) / f"replaylab-inductor-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise BackendRefused(
            f"the compiler cache {folder} belongs to somebody else",
            fix="remove it, or set TMPDIR to a folder of your own",
            evidence={"provider_log": str(folder)},
        )
    return folder


def build_environment(threads: int) -> dict[str, str]:
    """Pin what a build's bytes depend on: cache path, hash seed, threads; no compiler pool beside us."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder()),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(threads),
    }


def inductor_process(request: Mapping[str, Any], work: Path, *, threads: int, deadline_seconds: int) -> BuildProcess:
    """Start a compile that reports `optimized`, `partitioned` and `lowered` in that order."""
    return BuildProcess(
        "runtime.backends.inductor_compile",
        {**request, "threads": threads},
        work,
        environment=build_environment(threads),
        deadline_seconds=deadline_seconds,
        fix="install a working C++ compiler (g++), or use the eager or onnxruntime backend",
    )

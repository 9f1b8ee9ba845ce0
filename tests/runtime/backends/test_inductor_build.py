"""A compiler that fails, dies or is late is a classified failure of its stage, and leaves no process behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from runtime.backends import inductor_build
from runtime.backends.build_process import BuildProcess
from runtime.backends.errors import BackendRefused, BuildFailed, BuildTimedOut, ExecutionFailed
from runtime.backends.inductor_build import inductor_process
from traces.failures import FailureClass


def start(work: Path, *, deadline_seconds: int = 120) -> BuildProcess:
    program = work / "program.pt2"
    program.write_bytes(b"not a program")
    request = {"program": str(program), "output": str(work / "step.pt2"), "freezing": False, "metadata": {}}
    return inductor_process(request, work, threads=1, deadline_seconds=deadline_seconds)


def alive(process: BuildProcess) -> bool:
    return process._child.poll() is None  # pyright: ignore[reportPrivateUsage]


def test_a_program_that_cannot_be_read_is_an_artifact_failure(tmp_path: Path) -> None:
    process = start(tmp_path)
    with pytest.raises(BuildFailed) as caught:
        process.wait_for("optimized", stage="a04")
    process.close()
    assert caught.value.stage == "a04"
    assert caught.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY
    assert caught.value.evidence["exception"]


def test_a_killed_compiler_is_an_execution_failure_with_its_signal(tmp_path: Path) -> None:
    process = start(tmp_path)
    os.killpg(process._child.pid, signal.SIGSEGV)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ExecutionFailed) as caught:
        process.wait_for("optimized", stage="a04")
    process.close()
    assert caught.value.evidence["error_class"] == "SIGSEGV"
    assert caught.value.failure_class is FailureClass.MODEL_PROVIDER


def test_a_late_compiler_is_a_timeout_and_is_ended(tmp_path: Path) -> None:
    process = start(tmp_path, deadline_seconds=0)
    with pytest.raises(BuildTimedOut) as caught:
        process.wait_for("optimized", stage="a04")
    assert not alive(process)
    assert caught.value.failure_class is FailureClass.TIMEOUT_CANCELLATION
    assert caught.value.evidence["last_completed_span"] == "a04"
    process.close()


def test_closing_twice_is_safe(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.close()
    process.close()
    assert not alive(process)


def test_a_cache_folder_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"replaylab-inductor-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(inductor_build.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(BackendRefused, match="belongs to somebody else"):
        inductor_build.cache_folder()

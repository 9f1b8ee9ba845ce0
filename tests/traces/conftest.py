"""A small recorded ledger, made once, and copies of it to damage."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from traces.ledger.ledger import Ledger
from traces.recorder import Recorder


def ticking_clock() -> Callable[[], tuple[int, int]]:
    """A clock that advances a millisecond a look."""
    ticks = itertools.count(1_795_000_000_000_000, 1_000)

    def look() -> tuple[int, int]:
        now = next(ticks)
        return now, now - 1_795_000_000_000_000

    return look


def counted_ids() -> Callable[[], str]:
    """Event ids 1, 2, 3 as 32 hex digits."""
    numbers = itertools.count(1)
    return lambda: f"{next(numbers):032x}"


def record_request(recorder: Recorder, number: int, *, status: str = "ok", failure_class: str | None = None) -> str:
    """Record one small request: accepted, one stage with evidence, terminal.  Return its reference."""
    request_ref = f"req_{number:032x}"
    span_id = f"{number + 1:016x}"
    columns = {"request_ref": request_ref, "trace_id": f"{number + 1:032x}", "tenant_ref": "acme"}
    recorder.commit("request.accepted", **columns)
    recorder.emit("stage.started", stage="b05", span_id=span_id, **columns)
    result = recorder.put_blob(f"result {number}".encode())
    recorder.emit(
        "stage.completed",
        stage="b05",
        span_id=span_id,
        duration_us=1_000 + number,
        status="ok",
        result_ref=result,
        payload={"record": {"prompt_tokens": number}},
        **columns,
    )
    recorder.commit(
        "request.terminal",
        status=status,
        failure_class=failure_class,
        error_type="Boom" if failure_class else None,
        **columns,
    )
    return request_ref


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drained ledger of three segments: two runs, eight requests, one of them failed."""
    path = tmp_path_factory.mktemp("recorded") / "ledger"
    for run in range(3):
        with Recorder(path, run_id=f"run_{run % 2}", component="test", clock=ticking_clock()) as recorder:
            recorder.commit("run.started", payload={"kind": "live"})
            for number in range(run * 3, run * 3 + 3):
                failed = number == 7
                record_request(
                    recorder,
                    number,
                    status="error" if failed else "ok",
                    failure_class="model_provider" if failed else None,
                )
            recorder.commit("run.completed", status="ok")
        Ledger(path).drain()
    return path


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the recorded ledger, witness included, to change."""
    target = tmp_path / "ledger"
    shutil.copytree(recorded, target)
    shutil.copy(recorded.with_name("ledger.head"), tmp_path / "ledger.head")
    return target

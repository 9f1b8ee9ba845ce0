"""Small made-up ledgers, written by the real recorder with a still clock, and one run of the real runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from traces.ledger.ledger import Ledger
from traces.recorder import Recorder

if TYPE_CHECKING:
    from tests.replay.recorded import Recorded


class StillClock:
    """A clock that moves one millisecond at each reading."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000

    def __call__(self) -> tuple[int, int]:
        self.now += 1_000
        return self.now, self.now - 1_700_000_000_000_000


class MadeUpLedger:
    """Writes runs and requests the way the runtime does, as far as listing is concerned."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = StillClock()
        self._recorders: list[Recorder] = []

    def run(self, run_id: str, **payload: Any) -> Recorder:
        """Start a run."""
        recorder = Recorder(self.path, run_id=run_id, component="test", clock=self.clock)
        self._recorders.append(recorder)
        recorder.commit("run.started", payload={"kind": "live", **payload})
        return recorder

    def request(self, recorder: Recorder, request_ref: str, **terminal: Any) -> None:
        """Record one request from arrival to end."""
        recorder.commit("request.accepted", request_ref=request_ref, track="B")
        if terminal:
            recorder.commit("request.terminal", request_ref=request_ref, track="B", **terminal)

    def drained(self) -> Ledger:
        """Return the ledger with everything recorded so far in it."""
        for recorder in self._recorders:
            recorder.flush()
        ledger = Ledger(self.path)
        ledger.drain()
        return ledger

    def close(self) -> None:
        """Close every recorder."""
        for recorder in self._recorders:
            recorder.close()


@pytest.fixture
def made_up(tmp_path: Path) -> Iterator[MadeUpLedger]:
    """An empty ledger to write runs into."""
    ledger = MadeUpLedger(tmp_path / "ledger")
    yield ledger
    ledger.close()


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Twelve requests of two tenants, recorded by the real runtime on random weights."""
    from tests.replay.recorded import record

    return asyncio.run(record(tmp_path_factory.mktemp("replay")))

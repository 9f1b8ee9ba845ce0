"""What the recorder acknowledges is on disk; what it cannot write, it refuses."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from tests.traces.conftest import counted_ids, ticking_clock
from traces.envelope import TraceEvent, encode
from traces.evidence import reference_to
from traces.failures import EventRefused, EvidenceError, FailureClass, TelemetryPersistenceError
from traces.ledger.ledger import Ledger
from traces.ledger.outbox import Outbox
from traces.recorder import Recorder


def bodies(path: Path) -> list[dict[str, object]]:
    """Every event waiting in the outboxes of a ledger, as plain values."""
    found: list[dict[str, object]] = []
    for file in sorted((path / "outbox").glob("*.sqlite")):
        connection = sqlite3.connect(file)
        found += [msgspec.json.decode(row[0]) for row in connection.execute("SELECT body FROM event ORDER BY seq")]
        connection.close()
    return found


def test_a_whole_trace_is_as_expected(tmp_path: Path) -> None:
    """Clock and ids are injected, so a trace can be compared with a literal."""
    with Recorder(
        tmp_path / "ledger", run_id="run_1", component="engine", clock=ticking_clock(), ids=counted_ids()
    ) as recorder:
        recorder.emit("stage.started", stage="b05", request_ref="req_1", payload={"b": 1, "a": [True, None]})
        recorder.commit("request.terminal", status="ok", request_ref="req_1", run_id="run_2", component="other")
        outbox = recorder.outbox_name
    assert bodies(tmp_path / "ledger") == [
        {
            "event_type": "stage.started",
            "run_id": "run_1",
            "component": "engine",
            "ts_us": 1_795_000_000_000_000,
            "mono_us": 0,
            "event_id": f"{1:032x}",
            "outbox": outbox,
            "outbox_seq": 1,
            "track": "B",
            "stage": "b05",
            "request_ref": "req_1",
            "redaction_status": "clean",
            "redaction_policy": "redaction-2",
            "payload": {"a": [True, None], "b": 1},
        },
        {
            "event_type": "request.terminal",
            "run_id": "run_2",
            "component": "other",
            "ts_us": 1_795_000_000_001_000,
            "mono_us": 1_000,
            "event_id": f"{2:032x}",
            "outbox": outbox,
            "outbox_seq": 2,
            "durability": "mandatory",
            "request_ref": "req_1",
            "status": "ok",
            "redaction_status": "clean",
            "redaction_policy": "redaction-2",
        },
    ]


def test_a_commit_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_1", component="test") as recorder:
        recorder.emit("before")
        reference = recorder.put_blob(b"evidence")
        recorder.commit("acknowledged")
        assert [event["event_type"] for event in bodies(tmp_path / "ledger")] == ["before", "acknowledged"]
        assert Ledger(tmp_path / "ledger").read_blob(reference) == b"evidence"


def test_commits_from_an_event_loop_share_groups(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_1", component="test") as recorder:

        async def all_at_once() -> None:
            await asyncio.gather(*(recorder.commit_async("x", step=number) for number in range(200)))

        asyncio.run(all_at_once())
        assert len(bodies(tmp_path / "ledger")) == 200


def test_a_cancelled_waiter_stops_nobody_else(tmp_path: Path) -> None:
    """Cancelling a task that waits for its commit must not take the writer down with it."""
    with Recorder(tmp_path / "ledger", run_id="run_1", component="test") as recorder:

        async def cancel_some() -> None:
            tasks = [asyncio.ensure_future(recorder.commit_async("x", step=number)) for number in range(60)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [result for result in results[1::2] if result is not None] == []

        asyncio.run(cancel_some())
        recorder.commit("after")
        assert not recorder.halted
    steps = [event.get("step") for event in bodies(tmp_path / "ledger") if event["event_type"] == "x"]
    assert len(steps) == len(set(steps))
    assert set(range(1, 60, 2)) <= set(steps)


def test_closing_while_others_commit_leaves_nobody_waiting(tmp_path: Path) -> None:
    for round_number in range(20):
        recorder = Recorder(tmp_path / f"ledger{round_number}", run_id="run_1", component="test")
        acknowledged: list[int] = []

        def work(recorder: Recorder = recorder, acknowledged: list[int] = acknowledged) -> None:
            for number in range(1_000):
                try:
                    recorder.commit("x", step=number)
                except TelemetryPersistenceError:
                    return
                acknowledged.append(number)

        thread = threading.Thread(target=work)
        thread.start()
        recorder.close()
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert len(bodies(tmp_path / f"ledger{round_number}")) >= len(acknowledged)


def test_sequence_numbers_are_dense_under_threads(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_1", component="test") as recorder:

        def work(thread: int) -> None:
            for number in range(200):
                recorder.emit("x", step=number, batch_id=str(thread))
                if number % 50 == 0:
                    recorder.commit("y", batch_id=str(thread))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = bodies(tmp_path / "ledger")
    assert [event["outbox_seq"] for event in found] == list(range(1, 6 * 204 + 1))
    for thread in range(6):
        steps = [event["step"] for event in found if event.get("batch_id") == str(thread) and "step" in event]
        assert steps == list(range(200))


def test_a_wrong_event_is_refused_where_it_is_made(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_1", component="test") as recorder:
        for columns in ({"stage": "b99"}, {"colour": "red"}, {"outbox_seq": 4}, {"status": "fine"}):
            with pytest.raises(EventRefused):
                recorder.emit("x", **columns)
        with pytest.raises(EventRefused, match="cannot be encoded"):
            recorder.commit("x", payload={"thing": object()})
        deep: dict[str, object] = {}
        for _ in range(100):
            deep = {"in": deep}
        with pytest.raises(EventRefused, match="nested"):
            recorder.commit("x", payload=deep)
        recorder.commit("good")
    found = bodies(tmp_path / "ledger")
    assert [(event["event_type"], event["outbox_seq"]) for event in found] == [("good", 1)]


def test_an_optional_event_that_cannot_be_encoded_counts_as_dropped(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_1", component="test") as recorder:
        recorder.emit("x", payload={"thing": object()})
        recorder.flush()
        recorder.commit("y")
        assert recorder.dropped == 1
    found = {str(event["event_type"]): event for event in bodies(tmp_path / "ledger")}
    assert found["recorder.dropped"]["payload"] == {"count": 1}


class SlowStamper:
    """Encodes only when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def stamp(self, event: TraceEvent, outbox: str, *, seq: int, mandatory: bool) -> bytes:
        self.may.wait()
        return encode(event)

    def report_drops(self, count: int) -> TraceEvent:
        return TraceEvent(
            event_type="recorder.dropped", run_id="r", component="c", ts_us=0, mono_us=0, payload={"count": count}
        )


def test_a_full_queue_drops_counts_and_records(tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    folder.mkdir()
    stamper = SlowStamper()
    outbox = Outbox(folder, stamper, queue_limit=10)
    event = TraceEvent(event_type="x", run_id="r", component="c", ts_us=0, mono_us=0)
    offered = [outbox.offer(event) for _ in range(100)]
    stamper.may.set()
    outbox.submit(None).result()
    outbox.submit(event).result()
    outbox.close()
    kept = bodies(tmp_path)
    assert outbox.dropped == offered.count(False) > 0
    assert sum(one["event_type"] == "x" for one in kept) == offered.count(True) + 1
    reported = [one["payload"] for one in kept if one["event_type"] == "recorder.dropped"]
    assert sum(one["count"] for one in reported if isinstance(one, dict)) == outbox.dropped


def test_a_closed_recorder_fails_closed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "ledger", run_id="run_1", component="test")
    recorder.close()
    recorder.close()
    with pytest.raises(TelemetryPersistenceError):
        recorder.commit("x")
    with pytest.raises(TelemetryPersistenceError):
        recorder.put_blob(b"x")
    assert recorder.emit("x") is False


def test_a_forked_child_must_open_its_own(tmp_path: Path) -> None:
    script = """
import os, sys
from traces.recorder import Recorder
from traces.failures import TelemetryPersistenceError
recorder = Recorder(sys.argv[1], run_id="r", component="c")
child = os.fork()
if child == 0:
    try:
        recorder.commit("x")
    except TelemetryPersistenceError:
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
recorder.commit("x")
recorder.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "ledger")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "7"
    assert len(bodies(tmp_path / "ledger")) == 1


def test_a_file_in_place_of_the_folder_fails_closed(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("not a folder")
    with pytest.raises(TelemetryPersistenceError, match="cannot be created") as caught:
        Recorder(tmp_path / "ledger", run_id="r", component="c")
    assert caught.value.failure_class is FailureClass.TELEMETRY_PERSISTENCE
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "outbox").write_text("not a folder")
    with pytest.raises(TelemetryPersistenceError):
        Recorder(tmp_path / "other", run_id="r", component="c")


FULL_DISK = """
import resource, signal, sys
from traces.recorder import Recorder
from traces.failures import TelemetryPersistenceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(sys.argv[1], run_id="r", component="c")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
acknowledged, refused = 0, 0
for number in range(400):
    try:
        recorder.commit("x", payload={"filler": "y" * 200}, step=number)
    except TelemetryPersistenceError as error:
        refused += 1
    else:
        assert not refused, "acted after a failed write"
        acknowledged += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    recorder.commit("x")  # there is room again, but a halted outbox stays halted
    print("carried on")
except TelemetryPersistenceError as error:
    print(error.failure_class.value, recorder.halted, recorder.emit("x"))
print(acknowledged, refused)
recorder.close()
"""


@pytest.mark.parametrize("limit", [40_000, 60_001, 100_003])
def test_a_full_disk_halts_and_loses_nothing_acknowledged(tmp_path: Path, limit: int) -> None:
    assert resource.RLIMIT_FSIZE >= 0
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "ledger"), str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    state, counts = done.stdout.strip().splitlines()
    acknowledged, refused = (int(word) for word in counts.split())
    assert state == "telemetry_persistence True False"
    assert refused > 0
    kept = bodies(tmp_path / "ledger")
    assert len(kept) >= acknowledged
    assert Ledger(tmp_path / "ledger").drain().events == len(kept)
    assert Ledger(tmp_path / "ledger").verify().ok


def test_evidence_is_checked_on_reading(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    reference = ledger.put_blob(b"evidence")
    assert reference == reference_to(b"evidence") == ledger.put_blob(b"evidence")
    path = ledger.blobs.path_of(reference)
    assert (path.stat().st_mode & 0o777, (tmp_path / "ledger").stat().st_mode & 0o777) == (0o600, 0o700)
    path.write_bytes(b"evidencE")
    with pytest.raises(EvidenceError, match="damaged"):
        ledger.read_blob(reference)
    path.unlink()
    with pytest.raises(EvidenceError, match="is not in"):
        ledger.read_blob(reference)
    with pytest.raises(EvidenceError, match="does not name evidence"):
        ledger.read_blob("../../etc/passwd")


def test_large_evidence_goes_straight_to_its_file(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_1", component="test") as recorder:
        reference = recorder.put_blob(b"x" * 300_000)
        assert Ledger(tmp_path / "ledger").blobs.has(reference)


def test_the_recorder_loads_no_database_library() -> None:
    script = (
        "import sys; from traces.recorder import Recorder; from traces.ledger.ledger import Ledger; "
        "print(sorted({'duckdb', 'pyarrow', 'polars', 'numpy', 'cryptography'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

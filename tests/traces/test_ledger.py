"""Draining moves every event once; the projection answers, can be made again, and is shared politely."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import polars
import pytest

from tests.traces.conftest import record_request
from traces.failures import TelemetryPersistenceError
from traces.ledger import queries
from traces.ledger.drain import Drainer, drain_lock
from traces.ledger.ledger import Ledger
from traces.ledger.projection import migrate
from traces.ledger.schema import EVENT_COLUMNS, MIGRATIONS
from traces.ledger.segments import Segments
from traces.recorder import Recorder


def all_rows(path: Path) -> list[tuple[Any, ...]]:
    """The projection's events, every column, payload as text."""
    columns = ", ".join(
        f'"{column.name}"::VARCHAR' if column.type == "VARIANT" else f'"{column.name}"' for column in EVENT_COLUMNS
    )
    with Ledger(path).reading() as connection:
        return connection.execute(f"SELECT {columns} FROM event ORDER BY run_id, seq").fetchall()


def test_named_questions(recorded: Path) -> None:
    ledger = Ledger(recorded)
    found = {row["run_id"]: (row["requests"], row["requests_ok"], row["requests_not_ok"]) for row in ledger.runs()}
    assert found == {"run_0": (6, 5, 1), "run_1": (3, 3, 0)}
    assert len(ledger.requests()) == 9
    assert len(ledger.requests("run_1")) == 3
    incident = ledger.last_incident()
    assert incident is not None
    assert (incident["request_ref"], incident["failure_class"]) == (f"req_{7:032x}", "model_provider")
    [span] = ledger.waterfall(f"req_{2:032x}")
    assert (span["stage"], span["duration_us"], span["offset_us"]) == ("b05", 1_002, 0)
    latency = queries.stage_latency(ledger)
    assert isinstance(latency, polars.DataFrame)
    assert latency.select("stage", "spans", "p50_us").rows() == [("b05", 9, 1_004)]
    assert queries.failures(ledger).select("failure_class", "failures").rows() == [("model_provider", 1)]
    for question in (queries.runs, queries.requests, queries.last_incident):
        assert question(ledger).height >= 1
    assert queries.steps(ledger, "run_0").height == 0
    assert queries.attempts(ledger, f"req_{2:032x}").height == 0
    assert queries.waterfall(ledger, f"req_{2:032x}").height == 1


def test_events_come_back_as_recorded(recorded: Path) -> None:
    ledger = Ledger(recorded)
    found = ledger.events(request_ref=f"req_{4:032x}")
    assert [event.event_type for event in found] == [
        "request.accepted",
        "stage.started",
        "stage.completed",
        "request.terminal",
    ]
    assert found[2].payload == {"record": {"prompt_tokens": 4}}
    assert len(ledger.events("run_1")) == 14
    assert len(ledger.events(event_type=["run.started", "run.completed"])) == 6
    assert ledger.read_blob(found[2].result_ref or "") == b"result 4"


def test_a_divergence_is_an_incident(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_live", component="test") as recorder:
        first = record_request(recorder, 1)
        record_request(recorder, 2)
        assert Ledger(tmp_path / "ledger").last_incident() is None
        recorder.commit("run.started", run_id="run_replay", payload={"parent_run": "run_live", "mode": "faithful"})
        recorder.commit("replay.verdict", run_id="run_replay", request_ref=first, payload={"verdict": "diverged"})
    ledger = Ledger(tmp_path / "ledger")
    ledger.drain()
    incident = ledger.last_incident()
    assert incident is not None
    assert (incident["request_ref"], incident["run_id"], incident["diverged"]) == (first, "run_live", True)
    replayed = next(row for row in ledger.runs() if row["run_id"] == "run_replay")
    assert (replayed["parent"], replayed["mode"]) == ("run_live", "faithful")


def test_rebuild_and_compact_give_equal_rows(copy: Path) -> None:
    before = all_rows(copy)
    assert Ledger(copy).rebuild() == 42
    assert all_rows(copy) == before
    report = Ledger(copy).compact()
    assert report.events == 42
    assert all_rows(copy) == before
    (copy / "ledger.duckdb").unlink()
    assert Ledger(copy).events() == []
    with Recorder(copy, run_id="run_5", component="test") as recorder:
        recorder.commit("x")
    Ledger(copy).drain()
    assert len(all_rows(copy)) == 43


def test_a_drain_that_was_cut_off_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop after each step of a drain in turn; the next drain loses and doubles nothing, and nobody cries wolf."""
    path = tmp_path / "ledger"

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    expected = 0
    for target, name in (
        (Segments, "seal"),
        (Segments, "write_head"),
        (Drainer, "_delete"),
        (Drainer, "_project"),
        (Drainer, "_remove_finished"),
    ):
        with Recorder(path, run_id="run_1", component="test") as recorder:
            for number in range(3):
                recorder.commit("x", step=number)
                expected += 1
        with monkeypatch.context() as patch:
            patch.setattr(target, name, killed)
            with pytest.raises(Killed):
                Ledger(path).drain()
        assert Ledger(path).verify().findings == []
        Ledger(path).drain()
        assert (len(all_rows(path)), Ledger(path).pending()) == (expected, 0)
    assert Ledger(path).verify().findings == []
    assert list((path / "outbox").iterdir()) == []


def test_a_live_recorder_and_a_plain_client_share_the_ledger(tmp_path: Path) -> None:
    """A duckdb client in another process asks again and again while this one records and drains."""
    path = tmp_path / "ledger"
    client = """
import duckdb, json, sys, time
counts = []
while len(counts) < 5 or counts[-1] < int(sys.argv[2]):
    try:
        connection = duckdb.connect(sys.argv[1], read_only=True)
    except duckdb.Error:
        time.sleep(0.005)
        continue
    counts.append(connection.execute("SELECT count(*) FROM event").fetchone()[0])
    connection.close()
    time.sleep(0.02)
print(json.dumps(counts))
"""
    ledger = Ledger(path)
    with Recorder(path, run_id="run_1", component="test") as recorder:
        recorder.commit("run.started")
        ledger.drain()
        reader = subprocess.Popen(
            [sys.executable, "-c", client, str(path / "ledger.duckdb"), "301"], stdout=subprocess.PIPE, text=True
        )
        for batch in range(6):
            for number in range(50):
                recorder.emit("engine.step", step=batch * 50 + number)
            recorder.flush()
            ledger.drain(busy_wait_s=60.0)
        ledger.drain(busy_wait_s=60.0)
        output, _ = reader.communicate(timeout=120)
    counts = json.loads(output)
    assert reader.returncode == 0
    assert counts == sorted(counts)
    assert counts[-1] == 301
    assert ledger.verify().ok


def test_a_held_projection_delays_nothing_but_itself(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    with Recorder(path, run_id="run_1", component="test") as recorder:
        recorder.commit("x")
        ledger.drain()
        recorder.commit("x")
        reader = duckdb.connect(str(path / "ledger.duckdb"), read_only=True)
        report = ledger.drain(busy_wait_s=0.0)
        assert (report.events, report.projected) == (1, False)
        reader.close()
        assert ledger.verify().ok
        assert ledger.drain().projected
        assert len(ledger.events()) == 2


def test_one_drainer_at_a_time(copy: Path) -> None:
    with drain_lock(Ledger(copy).layout), pytest.raises(TelemetryPersistenceError, match="Another process"):  # noqa: SIM117
        with drain_lock(Ledger(copy).layout, wait_s=0.0):
            pass


def test_a_damaged_outbox_is_left_and_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with Recorder(path, run_id="run_1", component="test") as recorder:
        recorder.commit("x")
    (path / "outbox" / "1-dead.sqlite").write_bytes(b"not a database at all, but long enough to look at" * 40)
    report = Ledger(path).drain()
    assert (report.events, report.damaged) == (1, ["1-dead.sqlite"])


def test_migrations_go_from_blank_and_from_the_oldest() -> None:
    fresh = duckdb.connect(":memory:")
    assert migrate(fresh) == len(MIGRATIONS)
    assert migrate(fresh) == len(MIGRATIONS)
    oldest = duckdb.connect(":memory:")
    oldest.execute("CREATE TABLE migration (number INTEGER, applied_us BIGINT)")
    oldest.execute(MIGRATIONS[0])
    oldest.execute("INSERT INTO migration VALUES (1, 0)")
    assert migrate(oldest) == len(MIGRATIONS)
    newer = duckdb.connect(":memory:")
    newer.execute("CREATE TABLE migration (number INTEGER, applied_us BIGINT)")
    newer.execute("INSERT INTO migration VALUES (99, 0)")
    with pytest.raises(TelemetryPersistenceError, match="schema version 99"):
        migrate(newer)


def test_a_damaged_projection_says_how_to_mend_it(copy: Path) -> None:
    (copy / "ledger.duckdb").write_bytes(b"garbage" * 1000)
    with pytest.raises(TelemetryPersistenceError, match="rebuild"):
        Ledger(copy).runs()
    assert not Ledger(copy).verify().ok
    assert Ledger(copy).rebuild() == 42
    assert Ledger(copy).verify().ok


def test_an_empty_ledger_answers_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    assert not ledger.exists
    assert (ledger.runs(), ledger.requests(), ledger.events(), ledger.last_incident()) == ([], [], [], None)
    assert queries.runs(ledger).height == 0
    assert not (tmp_path / "ledger").exists()
    assert ledger.verify().ok

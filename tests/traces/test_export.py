"""The same events as OpenTelemetry spans: one tree, hexadecimal ids, 64-bit integers as strings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from traces.conventions import MAPPINGS
from traces.envelope import ENVELOPE_COLUMNS, TraceEvent
from traces.failures import TelemetryPersistenceError
from traces.ledger import cli
from traces.ledger.ledger import Ledger
from traces.otel import export_spans, readable_spans
from traces.otlp import otlp_lines
from traces.spans import spans_of

ROOT = "00f067aa0ba902b7"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def event(event_type: str, ts_us: int, **columns: Any) -> TraceEvent:
    """An event of one request."""
    return TraceEvent(
        event_type=event_type,
        run_id="run_1",
        component="serve",
        ts_us=ts_us,
        mono_us=ts_us,
        request_ref="req_1",
        trace_id=TRACE,
        outbox_seq=ts_us,
        **columns,
    )


def a_request() -> list[TraceEvent]:
    """A request with a queue stage, a model call, a failing tool and its end."""
    from traces.stages import Stage

    prefill = {"span_id": "000000000000000b", "parent_span_id": ROOT, "stage": Stage.PREFILL}
    queue = {"span_id": "000000000000000a", "parent_span_id": ROOT, "stage": Stage.QUEUEING}
    tool = {"span_id": "000000000000000c", "parent_span_id": ROOT, "tool_name": "lookup_account"}
    return [
        event("request.accepted", 1_000, idempotency_ref="idempotency_1"),
        event("stage.started", 1_100, **queue),
        event("stage.completed", 3_100, duration_us=2_000, status="ok", **queue),
        event("stage.started", 3_200, **prefill),
        event(
            "stage.completed", 9_200, duration_us=6_000, status="ok", input_tokens=2**40, temperature="0.7", **prefill
        ),
        event("policy.decided", 9_300, policy_decision="allow"),
        event("tool.completed", 9_900, duration_us=500, status="error", error_type="Timeout", **tool),
        event("request.terminal", 10_000, duration_us=9_000, status="ok", first_token_us=8_200, finish_reason="stop"),
    ]


def test_a_request_is_one_tree() -> None:
    spans = {span.name: span for span in spans_of(a_request())}
    assert set(spans) == {"request", "queueing", "prefill", "execute_tool lookup_account"}
    root = spans["request"]
    assert (root.span_id, root.parent_span_id, root.start_us, root.end_us) == (ROOT, None, 1_000, 10_000)
    assert {span.trace_id for span in spans.values()} == {TRACE}
    assert {span.parent_span_id for span in spans.values()} == {None, ROOT}
    assert (spans["prefill"].start_us, spans["prefill"].end_us) == (3_200, 9_200)
    tool = spans["execute_tool lookup_account"]
    assert (tool.start_us, tool.failed, tool.message) == (9_400, True, "Timeout")
    assert [moment.name for moment in root.events] == ["request.accepted", "policy.decided", "request.terminal"]
    assert root.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert root.attributes["gen_ai.latency.time_to_first_token"] == 0.0082
    assert spans["queueing"].attributes["gen_ai.latency.time_in_queue"] == 0.002
    assert spans["prefill"].attributes["gen_ai.request.temperature"] == 0.7


def test_a_missing_end_stays_visible() -> None:
    spans = {span.name: span for span in spans_of(a_request()[:4])}
    assert (spans["prefill"].ended, spans["queueing"].ended, spans["request"].ended) == (False, True, False)


def test_otlp_lines() -> None:
    [line] = otlp_lines(a_request())
    assert list(otlp_lines(a_request())) == [line]
    document = json.loads(line)
    spans = document["resourceSpans"][0]["scopeSpans"][0]["spans"]
    prefill = next(span for span in spans if span["name"] == "prefill")
    assert (prefill["traceId"], prefill["spanId"], prefill["parentSpanId"]) == (TRACE, "000000000000000b", ROOT)
    assert (prefill["startTimeUnixNano"], prefill["kind"], prefill["status"]) == ("3200000", 1, {"code": 1})
    attributes = {pair["key"]: pair["value"] for pair in prefill["attributes"]}
    assert attributes["gen_ai.usage.input_tokens"] == {"intValue": str(2**40)}
    assert attributes["gen_ai.latency.time_in_model_prefill"] == {"doubleValue": 0.006}
    assert "idempotency" not in line


def test_sdk_spans_are_the_same_spans() -> None:
    exporter = InMemorySpanExporter()
    assert export_spans(a_request(), exporter) == 4
    finished = {span.name: span for span in exporter.get_finished_spans()}
    prefill = finished["prefill"]
    assert prefill.context is not None
    assert prefill.parent is not None
    assert (f"{prefill.context.trace_id:032x}", f"{prefill.parent.span_id:016x}") == (TRACE, ROOT)
    assert (prefill.start_time, prefill.end_time) == (3_200_000, 9_200_000)
    assert finished["execute_tool lookup_account"].status.status_code is StatusCode.ERROR
    assert len(readable_spans(a_request())) == 4


class Refusing(SpanExporter):
    """A collector that is down."""

    def export(self, spans: Any) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_a_refusing_exporter_is_told() -> None:
    with pytest.raises(TelemetryPersistenceError, match="took 0 of 4"):
        export_spans(a_request(), Refusing())


def test_events_without_ids_get_the_same_ids_every_time() -> None:
    step = TraceEvent(
        event_type="engine.step", run_id="run_1", component="engine", ts_us=5_000, mono_us=1, duration_us=400, step=3
    )
    [one] = spans_of([step])
    assert [one] == spans_of([step])
    assert (one.name, one.start_us, one.end_us, len(one.trace_id), len(one.span_id)) == (
        "engine.step",
        4_600,
        5_000,
        32,
        16,
    )


def test_the_mapping_names_columns_that_exist() -> None:
    columns = [mapping.column for mapping in MAPPINGS]
    assert set(columns) <= ENVELOPE_COLUMNS
    assert len(set(columns)) == len(columns)
    assert "idempotency_ref" not in columns


def command(*words: str) -> tuple[int, str, str]:
    """Run ``replaylab ledger`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "replaylab", "ledger", *words], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def run_here(*words: str) -> int:
    """Run one action in this process."""
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(list(words)))


def test_the_command_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--ledger", str(copy))
    assert run_here("path", *where, "--json") == 0
    assert json.loads(capsys.readouterr().out)["events"] == 42
    for action in ("drain", "rebuild", "compact", "verify"):
        assert run_here(action, *where, "--json") == 0
        json.loads(capsys.readouterr().out)
    assert run_here("export", str(copy / "events.jsonl"), *where, "--run", "run_1") == 0
    lines = (copy / "events.jsonl").read_text().splitlines()
    assert len(lines) == 14
    assert json.loads(lines[0])["eventType"] == "run.started"
    capsys.readouterr()
    assert run_here("export", *where, "--format", "otlp", "--request", f"req_{2:032x}") == 0
    assert "resourceSpans" in json.loads(capsys.readouterr().out)
    (copy / "head").unlink()
    assert run_here("verify", *where) == 1
    assert "head" in capsys.readouterr().out
    assert run_here("export", str(copy / "no" / "folder"), *where) == 2


def test_the_command_line_refuses_without_a_traceback(tmp_path: Path) -> None:
    code, output, errors = command("verify", "--ledger", str(tmp_path / "none"))
    assert (code, output) == (2, "")
    assert "There is no ledger" in errors
    assert "Traceback" not in errors
    code, output, _ = command("verify", "--ledger", str(tmp_path / "none"), "--json")
    assert (code, json.loads(output)["exit_code"]) == (2, 2)
    assert not (tmp_path / "none").exists()
    assert not Ledger(tmp_path / "none").exists

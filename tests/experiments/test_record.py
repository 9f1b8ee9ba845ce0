"""`replaylab record` leaves a run in the ledger and says what came of it; bad input is one clear error."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.token_latency import Objective
from experiments.arrivals import Sent
from experiments.recording import Answered, Recording, TokenChunks, envelope_of, record_workload
from experiments.summary import quantiles, summarize
from experiments.support_desk import support_desk_workload
from experiments.workloads import LOWEST_PRIORITY, ActivatePackage, WorkloadRequest, write_jsonl
from replaylab import main
from runtime.engine.generation import TokenRecord
from runtime.models.reference import task
from runtime.prepare.store import PackageStore
from runtime.serve.deployment import create_support_desk
from runtime.serve.envelope import parse_envelope
from runtime.serve.services import Outcome
from tests.replay.recorded import prepare_packages
from traces.ledger.ledger import Ledger


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with two packages called plain and narrow."""
    folder = tmp_path_factory.mktemp("record")
    store, packages = prepare_packages(folder)
    store.set_alias("plain", packages["float32"])
    store.set_alias("narrow", packages["bfloat16"])
    return folder / "ledger"


def _record(ledger: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = main(["record", *words, "--ledger", str(ledger), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_workload_with_a_switch_is_recorded(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tenant = task.TENANTS[0]
    items = [
        WorkloadRequest(at_us=place * 1_000, tenant=tenant, question=f"Question {place}?", generation={"max_tokens": 8})
        for place in range(3)
    ]
    switch = ActivatePackage(at_us=3_000, route="primary", package="narrow")
    raw = WorkloadRequest(at_us=4_000, tenant=tenant, prompt_tokens=(70, 71, 72), generation={"max_tokens": 4})
    path = tmp_path / "load.jsonl"
    write_jsonl(path, [*items, switch, raw])
    code, summary = _record(prepared, [str(path), "--package", "plain"], capsys)
    assert code == 0
    assert (summary["requests"], summary["events_dropped"], summary["stopped"]) == (4, 0, False)
    owned = cast("dict[str, int]", summary["engine_time_us"])
    assert owned["prefill"] > 0 and owned["decode"] > 0 and owned["preemption"] == 0
    events = Ledger(prepared).events(run_id=str(summary["run"]))
    activated = [event.payload["package"] for event in events if event.event_type == "package.activated"]
    store = PackageStore(prepared)
    assert activated == [store.resolve("plain"), store.resolve("narrow")]
    assert sum(event.event_type == "request.terminal" for event in events) == 4
    assert events[-1].event_type == "run.completed"


def test_a_trace_file_is_recorded_scaled_to_the_model(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 0, "input_length": 4096, "output_length": 90, "hash_ids": list(range(8))}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, summary = _record(prepared, [str(path), "--package", "plain", "--output-tokens", "2"], capsys)
    assert (code, summary["ok"]) == (0, 3)
    assert summary["prompt_tokens"] == 3 * 128
    assert int(str(summary["cached_tokens"])) > 0
    assert summary["output_tokens"] == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.jsonl", "--package", "plain"], "no such file"),
        (["support-desk"], "2 packages are prepared; say which"),
        (["support-desk", "--package", "green"], "names no package"),
        (["support-desk", "--package", "plain", "--scheduling", "colour=1"], "no field of scheduling"),
        (["support-desk", "--package", "plain", "--scheduling", "block_size=0"], "block_size"),
        (["support-desk", "--deployment", "nowhere"], "no readable deployment"),
    ],
)
def test_bad_input_is_one_clear_error(
    prepared: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["record", *words, "--ledger", str(prepared)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said


@pytest.mark.parametrize(
    "setting", ["context_multiple=7", "batch_sizes=", "watermark=2", "max_num_seqs=65", "num_blocks=100000000"]
)
def test_scheduling_that_no_engine_could_honour_is_refused_before_anything_is_written(
    prepared: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(prepared.rglob("*"))
    code = main(["record", "support-desk", "--package", "plain", "--scheduling", setting, "--ledger", str(prepared)])
    said = capsys.readouterr().err
    assert code == 2
    assert setting.partition("=")[0].split("_")[0] in said and "fix:" in said
    assert sorted(prepared.rglob("*")) == before


@pytest.mark.parametrize("command", [["record", "support-desk"], ["serve"], ["infer"]])
def test_a_number_of_threads_that_no_machine_has_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--threads", "100"])
    assert ended.value.code == 2
    assert "--threads" in capsys.readouterr().err


def test_a_control_that_names_nothing_is_refused_before_anything_runs(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.jsonl"
    request = WorkloadRequest(at_us=0, tenant=task.TENANTS[0], question="q")
    for switch in (
        ActivatePackage(at_us=1, route="scenic", package="plain"),
        ActivatePackage(at_us=1, route="primary", package="green"),
    ):
        write_jsonl(path, [request, switch])
        assert main(["record", str(path), "--package", "plain", "--ledger", str(prepared)]) == 2
        assert str(path) in capsys.readouterr().err


def test_an_interrupted_run_ends_cleanly_and_is_recorded(prepared: Path, tmp_path: Path) -> None:
    store = PackageStore(prepared)
    desk = create_support_desk(tmp_path / "desk", seed=1, packages={"primary": store.resolve("plain")})
    load = support_desk_workload(1, 6, mean_gap_us=60_000_000)

    def on_sent() -> None:
        signal.raise_signal(signal.SIGINT)

    recording = asyncio.run(record_workload(load, ledger=prepared, deployment=desk, store=store, on_sent=on_sent))
    assert recording.stopped
    assert len(recording.sent) == 1
    ledger = Ledger(prepared)
    ledger.drain()
    types = [event.event_type for event in ledger.events(run_id=recording.run_id)]
    assert types[-1] == "run.completed"
    assert types.count("request.terminal") == types.count("request.accepted")


def test_every_line_of_a_workload_is_a_valid_envelope() -> None:
    requests = [
        *support_desk_workload(3, 20, temperature=0.7).requests,
        WorkloadRequest(at_us=0, tenant="acme", prompt_tokens=(1, 2), deadline_us=5, route="r", conversation="c"),
        WorkloadRequest(at_us=0, tenant="acme", question="q", priority=LOWEST_PRIORITY),
    ]
    for request in requests:
        envelope = parse_envelope(json.dumps(envelope_of(request)).encode())
        assert envelope.tenant == request.tenant
        assert envelope.priority == (request.priority or 0)
        assert envelope.task.kind == ("support" if request.question is not None else "completion")


def test_a_summary_of_nothing_has_no_silent_zeros() -> None:
    summary = summarize(Recording(run_id="run_1"), [])
    assert summary["first_token_us"] == {"p50": None, "p95": None, "p99": None}
    objective = Objective(first_us=1)
    assert summarize(Recording(run_id="run_1"), [], objective=objective)["goodput"]["requests_per_second"] is None
    assert summary["largest_batch"] is None
    assert summary["engine_time_us"] is None


def _sent(
    *generations: list[tuple[int, int]], lag_us: int = 0, status: Literal["ok", "failed"] = "ok"
) -> Sent[Answered]:
    request = WorkloadRequest(at_us=0, tenant="a", question="q")
    outcome = Outcome(status=status, response={}, failure=None, documents=(), pins=None)
    return Sent(
        request=request,
        lag_us=lag_us,
        answer=Answered(outcome=outcome, generations=tuple(tuple(one) for one in generations)),
    )


def test_a_summary_follows_the_definitions_of_serving_benchmarks() -> None:
    slow = _sent([(900, 1), (1_000, 2)], [(5_000, 1), (5_060, 1)], lag_us=100)
    recording = Recording(run_id="r", sent=[slow, _sent([(50, 1)])], wall_us=2_000_000)
    summary = summarize(recording, [])
    at = [summary[name]["p99"] for name in ("first_token_us", "first_token_from_send_us", "end_to_end_us")]
    assert at == [1_000, 900, 5_160]  # TTFT and the end count from the scheduled arrival
    assert summary["per_output_token_us"] == {"p50": 50, "p95": 60, "p99": 60}  # one token has no rate
    assert summary["inter_token_us"]["p99"] == 60 and summary["chunk_gap_us"]["p99"] == 100
    assert summary["send_lag_us"] == {"p50": 0, "p95": 100, "p99": 100}
    assert summary["goodput"] is None
    assert quantiles([5, 1, 9, 7]) == {"p50": 5, "p95": 9, "p99": 9}


def _token(position: int) -> TokenRecord:
    return TokenRecord(token=1, logits_digest="", logprob=0.0, margin=None, step=0, position=position, emitted_us=0)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_comes_in_one_wake_up_is_one_chunk_and_another_prompt_begins_another_generation(
    sizes: list[list[int]],
) -> None:
    async def receive() -> tuple[tuple[tuple[int, int], ...], ...]:
        chunks = TokenChunks()
        position = 0
        for generation in sizes:
            position += 7  # the prompt grew by what a tool said
            for size in generation:
                for _ in range(size):
                    chunks.add(_token(position))
                    position += 1
                await asyncio.sleep(0)
        return chunks.seen()

    seen = asyncio.run(receive())
    assert [[count for _, count in chunks] for chunks in seen] == sizes
    times = [at for chunks in seen for at, _ in chunks]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("objective", "good"),
    [(Objective(first_us=50), 1), (Objective(first_us=1_000), 2), (Objective(first_us=1_000, per_token_us=52.0), 1)],
)
def test_goodput_counts_what_kept_the_objective_among_all_sent(objective: Objective, good: int) -> None:
    late = _sent([(900, 1), (1_000, 2)], [(5_000, 1), (5_060, 1)], lag_us=100)
    sent = [late, _sent([(50, 1)]), _sent([(50, 1)], status="failed")]
    summary = summarize(Recording(run_id="r", sent=sent, wall_us=500_000), [], objective=objective)
    assert summary["goodput"]["requests_per_second"] == good * 2.0
    assert (summary["goodput"]["good"], summary["goodput"]["sent"]) == (good, 3)


def test_the_times_and_goodput_of_a_run_are_printed(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.jsonl"
    ask = WorkloadRequest(at_us=0, tenant=task.TENANTS[0], prompt_tokens=(70, 71, 72), generation={"max_tokens": 4})
    write_jsonl(path, [ask] * 3)
    words = [str(path), "--package", "plain", "--ledger", str(prepared)]
    assert main(["record", *words, "--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in ("first token (TTFT)", "per output token (TPOT)", "between tokens (ITL)", "between chunks", "send lag"):
        assert name in said
    assert "3 of 3 requests kept TTFT <= 60000 ms, TPOT <= 60000 ms" in said
    assert main(["record", *words]) == 0
    assert "--slo-ttft-ms" in capsys.readouterr().out
    code, summary = _record(prepared, [*words[:3], "--slo-ttft-ms", "0.001"], capsys)
    assert (code, cast("dict[str, object]", summary["goodput"])["good"]) == (0, 0)
    gaps = cast("dict[str, int]", summary["chunk_gap_us"])
    assert 0 < gaps["p50"] <= gaps["p95"] <= gaps["p99"]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_an_objective_that_is_no_time_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["record", "support-desk", "--slo-ttft-ms", text])
    assert ended.value.code == 2
    assert "milliseconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "-1", "5.1", "warm"])
def test_a_temperature_that_no_request_takes_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["record", "support-desk", "--temperature", text])
    assert caught.value.code == 2
    assert "--temperature" in capsys.readouterr().err

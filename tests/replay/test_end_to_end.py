"""A recorded run replays exactly; whatever is changed on purpose is never called exact and is named by its layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from replay.cli import main
from replay.generations import load_sequences
from replay.jobs import Job, Report
from replay.plan import Level, assess
from replay.records import load_run
from replay.surroundings import surroundings_of
from replay.verdict import ReplayVerdict, Verdict
from replay.worker import run_job
from runtime.models.reference import task
from runtime.serve.databases import build_corpus
from tests.replay.recorded import CANARY, Recorded
from traces.evidence import hex_digest

Replay = Callable[..., dict[str, ReplayVerdict]]
OWNED = '{"account":"0000","plan":"gold","status":"active","balance":"1","orders":"1"}'


@pytest.fixture(scope="module")
def replay(recorded: Recorded) -> Replay:
    """Replay requests in this process, without the cost of a worker; returns the verdicts by request."""

    def run(*settings: str, mode: str = "faithful", requests: Sequence[str] | None = None) -> dict[str, ReplayVerdict]:
        found: dict[str, ReplayVerdict] = {}

        def say(report: Report) -> None:
            if report.kind == "verdict":
                found[report.body["request"]] = ReplayVerdict.from_document(report.body["verdict"])

        wanted = recorded.references() if requests is None else tuple(requests)
        job = Job(ledger=recorded.path, run_id=recorded.run_id, requests=wanted, mode=mode, settings=settings)
        run_job(job, say)
        return found

    return run


def _layers(verdicts: dict[str, ReplayVerdict]) -> set[str | None]:
    return {verdict.layer for verdict in verdicts.values() if verdict.verdict is Verdict.DIVERGED}


def test_the_command_replays_every_request_of_the_run_exactly(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["run", recorded.run_id, "--json", "--ledger", str(recorded.path)])
    printed = json.loads(capsys.readouterr().out)
    assert printed["summary"] == {"exact": 12}
    assert code == 0
    child = printed["replays"][0]["replay"]["run"]
    assert main(["show", f"{child}/{recorded.references()[0]}", "--json", "--ledger", str(recorded.path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"]["verdict"] == "exact"
    assert sum(row["critical_us"] for row in shown["waterfall"]) > 0
    both = [recorded.references()[0], f"{child}/{recorded.references()[0]}"]
    assert main(["diff", *both, "--json", "--ledger", str(recorded.path)]) == 0
    assert json.loads(capsys.readouterr().out)["pins"] == []


def test_every_command_prints_for_people_too(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--ledger", str(recorded.path)]
    first, second = recorded.references()[:2]
    for words, code, says in (
        (["list"], 0, "serve"),
        (["list", recorded.run_id], 0, "validation_policy"),
        (["last"], 0, "asked:"),
        (["show", first], 0, "waterfall"),
        (["show", first], 0, "time in the engine"),
        (["check", first], 0, "bitwise replay is reachable"),
        (["check", recorded.run_id], 0, "12 requests: 12 bitwise"),
        (["diff", first, second], 1, "pins that differ"),
    ):
        assert main([*words, *place]) == code, words
        assert says in capsys.readouterr().out, words


def test_an_option_of_preparations_is_refused_for_a_request(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", recorded.references()[0], "--stop-at-first", "--ledger", str(recorded.path)]
    assert main(words) == 2
    assert "--stop-at-first does not apply to a request" in capsys.readouterr().err


def test_two_requests_that_part_are_shown_token_by_token(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    first = recorded.references()[0]
    code = main(["run", first, "--set", "generation.seed=77", "--ledger", str(recorded.path)])
    assert code == 1
    assert "set, can explain this: generation.seed" in capsys.readouterr().out
    recorded.ledger.drain()
    child = max(recorded.ledger.events(event_type="run.started"), key=lambda event: event.ts_us).run_id
    assert main(["diff", first, f"{child}/{first}", "--ledger", str(recorded.path)]) == 1
    printed = capsys.readouterr().out
    assert "tokens around the first difference" in printed
    assert "generation.seed" in printed


def test_two_packages_are_told_apart_by_the_preparation_stage_at_which_they_part(
    recorded: Recorded, replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    first, place = recorded.references()[0], ["--ledger", str(recorded.path)]
    (verdict,) = replay("compiler.precision=bfloat16", requests=[first]).values()
    both = [first, f"{verdict.replay['run']}/{first}"]
    assert main(["diff", *both, "--brief", *place]) == 1
    assert "the packages part at preparation stage a01 capture" in capsys.readouterr().out
    assert main(["diff", *both, "--json", *place]) == 1
    assert json.loads(capsys.readouterr().out)["preparation"]["stages_compared"] == 9
    assert main(["show", first, *place]) == 0
    shown = capsys.readouterr().out
    assert "how its package was prepared" in shown
    assert "a09 warm" in shown


def test_a_whole_run_replays_together_with_equal_verdicts(
    recorded: Recorded, replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows of a recorded call at once: every request exact, through the same stages; one request is refused it."""
    said: list[Report] = []
    job = Job(ledger=recorded.path, run_id=recorded.run_id, requests=recorded.references(), together=True)
    run_job(job, said.append)
    (ready,) = [report.body for report in said if report.kind == "progress"]
    verdicts = {one.body["request"]: one.body["verdict"] for one in said if one.kind == "verdict"}
    apart = {reference: verdict.to_document() for reference, verdict in replay().items()}
    slices = [one["replay"].pop("slice") for one in apart.values()]
    assert ready["generations"] >= 12
    assert ready["calls"] < sum(one["own_calls"] + one["prefix_calls"] for one in slices)
    for reference, verdict in verdicts.items():
        assert verdict["replay"].pop("slice") is None
        for one in (verdict, apart[reference]):
            one["replay"].pop("run")
        assert verdict == apart[reference]
        assert verdict["verdict"] == "exact"
    words = ["run", recorded.references()[0], "--together", "--ledger", str(recorded.path)]
    assert main(words) == 2
    assert "whole run" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_whose_worker_is_killed_under_way_together_is_replayed_one_by_one_and_says_so(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """SIGKILL to the real worker while it loads the package for the ensemble."""
    killed: list[int] = []
    decode = Report.decode

    def decode_and_kill(text: str) -> Report:
        report = decode(text)
        if report.kind == "loading" and not killed:
            (worker,) = [one for one in psutil.Process().children() if "replay.worker" in one.cmdline()]
            killed.append(worker.pid)
            worker.kill()
        return report

    monkeypatch.setattr(Report, "decode", decode_and_kill)
    words = ["run", recorded.run_id, "--together", "--ledger", str(recorded.path)]
    assert main([*words, "--json"] if as_json else words) == 0
    assert killed
    printed = capsys.readouterr()
    if as_json:
        document = json.loads(printed.out)
        assert document["summary"] == {"exact": len(recorded.references())}
        assert "signal 9" in document["notes"][0]
        assert all(one["replay"]["slice"] is not None for one in document["replays"])
    else:
        assert "one by one" in printed.out and "signal 9" in printed.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "pin"),
    [
        (["artifact.quantization=int8"], "artifact.quantization"),
        (["compiler.optimization_level=basic"], "compiler.optimization_level"),
        (["compiler.flags.disable_optimizers=QuickGeluFusion"], "compiler.flags.disable_optimizers"),
        (["compiler.flags.memory_pattern=1"], "compiler.flags.session.memory_pattern"),
    ],
)
def test_a_package_that_nobody_prepared_is_prepared_for_a_replay_where_the_model_is_at_hand(
    replay: Replay, recorded: Recorded, settings: list[str], pin: str
) -> None:
    first = recorded.references()[:1]
    (verdict,) = replay("compiler.backend=onnxruntime", *settings, requests=first).values()
    assert verdict.verdict in (Verdict.DIVERGED, Verdict.WITHIN_TOLERANCE), verdict.detail
    assert pin in {change["pin"] for change in verdict.pins_changed}


@pytest.mark.parametrize("mode", ["faithful", "forced", "audit"])
def test_unchanged_replays_are_exact(replay: Replay, mode: str) -> None:
    assert {verdict.verdict for verdict in replay(mode=mode).values()} == {Verdict.EXACT}


def test_requests_alone_have_other_bits(replay: Replay) -> None:
    verdicts = replay(mode="alone")
    assert "bits" in _layers(verdicts)
    assert _layers(verdicts) <= {"bits", "margin", "token"}


@pytest.mark.parametrize(
    ("setting", "layer"),
    [
        ("compiler.precision=bfloat16", "bits"),
        ("scheduling.max_num_batched_tokens=16", "schedule"),
        ("policy.policy_version=support-desk/2", "decision"),
    ],
)
def test_a_planted_change_is_named_by_its_layer_for_every_request(replay: Replay, setting: str, layer: str) -> None:
    verdicts = replay(setting)
    assert {verdict.verdict for verdict in verdicts.values()} == {Verdict.DIVERGED}
    assert _layers(verdicts) == {layer}
    for verdict in verdicts.values():
        assert [change["pin"] for change in verdict.pins_changed if change["set"]] == [setting.partition("=")[0]]
        assert setting.partition("=")[0] in verdict.suspects


@pytest.mark.parametrize("setting", ["generation.seed=12345", "generation.temperature=3"])
def test_another_draw_is_never_exact_and_shows_in_tokens(recorded: Recorded, replay: Replay, setting: str) -> None:
    sampled = [
        reference
        for reference, sent in zip(recorded.references(), recorded.sent(), strict=True)
        if "temperature" in sent.request.generation
    ]
    verdicts = replay(setting, requests=sampled)
    assert Verdict.EXACT not in {verdict.verdict for verdict in verdicts.values()}
    assert _layers(verdicts) == {"token"}


def test_another_index_shows_in_the_input(recorded: Recorded, replay: Replay, tmp_path: Path) -> None:
    build_corpus(tmp_path / "other.sqlite", task.corpus(77))
    asked = [ref for ref, sent in zip(recorded.references(), recorded.sent(), strict=True) if sent.request.question]
    verdicts = replay(f"context.index_digest={tmp_path / 'other.sqlite'}", requests=asked)
    assert Verdict.EXACT not in {verdict.verdict for verdict in verdicts.values()}
    assert _layers(verdicts) == {"input"}


def test_another_tool_result_shows_in_the_tool_layer(recorded: Recorded, replay: Replay) -> None:
    denied = [
        str(sent.answer.outcome.response["request"])
        for sent in recorded.sent()
        if sent.answer is not None and (sent.answer.outcome.failure or {}).get("error_type") == "account_not_owned"
    ]
    assert denied, "the workload is to hold a tool call"
    verdicts = replay(f"tools.result.lookup_account={OWNED}", requests=denied)
    assert _layers(verdicts) == {"tool"}
    assert len(verdicts) == len(denied)


def test_another_instruction_set_changes_bits_in_the_worker(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = "hardware.environment.ATEN_CPU_CAPABILITY=default"
    words = ["run", recorded.references()[1], "--set", setting, "--json", "--ledger", str(recorded.path)]
    code = main(words)
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["verdict"] in ("diverged", "within_tolerance")  # the same bits only where no kernel is faster
    assert verdict["pins_changed"][0]["pin"] == "hardware.environment.ATEN_CPU_CAPABILITY"
    if verdict["verdict"] == "diverged":
        assert (code, verdict["layer"]) == (1, "bits")


def test_a_pin_that_cannot_be_set_is_refused_before_anything_runs(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", recorded.references()[0], "--json", "--ledger", str(recorded.path)]
    for setting in ("hardware.cpu_model=abacus", "generation.seed=many"):
        assert main([*words, "--set", setting]) == 2
        verdict = json.loads(capsys.readouterr().out)
        assert verdict["verdict"] == "refused"
        assert verdict["refused_pin"] == setting.partition("=")[0]


@pytest.mark.parametrize("setting", ["scheduling.context_multiple=7", f"scheduling.num_blocks={10**13}"])
def test_scheduling_that_no_engine_could_honour_is_refused(recorded: Recorded, replay: Replay, setting: str) -> None:
    (verdict,) = replay(setting, requests=recorded.references()[:1]).values()
    assert (verdict.verdict, verdict.refused_pin) == (Verdict.REFUSED, setting.partition("=")[0])
    assert verdict.replay["fix"]


def test_a_backend_that_was_never_prepared_is_refused_by_its_pin_without_the_model(
    replay: Replay, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.prepare.sources.find_source", lambda *_, **__: None)
    (verdict,) = replay("compiler.backend=onnxruntime", requests=recorded.references()[:1]).values()
    assert (verdict.verdict, verdict.refused_pin) == (Verdict.REFUSED, "compiler.backend")
    assert "replaylab prepare" in str(verdict.replay["fix"])


def test_no_text_of_another_tenant_is_in_a_replay(recorded: Recorded, replay: Replay) -> None:
    first, second = task.TENANTS
    (child,) = {str(verdict.replay["run"]) for verdict in replay(requests=recorded.references(first)).values()}
    recorded.ledger.drain()
    events = recorded.ledger.events(run_id=child)
    blobs = {reference for event in events for reference in (event.input_ref, event.result_ref) if reference}
    texts = [recorded.ledger.read_blob(reference).decode() for reference in blobs]
    texts += [json.dumps(event.payload, ensure_ascii=False) for event in events]
    foreign = [article.text for article in task.corpus(5) if article.tenant == second]
    own = {article.text for article in task.corpus(5) if article.tenant == first}
    assert len(blobs) > 50
    for text in texts:
        assert CANARY not in text
        assert not any(article in text for article in foreign if article not in own)
    assert all(len(hex_digest(reference)) == 64 for reference in blobs)


@pytest.mark.parametrize("place", [0, 7, 30])
def test_a_lost_step_lowers_the_promise_of_those_who_need_it(recorded: Recorded, place: int) -> None:
    run = load_run(recorded.ledger, recorded.run_id)
    lost = run.shared_of_type("engine.step")[place]
    damaged = replace(run, shared=tuple(event for event in run.shared if event is not lost))
    here = surroundings_of(recorded.ledger, damaged)
    reached = {reference: assess(request, here) for reference, request in damaged.requests.items()}
    lowered = {reference for reference, reach in reached.items() if reach.level is Level.TOKEN}
    assert lowered
    assert all(reached[reference].missing[0].pin == "record.engine_step" for reference in lowered)
    for reference, request in run.requests.items():
        ran = {
            step
            for sequence in load_sequences(recorded.ledger, request.events)
            if sequence.result is not None
            for step in sequence.result.steps
        }
        if lost.step in ran:
            assert reference in lowered


def test_the_canary_is_there_to_be_found(recorded: Recorded) -> None:
    asked = recorded.ledger.events(run_id=recorded.run_id, event_type="request.accepted")
    texts = [recorded.ledger.read_blob(event.input_ref).decode() for event in asked if event.input_ref]
    assert sum(CANARY in text for text in texts) == len(recorded.references(task.TENANTS[1]))


def test_check_promises_bitwise_and_no_more_than_an_audit_without_the_package(
    recorded: Recorded, replay: Replay
) -> None:
    run = load_run(recorded.ledger, recorded.run_id)
    reached = surroundings_of(recorded.ledger, run)
    assert {assess(request, reached).level for request in run.requests.values()} == {Level.BITWISE}
    package = recorded.store.path(recorded.packages["float32"])
    away = package.with_name("away")
    package.rename(away)
    try:
        lost = surroundings_of(recorded.ledger, run)
        for request in run.requests.values():
            reach = assess(request, lost)
            assert reach.level is Level.DECISION
            assert reach.missing[0].pin == "artifact.package_digest"
        (verdict,) = replay(requests=recorded.references()[:1]).values()
        assert (verdict.verdict, verdict.refused_pin) == (Verdict.REFUSED, "artifact.package_digest")
        audited = replay(mode="audit")  # the other package has the tokenizer, and an audit needs no more
        assert {verdict.verdict for verdict in audited.values()} == {Verdict.EXACT}
    finally:
        away.rename(package)

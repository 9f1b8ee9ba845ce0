"""One-shot requests, preparations and rebuilds that the product itself recorded are told whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import replaylab
from dashboards import ledger as pages_ledger
from dashboards.one_shot import PARTS, call_rows, part_latency, part_spans
from dashboards.story import RequestStory
from replay.cli import main as replay
from tests.dashboards.test_pages import draw, said
from tests.runtime.one_shot_models import save_onnx_classifier
from traces.ledger.ledger import Ledger


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a classifier, fail to prepare another, answer three requests, refuse a fourth, replay and rebuild."""
    folder = tmp_path_factory.mktemp("one-shot")
    path, model = folder / "ledger", save_onnx_classifier(folder / "classifier.onnx")
    prepare = ["prepare", str(model), "--backend", "onnxruntime", "--ledger", str(path)]
    assert replaylab.main([*prepare, "--name", "classifier"]) == 0
    assert replaylab.main([*prepare, "--max-batch", "8", "--max-step", "1"]) != 0
    values = np.random.default_rng(5)
    files: list[str] = []
    for index, width in enumerate((16, 16, 16, 15)):
        files.append(str(folder / f"{index}.npz"))
        np.savez(files[-1], features=values.standard_normal((1, width)).astype(np.float32))
    assert replaylab.main(["infer", "classifier", *files[:3], "--ledger", str(path)]) == 0
    assert replaylab.main(["infer", "classifier", *files, "--ledger", str(path)]) != 0
    Ledger(path).drain()
    whole = next(row for row in pages_ledger.runs(path) if row.kind == "inference" and row.outcome == "ok")
    rebuilt = next(row for row in pages_ledger.runs(path) if row.kind == "preparation" and row.outcome == "ok")
    assert replay(["run", whole.run_id, "--ledger", str(path)]) == 0
    assert replay(["run", rebuilt.run_id, "--ledger", str(path)]) == 0
    Ledger(path).drain()
    return path


def run_of(path: Path, kind: str, outcome: str) -> str:
    return next(row.run_id for row in pages_ledger.runs(path) if (row.kind, row.outcome) == (kind, outcome))


def stories(path: Path) -> list[RequestStory]:
    run = run_of(path, "inference", "ok")
    found = [pages_ledger.story(path, run, row.request_ref) for row in pages_ledger.requests(path, run)]
    return [story for story in found if story is not None]


def test_runs_say_how_each_ended(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = draw("runs", ledger, monkeypatch).dataframe[0].value
    told = sorted(zip(listed["Kind"], listed["Outcome"], strict=True))
    assert told == [
        ("inference", "ok"),
        ("inference", "\N{HEAVY BALLOT X} input refused"),
        ("preparation", "ok"),
        ("preparation", "\N{HEAVY BALLOT X} WarmupRefused"),
        ("replay", "1 exact"),
        ("replay", "3 exact"),
    ]
    assert set(listed["What"][listed["Kind"] == "inference"]) == {"infer classifier.onnx"}


def test_one_shot_requests_have_ended_and_were_timed(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(ledger, "inference", "ok")
    test = draw("runs", ledger, monkeypatch, run=run)
    requests = test.dataframe[1].value
    assert list(requests["Status"]) == ["ok"] * 3
    assert "\N{EN DASH}" not in set(requests["End to end"])
    assert "No stage was timed" not in said(test)
    assert "No engine steps" not in said(test)
    assert [row.stage for row in part_latency(pages_ledger.one_shots(ledger, run))] == list(PARTS)


def test_calls_hold_every_request_once(ledger: Path) -> None:
    calls = call_rows(pages_ledger.calls(ledger, run_of(ledger, "inference", "ok")))
    assert sum(call.requests for call in calls) == 3
    assert all(call.rows <= call.padded_rows for call in calls)


def test_parts_add_up_to_the_end_to_end_time(ledger: Path) -> None:
    for story in stories(ledger):
        assert story.one_shot is not None
        spans = part_spans(story.one_shot)
        assert sum(span.critical_us for span in spans) == story.total_us
        assert [span.start_us for span in spans[1:]] == [span.end_us for span in spans[:-1]]


def test_one_shot_request_says_its_time_its_call_and_its_outputs(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = stories(ledger)[0]
    page = said(draw("request", ledger, monkeypatch, run=story.run_id, request=story.request_ref))
    assert "running" not in page
    assert "turned away" not in page
    assert "failed before a route" not in page
    assert all(word in page for word in ("probabilities", "rows of the call", "padded to"))


def test_two_one_shot_requests_are_compared_by_input_and_output(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = stories(ledger)[:2]
    sides = {"left_run": one.run_id, "left": one.request_ref, "right_run": two.run_id}
    page = said(draw("compare", ledger, monkeypatch, **sides, right=two.request_ref))
    assert "They were given different input" in page
    assert "probabilities" in page
    same = said(draw("compare", ledger, monkeypatch, **sides, right=one.request_ref))
    assert "Every output is the same to the bit" in same


def test_a_replay_of_one_shot_requests_is_a_verdict_and_nothing_to_compare(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(ledger, "replay", "3 exact")
    page = draw("runs", ledger, monkeypatch, run=run)
    assert list(page.dataframe[1].value["Status"]) == ["replayed"] * 3
    assert next(row.failed for row in pages_ledger.runs(ledger) if row.run_id == run) == 0
    story = stories(ledger)[0]
    shown = said(draw("request", ledger, monkeypatch, run=story.run_id, request=story.request_ref))
    assert "compare?" not in shown
    replayed = said(draw("request", ledger, monkeypatch, run=run, request=story.request_ref))
    assert "keeps a verdict" in replayed


def test_what_was_refused_says_why(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = said(draw("runs", ledger, monkeypatch, run=run_of(ledger, "inference", "\N{HEAVY BALLOT X} input refused")))
    assert "dimension 1 is 15, expected 16" in page

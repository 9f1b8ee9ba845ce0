"""A request's events become stages, spans, tokens and steps, in order and without a guess."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dashboards import ledger as pages_ledger
from dashboards.conversation import conversation
from dashboards.engine_view import engine_time, engines, first_difference, generations, own_steps, step_rows, token_rows
from dashboards.story import RequestStory, span_rows, tell
from tests.dashboards.made_up import RUN, request_ref, write_ledger
from traces.ledger.ledger import Ledger
from traces.recorder import Recorder
from traces.stages import Stage


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return write_ledger(tmp_path_factory.mktemp("story") / "ledger")


def story_of(ledger: Ledger, number: int) -> RequestStory:
    return tell(ledger.events(run_id=RUN, request_ref=request_ref(number)), ledger.read_blob)


def test_ten_stages_are_paired_and_timed(ledger: Ledger) -> None:
    story = story_of(ledger, 0)
    assert [run.stage.number for run in story.stages] == list(range(1, 11))
    assert all(run.status == "ok" for run in story.stages)
    assert story.stages[5].duration_us == 64_000


def test_critical_path_sums_to_the_end_to_end_time(ledger: Ledger) -> None:
    story = story_of(ledger, 0)
    spans = span_rows(story.stages, total_us=story.total_us)
    assert sum(span.critical_us for span in spans) == story.total_us == 128_000


def test_failure_keeps_its_class_stage_and_message(ledger: Ledger) -> None:
    story = story_of(ledger, 1)
    assert (story.status, story.failure_class, story.failed_stage) == ("failed", "tool_side_effect", "b07")
    assert story.stages[-1].status == "error"
    assert Stage.RESPONSE not in {run.stage for run in story.stages}


def test_pins_are_read_from_evidence(ledger: Ledger) -> None:
    pins = story_of(ledger, 2).pins
    assert pins is not None
    assert pins["compiler"]["precision"] == "bfloat16"


def test_stage_without_an_end_stays_open(tmp_path: Path) -> None:
    with Recorder(tmp_path / "ledger", run_id="run_1", component="runtime") as recorder:
        recorder.emit("stage.started", stage=Stage.PREFILL, attempt=1, request_ref="req_1")
    ledger = Ledger(tmp_path / "ledger")
    ledger.drain()
    story = tell(ledger.events(request_ref="req_1"), ledger.read_blob)
    assert (story.status, story.total_us, story.stages[0].status) == ("running", None, "running")
    assert span_rows(story.stages) == ()


def test_tokens_carry_their_numbers_and_steps_their_rows(ledger: Ledger) -> None:
    story = story_of(ledger, 3)
    results = generations(story.sequences, ledger.read_blob)
    rows = token_rows(results, lambda token: None)
    assert len(rows) == 18
    assert rows[0].text is None
    events = ledger.events(run_id=RUN, event_type="engine.step")
    assert engines(events) == ["engine-0"]
    steps = step_rows(events, own_steps(results), engine_id="engine-0")
    assert sum(step.own for step in steps) == 18
    assert max(step.rows for step in steps) == 4
    assert steps[0].prefill_tokens == 88


def test_first_difference_tells_bits_from_tokens(ledger: Ledger) -> None:
    story = story_of(ledger, 3)
    rows = token_rows(generations(story.sequences, ledger.read_blob), lambda token: None)
    assert first_difference(rows, rows) == (None, None)
    assert first_difference(rows, rows[:5]) == (None, 5)


def test_question_and_answer_are_read_in_words(ledger: Ledger) -> None:
    answered = {
        "result": {"answer": "33 percent."},
        "citations": [{"source": "P-1"}],
        "tools": [{"tool": "lookup_account"}],
    }
    kept: dict[str | None, bytes] = {
        "asked": json.dumps({"task": {"kind": "support", "question": "How much?"}}).encode(),
        "answered": json.dumps(answered).encode(),
    }
    story = replace(story_of(ledger, 0), accepted_ref="asked", response_ref="answered")
    told = conversation(story, kept.__getitem__)
    assert (told.question, told.answer, told.citations) == ("How much?", "33 percent.", ("P-1",))
    assert told.tools == ("lookup_account",)
    assert conversation(replace(story, response_ref=None), kept.__getitem__).answer is None


def test_reading_makes_no_ledger(tmp_path: Path) -> None:
    assert not pages_ledger.exists(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_engine_time_is_added_up_or_left_out() -> None:
    """Over all generations; one that was not measured leaves the whole unknown, not smaller."""
    measured = {"latency": {"queue_us": 3, "decode_us": 4}}
    assert engine_time([measured, measured]) == {"queue": 6, "decode": 8}
    assert engine_time([measured, {"latency": None}]) == engine_time([]) == {}

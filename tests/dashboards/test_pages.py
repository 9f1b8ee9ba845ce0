"""Every page draws on a made-up ledger, says what to do on an empty one, and shows recorded text as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from dashboards import app
from tests.dashboards.made_up import CANARY, REPLAY, RUN, request_ref, write_ledger
from traces.recorder import Recorder

APP = str(Path(app.__file__))
ESCAPED = CANARY.replace("<", "&lt;").replace(">", "&gt;")
LAST = request_ref(3)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made-up") / "ledger"
    write_ledger(path)
    return path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Streamlit starts threads of its own whose warnings are not ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMLIT_BROWSER_GATHER_USAGE_STATS", "false")
        yield


def draw(page: str, ledger: Path, monkeypatch: pytest.MonkeyPatch, **parameters: str) -> AppTest:
    """Run one page as a browser would see it."""
    monkeypatch.setenv("REPLAYLAB_LEDGER", str(ledger))

    def script(page: str) -> None:
        import importlib

        importlib.import_module(f"dashboards.views.{page}").show()

    test = AppTest.from_function(script, default_timeout=60, kwargs={"page": page})
    for name, value in parameters.items():
        test.query_params[name] = value
    test.run()
    assert not test.exception, [error.message for error in test.exception]
    return test


def said(test: AppTest) -> str:
    """Return all HTML, captions and code of a page."""
    found: list[str] = []

    def walk(block: Any) -> None:
        for child in getattr(block, "children", {}).values():
            found.append(str(getattr(getattr(child, "proto", None), "body", "")))
            walk(child)

    walk(test.main)
    return "\n".join(found)


def test_whole_app_draws_its_first_page(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLAYLAB_LEDGER", str(ledger))
    test = AppTest.from_file(APP, default_timeout=60).run()
    assert not test.exception
    assert test.title[0].value == "Runs"


def test_runs_lists_both_runs_and_opens_the_live_one(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = draw("runs", ledger, monkeypatch)
    listed = test.dataframe[0].value
    assert list(listed["Kind"]) == ["replay", "live"]
    assert list(listed["Outcome"]) == ["1 diverged, 3 exact", "ok"]
    requests = test.dataframe[1].value
    assert list(requests["Replays"])[-1] == "faithful: diverged"
    assert requests["Status"][1] == "\N{HEAVY BALLOT X} tool side effect"
    assert [tab.label for tab in test.tabs] == ["Requests", "Time by stage", "Engine"]


def test_request_shows_time_pins_tokens_and_failure(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = draw("request", ledger, monkeypatch, run=RUN, request=request_ref(1))
    page = said(test)
    assert "Tool failure or ambiguous side effect" in page
    assert "did not run" in page
    for dimension in ("artifact", "compiler", "hardware", "scheduling", "generation", "context", "tools", "policy"):
        assert f"<b>{dimension}</b>" in page
    assert page.count("margin 0.") + page.count("margin ") > 10


def test_recorded_text_is_shown_as_text(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page, parameters in (("runs", {"run": RUN}), ("request", {"run": RUN, "request": request_ref(1)})):
        html = said(draw(page, ledger, monkeypatch, **parameters))
        assert ESCAPED in html
        assert CANARY not in html


def test_compare_names_the_first_difference_of_a_replay(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = draw("compare", ledger, monkeypatch, left_run=RUN, left=LAST, right_run=REPLAY, right=LAST)
    page = said(test)
    assert "The logits have other bits" in page
    assert "bits part at token 6, tokens part at token 11" in page
    assert "parts here" in page


def test_compare_names_the_pin_that_differs(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = draw("compare", ledger, monkeypatch, left_run=RUN, left=request_ref(0), right_run=RUN, right=request_ref(2))
    page = said(test)
    assert "<b>compiler</b>.precision" in page
    assert "bfloat16" in page


def test_request_of_another_tenant_is_never_named(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = said(draw("request", ledger, monkeypatch, run=RUN, request=request_ref(0)))
    assert all(request_ref(number) not in page for number in (1, 2, 3))


@pytest.mark.parametrize("page", ["runs", "request", "compare"])
def test_empty_ledger_names_the_command_to_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = draw(page, tmp_path / "nothing", monkeypatch)
    assert "replaylab record" in test.code[0].value
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("page", ["runs", "request", "compare"])
def test_events_that_wait_are_no_empty_ledger(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder(tmp_path / "ledger", run_id=RUN, component="runtime") as recorder:
        recorder.commit("run.started", payload={"kind": "serve", "label": "support-desk"})
    test = draw(page, tmp_path / "ledger", monkeypatch)
    assert "replaylab ledger drain" in test.code[0].value
    assert "here yet" not in said(test)


def test_unknown_request_is_said_and_no_error(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = said(draw("request", ledger, monkeypatch, run="run_unknown", request="req_unknown"))
    assert "run_unknown</span> is not in this ledger" in page
    assert "req_unknown</span> is not in this run" in said(
        draw("request", ledger, monkeypatch, run=RUN, request="req_unknown")
    )
    assert "run_unknown</span> is not in this ledger" in said(draw("runs", ledger, monkeypatch, run="run_unknown"))
    assert "is not in this" not in said(draw("request", ledger, monkeypatch, run=RUN, request=LAST))

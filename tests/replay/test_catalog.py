"""What ran is listed newest first, and a short id means one recording or is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from replay.catalog import Target, last_incident, list_requests, list_runs, resolve
from replay.cli import main
from replay.errors import UnknownRecording
from tests.replay.conftest import MadeUpLedger
from traces.ledger.ledger import Ledger


@pytest.fixture
def ledger(made_up: MadeUpLedger) -> Ledger:
    live = made_up.run("run_aa01", workload="support")
    made_up.request(live, "req_0001", status="ok", output_tokens=7, duration_us=1500)
    made_up.request(live, "req_0002", status="error", failure_class="validation_policy")
    made_up.request(live, "req_0113")
    live.commit("run.completed")
    again = made_up.run("run_ab02", kind="replay", parent_run="run_aa01", mode="faithful")
    made_up.request(again, "req_0001", status="ok")
    again.emit("replay.verdict", request_ref="req_0001", payload={"verdict": "exact"})
    return made_up.drained()


def test_runs_are_listed_newest_first_with_what_became_of_their_requests(ledger: Ledger) -> None:
    replayed, live = list_runs(ledger)
    assert (live.run_id, live.kind, live.requests, live.outcomes) == ("run_aa01", "live", 3, {"ok": 1, "error": 1})
    assert (replayed.kind, replayed.parent, replayed.verdicts) == ("replay", "run_aa01", {"exact": 1})
    assert live.ended_us is not None
    assert replayed.ended_us is None


def test_a_request_that_never_ended_is_listed_as_such(ledger: Ledger) -> None:
    statuses = {one.request_ref: one.status for one in list_requests(ledger, "run_aa01")}
    assert statuses == {"req_0001": "ok", "req_0002": "error", "req_0113": None}


def test_a_request_means_its_live_run_and_a_path_means_the_replay(ledger: Ledger) -> None:
    assert resolve(ledger, "req_0001") == Target(run_id="run_aa01", request_ref="req_0001")
    assert resolve(ledger, "run_ab/req_0001") == Target(run_id="run_ab02", request_ref="req_0001")
    assert resolve(ledger, "run_ab") == Target(run_id="run_ab02")
    assert resolve(ledger, "011") == Target(run_id="run_aa01", request_ref="req_0113")


@pytest.mark.parametrize(
    ("text", "says"), [("req_000", "means 2 recordings"), ("zz", "no run or request"), ("", "no ")]
)
def test_an_id_that_means_nothing_or_several_things_is_refused(ledger: Ledger, text: str, says: str) -> None:
    with pytest.raises(UnknownRecording, match=says):
        resolve(ledger, text)


def test_the_newest_incident_is_the_request_that_last_failed(ledger: Ledger, made_up: MadeUpLedger) -> None:
    assert last_incident(ledger) == Target(run_id="run_aa01", request_ref="req_0002")
    fine = made_up.run("run_ac03")
    made_up.request(fine, "req_0009", status="ok")
    fine.commit("replay.verdict", request_ref="req_0009", payload={"verdict": "diverged"})
    made_up.drained()
    assert last_incident(ledger) == Target(run_id="run_ac03", request_ref="req_0009")


def test_list_prints_runs_and_requests(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--ledger", str(ledger.layout.root)]
    assert main(["list", *place]) == 0
    assert "replay (faithful)" in capsys.readouterr().out
    assert main(["list", "run_aa", "--json", *place]) == 0
    assert [one["request"] for one in json.loads(capsys.readouterr().out)] == ["req_0001", "req_0002", "req_0113"]


def test_a_missing_ledger_and_an_unknown_run_are_one_clear_error(
    ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "--ledger", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
    assert "there is no ledger in" in capsys.readouterr().err
    assert main(["list", "run_zz", "--json", "--ledger", str(ledger.layout.root)]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["error_type"] == "unknown_recording"


def test_help_and_list_load_no_heavy_library(ledger: Ledger) -> None:
    code = (
        "import sys; from replay.cli import main\n"
        f"main(['list', '--ledger', {str(ledger.layout.root)!r}])\n"
        "print(sorted({'torch', 'onnxruntime', 'transformers', 'scipy', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")

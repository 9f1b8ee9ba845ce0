"""`replay blame` names what changed a request of a real run, tells its own tenant from others, and says so in JSON."""

from __future__ import annotations

import json

import pytest

from replay.blame_job import BlameJob
from replay.blame_worker import run_blame
from replay.cli import main
from replay.commands.blame import around
from replay.errors import IncompleteRecord
from replay.jobs import Report
from tests.replay.recorded import Recorded


def found_of(recorded: Recorded, reference: str, **options: int) -> list[Report]:
    """Search in this process, without the cost of a worker."""
    said: list[Report] = []
    job = BlameJob(ledger=recorded.path, run_id=recorded.run_id, request=reference, **options)
    run_blame(job, said.append)
    return [report for report in said if report.kind == "found"]


def test_every_request_that_ran_alone_otherwise_gets_a_culprit(recorded: Recorded) -> None:
    """Eager float32 in a busy engine: some neighbour, chunk or hit is to blame, and both ends repeat."""
    tenant_of = dict(zip(recorded.references(), [sent.request.tenant for sent in recorded.sent()], strict=True))
    blamed = 0
    for reference in recorded.references()[:6]:
        for report in found_of(recorded, reference):
            for finding in report.body["findings"]:
                blamed += 1
                assert finding["resolved"]
                assert finding["repeated"]
                neighbour = finding["edit"]["neighbour"]
                if neighbour is not None and neighbour["request"] is not None:
                    assert neighbour["own_tenant"]
                    assert tenant_of[neighbour["request"]] == tenant_of[reference]
                if neighbour is not None and not neighbour["own_tenant"]:
                    assert neighbour["request"] is None
            assert report.body["replays"] <= 40
    assert blamed


def test_the_command_says_it_in_words_and_in_json(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    reference = recorded.references()[3]
    words = ["blame", reference, "--ledger", str(recorded.path)]
    code = main([*words, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert code == (1 if printed["generations"][-1]["findings"] else 0)
    assert printed["request"] == reference
    assert printed["generations"][0]["replays"] >= 2
    assert len(printed["detail"]) == len(printed["generations"])


def test_what_cannot_be_blamed_is_refused(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--ledger", str(recorded.path)]
    assert main(["blame", recorded.run_id, *place]) == 2
    assert "single schedule" in capsys.readouterr().err
    with pytest.raises(IncompleteRecord, match="not a generation 9"):
        found_of(recorded, recorded.references()[0], generation=9)


def test_other_arrivals_are_planned_again_and_counted(recorded: Recorded) -> None:
    """The recorded engine is simulated exactly, generation by generation; moves and samples are told in words too."""
    for reference in recorded.references()[:2]:
        body = found_of(recorded, reference, samples=4, arrivals=True, seed=3)[-1].body
        score, arrivals = body["sensitivity"], body["arrivals"]
        assert score["faithful"]
        assert arrivals["faithful"]
        assert score["bits"]["samples"] == 4
        assert score["bits"]["low"] <= score["bits"]["count"] / 4 <= score["bits"]["high"]
        assert body["replays_around"] <= len(arrivals["shifts"]) + 4
        assert {shift["by"] for shift in arrivals["shifts"]} == {-1, 1}
        assert all(shift["who"] is None or shift["who"]["own_tenant"] == bool(shift["who"]["request"])
                   for shift in arrivals["shifts"])  # fmt: skip
        assert "arrivals jittered by up to 1 step" in "\n".join(around(body))

"""A worker that dies costs one request, never the verdicts on the others, and is never taken for a verdict."""

from __future__ import annotations

import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from replay.errors import ReplayFailed
from replay.jobs import Job, Report
from replay.launch import died, run_job
from replay.verdict import Verdict


def _worker(tmp_path: Path, body: str) -> list[str]:
    """Write a stand-in for the worker: `requests` is what it is to run, `say(kind, **body)` reports."""
    script = tmp_path / "worker.py"
    head = """
        import json, os, sys
        job = json.loads(sys.stdin.readline())
        requests = job["requests"]
        def say(kind, **body):
            print(json.dumps({"kind": kind, "body": body}), flush=True)
        def verdict(request):
            empty = {"layer": None, "stage": None, "step": None, "token_index": None, "pins_changed": [],
                     "refused_pin": None, "original": {}, "replay": {}, "detail": ""}
            say("verdict", request=request, repeat=0, verdict={"verdict": "exact", **empty})
    """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return [sys.executable, str(script)]


def _job(tmp_path: Path, *requests: str, repeat: int = 1) -> Job:
    return Job(ledger=tmp_path, run_id="run_1", requests=requests, repeat=repeat)


def test_a_job_and_a_report_read_back(tmp_path: Path) -> None:
    job = Job(ledger=tmp_path, run_id="run_1", requests=("a",), mode="forced", settings=("generation.seed=2",))
    assert Job.decode(job.encode()) == job
    report = Report(kind="begun", body={"request": "a"})
    assert Report.decode(report.encode()) == report


def test_every_request_of_every_repeat_gets_its_verdict(tmp_path: Path) -> None:
    command = _worker(tmp_path, "for r in requests:\n    say('begun', request=r)\n    verdict(r)\nsay('done')\n")
    found = list(run_job(_job(tmp_path, "a", "b", repeat=2), environment=os.environ, command=command))
    assert [(request, turn, verdict.verdict) for request, turn, verdict in found] == [
        ("a", 0, Verdict.EXACT),
        ("b", 0, Verdict.EXACT),
        ("a", 1, Verdict.EXACT),
        ("b", 1, Verdict.EXACT),
    ]


def test_a_worker_killed_in_a_request_costs_only_that_request(tmp_path: Path) -> None:
    body = """
        for r in requests:
            say("begun", request=r)
            if r == "b":
                print("dying words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), 9)
            verdict(r)
    """
    command = _worker(tmp_path, textwrap.dedent(body))
    found = {
        request: verdict
        for request, _, verdict in run_job(_job(tmp_path, "a", "b", "c"), environment=os.environ, command=command)
    }
    assert [found[name].verdict for name in "abc"] == [Verdict.EXACT, Verdict.UNVERIFIED, Verdict.EXACT]
    assert died(found["b"])
    assert found["b"].replay["failure_class"] == "model_provider"
    assert "dying words" in found["b"].replay["last_words"]
    assert "signal 9" in found["b"].detail


@pytest.mark.parametrize("body", ["sys.exit(7)", "say('failed', message='no package', fix='prepare it')"])
def test_a_worker_that_fails_outside_a_request_fails_the_replay(tmp_path: Path, body: str) -> None:
    with pytest.raises(ReplayFailed, match=r"code 7|no package"):
        list(run_job(_job(tmp_path, "a"), environment=os.environ, command=_worker(tmp_path, body)))


def test_the_worker_has_the_given_environment_and_no_other(tmp_path: Path) -> None:
    body = "assert os.environ.get('MKL_CBWR') == 'AVX2' and 'SECRET' not in os.environ\nverdict(requests[0])"
    environment = {"PATH": os.environ["PATH"], "MKL_CBWR": "AVX2"}
    found = list(run_job(_job(tmp_path, "a"), environment=environment, command=_worker(tmp_path, body)))
    assert len(found) == 1


@pytest.mark.parametrize("reached", ["pass", "say('begun', request='a')", "verdict('a')"])
def test_a_worker_that_dies_computing_all_together_leaves_the_requests_to_be_replayed_one_by_one(
    tmp_path: Path, reached: str
) -> None:
    body = f"""
        if job["together"]:
            {reached}
            print("dying words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        for r in requests:
            say("begun", request=r)
            verdict(r)
    """
    job = replace(_job(tmp_path, "a", "b", repeat=2), together=True)
    said: list[Report] = []
    command = _worker(tmp_path, textwrap.dedent(body))
    found = list(run_job(job, environment=os.environ, command=command, on_report=said.append))
    assert [(request, turn, verdict.verdict) for request, turn, verdict in found] == [
        (name, turn, Verdict.EXACT) for turn in (0, 1) for name in "ab"
    ]
    (fallback,) = [one.body for one in said if one.kind == "apart"]
    assert fallback["exit_code"] == -9 and "dying words" in fallback["last_words"]
    with pytest.raises(ReplayFailed, match="code 7"):  # one by one fails too: nothing is left to try
        list(run_job(job, environment=os.environ, command=_worker(tmp_path, "sys.exit(7)")))

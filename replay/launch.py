"""How does a job get a worker with the recorded environment, and what if that worker dies?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any, NoReturn, Protocol

from replay.errors import ReplayFailed, ReplayRefused
from replay.jobs import Job, Report
from replay.verdict import ReplayVerdict, Verdict
from traces.failures import FailureClass

WORKER = (sys.executable, "-m", "replay.worker")


def run_job(
    job: Job,
    *,
    environment: Mapping[str, str],
    on_report: Callable[[Report], None] = lambda report: None,
    command: Sequence[str] = WORKER,
) -> Iterator[tuple[str, int, ReplayVerdict]]:
    """Run a job and yield (request, repeat, verdict) as each becomes known.

    A worker that dies costs the one request that it was running, which is reported as unverified with the
    model-provider class; another worker goes on with the rest.  One that computes all requests together costs none
    by its death: an `apart` report says so, and what is left is replayed one by one.  ReplayFailed when a worker dies
    or fails outside any request otherwise: the rest would fail alike.
    """
    left = [(request, turn) for turn in range(job.repeat) for request in job.requests]
    while left:
        turn = left[0][1]
        batch = [request for request, its_turn in left if its_turn == turn]
        begun: str | None = None
        with worker_process(replace(job, requests=tuple(batch), repeat=1), environment, command) as (lines, ended):
            for line in lines:
                report = Report.decode(line)
                on_report(report)
                if report.kind == "begun":
                    begun = str(report.body["request"])
                elif report.kind == "verdict":
                    begun = None
                    request = str(report.body["request"])
                    left.remove((request, turn))
                    yield request, turn, ReplayVerdict.from_document(report.body["verdict"])
                elif report.kind == "failed":
                    raise_failed(report.body)
            code, last_words = ended()
        if job.together and code:
            job = replace(job, together=False)
            on_report(Report(kind="apart", body={"exit_code": code, "last_words": last_words}))
        elif begun is not None:
            left.remove((begun, turn))
            yield begun, turn, _worker_died(job, begun, code, last_words)
        elif any(its_turn == turn for _, its_turn in left):
            raise ReplayFailed(
                f"the replay worker ended with code {code} before it ran a request",
                fix="It may not take a changed environment variable. Its last words:\n" + last_words.strip(),
                evidence={"exit_code": code, "last_words": last_words},
            )


class Encodable(Protocol):
    """A job of any kind: one line of JSON."""

    def encode(self) -> str:
        """Return the job as one line."""
        ...


@contextmanager
def worker_process(
    job: Encodable, environment: Mapping[str, str], command: Sequence[str]
) -> Generator[tuple[Iterator[str], Callable[[], tuple[int, str]]]]:
    """Start a worker with one job, which never outlives the block; give its lines, and a wait for its end."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            encoding="utf-8",
        )
        try:
            stdin, stdout = process.stdin, process.stdout
            if stdin is None or stdout is None:
                raise ReplayFailed("the replay worker has no pipes")
            try:
                with stdin:
                    stdin.write(job.encode() + "\n")
            except BrokenPipeError:
                pass  # it died at once: its exit code and last words say more
            yield (line for line in stdout if line.strip()), lambda: (process.wait(), _tail(words))
            stdout.close()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _tail(words: IO[str]) -> str:
    """Return the end of what the worker wrote to standard error."""
    words.seek(0)
    return "".join(words.readlines()[-12:])[-2_000:]


def raise_failed(body: Mapping[str, Any]) -> NoReturn:
    """Raise a worker's own report of failure as the error it was: a refusal, or a replay that broke."""
    message, fix, evidence = str(body["message"]), body.get("fix"), body.get("evidence") or {}
    refused = body.get("refused")
    if refused:
        raise ReplayRefused(
            message,
            fix=fix,
            evidence=evidence,
            failure_class=FailureClass(refused["failure_class"]),
            error_type=refused["error_type"],
        )
    raise ReplayFailed(message, fix=fix, evidence=evidence)


def _worker_died(job: Job, request: str, code: int, last_words: str) -> ReplayVerdict:
    """Return the verdict on a request whose worker died: nothing is known about it."""
    return ReplayVerdict(
        verdict=Verdict.UNVERIFIED,
        original={"run": job.run_id, "request": request},
        replay={
            "run": None,
            "status": "failed",
            "failure_class": "model_provider",
            "error_type": "worker_died",
            "exit_code": code,
            "last_words": last_words,
        },
        detail=f"the worker process died ({how_it_ended(code)}) while it ran this request",
    )


def how_it_ended(code: int) -> str:
    """Say what a process's exit code means."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def died(verdict: ReplayVerdict) -> bool:
    """Tell whether a verdict stands for a replay that broke."""
    return verdict.replay.get("error_type") in ("worker_died", "replay_failed")

"""How does a worker process run one job?  `python -m replay.worker`, which `replay.launch` starts.

Standard output carries reports and nothing else: whatever a library prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from replay.errors import IncompleteRecord, PinRefused, ReplayRefused
from replay.generations import load_sequence_tables
from replay.jobs import THREADS_VARIABLE, Job, Report
from replay.records import RecordedRequest, RecordedRun, load_run
from replay.slices import FEW, plans_of
from replay.substitutes import Substitution, check_values, parse_substitutions
from replay.verdict import ReplayVerdict, Verdict, tally
from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from replay.player import Player
    from runtime.engine.generation import GenerationResult
    from traces.ledger.ledger import Ledger
    from traces.recorder import Recorder

Say = Callable[[Report], None]


def main() -> int:
    """Read one job from standard input, run it, report on standard output."""
    return serve(lambda line, say: run_job(Job.decode(line), say))


def serve(work: Callable[[str, Say], None]) -> int:
    """Do the work that one line on standard input asks for; return the exit code of the process."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints from here on, C libraries included, goes to standard error

    def say(report: Report) -> None:
        reports.write(report.encode() + "\n")
        reports.flush()

    try:
        work(sys.stdin.readline(), say)
    except ClassifiedError as error:
        body = {"message": str(error), "fix": error.fix, "evidence": _plain(error.evidence)}
        say(Report(kind="failed", body=body | {"refused": _refusal(error)}))
        return 3
    say(Report(kind="done", body={}))
    return 0


def run_job(job: Job, say: Say) -> None:
    """Replay every request of the job into one child run, reporting each verdict."""
    from traces.ledger.ledger import Ledger
    from traces.recorder import Recorder, random_ids

    ledger = Ledger(job.ledger)
    ledger.drain()
    run = load_run(ledger, job.run_id, only=job.requests if len(job.requests) <= FEW and not job.together else None)
    substitutions = parse_substitutions(job.settings)
    with Recorder(job.ledger, run_id=f"run_{random_ids()}", component="replay") as recorder:
        recorder.commit("run.started", payload=started(job))
        player = make_player(job, ledger, run, recorder, substitutions, say)
        verdicts = [_replay(player, run, reference, recorder, substitutions, say) for reference in job.requests]
        recorder.commit("run.completed", payload={"verdicts": tally(verdicts)}, status="ok")


def make_player(
    job: Job,
    ledger: Ledger,
    run: RecordedRun,
    recorder: Recorder,
    substitutions: Sequence[Substitution],
    say: Say,
) -> Player:
    """Gather what all requests of the job share."""
    from replay.models import Models, candidates
    from replay.packages import PackageChoice
    from replay.player import Player, Setting
    from replay.preparing import prepare_missing
    from replay.together import play_together
    from replay.worlds import substitutes_of
    from runtime.probe import probe
    from runtime.serve.deployment import DeploymentDocument

    if run.started.input_ref is None:
        raise IncompleteRecord(f"run {run.run_id} has no recorded deployment", missing="deployment")
    threads = threads_of(run.requests.values())
    plans = plans_of(ledger, run)
    events = [event for request in run.requests.values() for event in request.events]
    models = Models(
        job.ledger,
        threads=threads,
        plans=plans,
        sequences=load_sequence_tables(events),
        on_loading=lambda package: say(Report(kind="loading", body={"package": package})),
    )
    ready: Mapping[str, GenerationResult] = {}
    if job.together:
        ready, calls = play_together(ledger, [run.requests[one] for one in job.requests], models, plans)
        say(Report(kind="progress", body={"generations": len(ready), "calls": calls}))
    chosen = tuple(substitutions)
    wants_package = PackageChoice(substitutions=chosen).changes
    return Player(
        Setting(
            ledger=ledger,
            recorder=recorder,
            deployment=DeploymentDocument.from_bytes(ledger.read_blob(run.started.input_ref)),
            shared=run.shared,
            models=models,
            plans=plans,
            steps=ledger.step_count(run.run_id),
            ready=ready,
            hardware=probe(threads=threads),
            packages=PackageChoice(
                substitutions=chosen,
                candidates=candidates(job.ledger) if wants_package else (),
                prepare=partial(prepare_missing, job.ledger),
            ),
            mode=job.mode,
            substitutes=substitutes_of(chosen),
        )
    )


def threads_of(requests: Iterable[RecordedRequest]) -> int:
    """Return the compute threads for this process: what its environment was pinned to, or else as recorded."""
    pinned = os.environ.get(THREADS_VARIABLE)
    if pinned is not None:
        return int(pinned)
    recorded = {request.pins.hardware.threads for request in requests if request.pins is not None}
    return max(recorded, default=1)


def _replay(
    player: Player,
    run: RecordedRun,
    reference: str,
    recorder: Recorder,
    substitutions: Sequence[Substitution],
    say: Say,
) -> ReplayVerdict:
    """Replay one request; what stands in its way is its verdict, never the end of the job."""
    say(Report(kind="begun", body={"request": reference}))
    try:
        request = _known(run, reference)
        check_values(request.pins, substitutions)
        verdict = asyncio.run(player.replay(request))
    except ClassifiedError as error:
        verdict = without_comparison(error, run.run_id, reference, recorder.run_id)
        recorder.commit(
            "replay.verdict",
            payload={"verdict": verdict.verdict.value, "detail": verdict.detail, "refused_pin": verdict.refused_pin},
            request_ref=reference,
            track="B",
            status="error",
            failure_class=error.failure_class,
            error_type=error.error_type,
        )
    say(Report(kind="verdict", body={"request": reference, "verdict": verdict.to_document()}))
    return verdict


def _known(run: RecordedRun, reference: str) -> RecordedRequest:
    request = run.requests.get(reference)
    if request is None:
        raise IncompleteRecord(f"run {run.run_id} has no request {reference}", missing="request")
    return request


def without_comparison(error: ClassifiedError, run_id: str, reference: str, child: str) -> ReplayVerdict:
    """Return the verdict on a request that was refused, or whose replay broke."""
    refused = isinstance(error, ReplayRefused)
    return ReplayVerdict(
        verdict=Verdict.REFUSED if refused else Verdict.UNVERIFIED,
        refused_pin=_standing_in_the_way(error),
        original={"run": run_id, "request": reference},
        replay={
            "run": child,
            "status": "refused" if refused else "failed",
            "failure_class": error.failure_class.value,
            "error_type": error.error_type if refused else "replay_failed",
            "reason": error.error_type,
            "fix": error.fix,
        },
        detail=error.message,
    )


def _refusal(error: ClassifiedError) -> dict[str, str | None] | None:
    """Return what makes an error a refusal, to be raised as one by who started this worker."""
    if not isinstance(error, ReplayRefused):
        return None
    return {"error_type": error.error_type, "failure_class": error.failure_class.value}


def _standing_in_the_way(error: ClassifiedError) -> str | None:
    """Name the pin, or the part of the record, for lack of which a replay was refused."""
    if isinstance(error, PinRefused):
        return error.pin
    return error.missing if isinstance(error, IncompleteRecord) else None


def started(job: Job) -> dict[str, Any]:
    """Return what a child run's first event says."""
    return {
        "kind": "replay",
        "parent_run": job.run_id,
        "parent_request": job.requests[0] if len(job.requests) == 1 else None,
        "mode": job.mode,
        "set": list(job.settings),
        "requests": len(job.requests),
    }


def _plain(evidence: Any) -> Any:
    return json.loads(json.dumps(evidence, default=str))


if __name__ == "__main__":
    raise SystemExit(main())

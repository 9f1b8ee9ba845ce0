"""How does a program replay many requests of a run?  One call, workers of the recorded environment underneath."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replay.jobs import Job, ReplayMode, Report
from replay.launch import WORKER, run_job
from replay.verdict import ReplayVerdict

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Done:
    """One verdict, on one repeat of one request."""

    request: str
    turn: int
    verdict: ReplayVerdict


def replay_requests(
    ledger: Ledger,
    run_id: str,
    *,
    requests: Sequence[str] | None = None,
    mode: ReplayMode = "faithful",
    settings: Sequence[str] = (),
    repeat: int = 1,
    together: bool = False,
    on_verdict: Callable[[Done], None] = lambda done: None,
    on_report: Callable[[Report], None] = lambda report: None,
    on_progress: Callable[[str], None] = lambda state: None,
) -> list[Done]:
    """Replay requests of a run, all of them unless named, and return their verdicts in order of repeat and arrival.

    Args:
        ledger: holds the run and takes the recording of the replay.
        run_id: the run, in full.
        requests: references, in full.
        mode: faithful, alone, forced or audit.
        settings: pins to change, each `dimension.field=value`.
        repeat: how many times each request is run.
        together: run every recorded call once, with all its rows; for a whole run under its own pins.
        on_verdict: called with each verdict as it becomes known.
        on_report: called with each line a worker says.
        on_progress: told what is done before a worker can start: an environment with another version is made.
    Raises ReplayRefused for a pin that does not exist or cannot be had, ReplayFailed when no worker can run at all.
    """
    from replay.environments import environment_for
    from replay.groups import group_requests
    from replay.records import load_run
    from replay.slices import FEW
    from replay.substitutes import parse_substitutions

    substitutions = parse_substitutions(settings)
    recorded = load_run(ledger, run_id, only=requests if requests is not None and len(requests) <= FEW else None)
    wanted = list(recorded.requests) if requests is None else list(requests)
    done: list[Done] = []
    groups = group_requests([recorded.requests[reference] for reference in wanted], substitutions)
    place = environment_for(substitutions, on_progress=on_progress)
    for group in groups:
        job = Job(
            ledger=ledger.path,
            run_id=run_id,
            requests=group.requests,
            mode=mode,
            settings=tuple(settings),
            repeat=repeat,
            together=together,
        )
        environment, command = place.variables(group.environment), (place.interpreter, *WORKER[1:])
        for request, turn, verdict in run_job(job, environment=environment, on_report=on_report, command=command):
            done.append(Done(request=request, turn=turn, verdict=verdict))
            on_verdict(done[-1])
    places = {reference: place for place, reference in enumerate(wanted)}
    return sorted(done, key=lambda one: (one.turn, places[one.request]))

"""What is in the ledger?  `replay list` lists runs; `replay list RUN` the requests of one run."""

from __future__ import annotations

import argparse

from replay.catalog import RequestSummary, RunSummary, list_requests, list_runs, resolve, short
from replay.commands import screen

EXAMPLE = """\
example:
  replay list
  replay list run_0199
exit codes: 0 done, 2 no ledger or no such run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replay list`."""
    parser.add_argument("run_id", nargs="?", metavar="RUN", help="list the requests of this run")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="newest runs to show (default 20; 0: all)")
    parser.epilog = EXAMPLE


def run(arguments: argparse.Namespace) -> int:
    """List runs or requests."""
    ledger = screen.open_ledger(arguments.ledger)
    if arguments.run_id:
        return print_requests(list_requests(ledger, resolve(ledger, arguments.run_id).run_id), as_json=arguments.json)
    runs = list_runs(ledger)
    shown = runs[: arguments.limit] if arguments.limit > 0 else runs
    if arguments.json:
        screen.print_json([one.to_document() for one in shown])
        return 0
    if not runs:
        screen.console().print("The ledger holds no run yet.  Record one: replaylab record WORKLOAD")
        return 0
    rows = [_run_row(one) for one in shown]
    columns = ("run", "kind", "started (UTC)", "took", "requests", "outcome", "replays", "of")
    screen.print_table(screen.console(), columns, rows)
    if len(runs) > len(shown):
        screen.console().print(f"... and {len(runs) - len(shown)} older runs: replay list --limit 0")
    return 0


def _run_row(one: RunSummary) -> tuple[object, ...]:
    kind = f"{one.kind} ({one.mode})" if one.kind == "replay" and one.mode else one.kind
    took = screen.duration(one.ended_us - one.started_us) if one.ended_us is not None else "not ended"
    outcome = screen.counts(one.verdicts) if one.verdicts else screen.counts(one.outcomes)
    parent = short(one.parent) if one.parent else ""
    return (
        short(one.run_id),
        kind,
        screen.moment(one.started_us),
        took,
        _requests(one),
        outcome,
        parent,
        one.subject or one.workload,
    )


def _requests(one: RunSummary) -> int | None:
    """Return how many requests a run had; a preparation has none to count."""
    return None if one.subject is not None else one.requests


def print_requests(found: list[RequestSummary], *, as_json: bool) -> int:
    """Print the requests of a run and return the exit code."""
    if as_json:
        screen.print_json([one.to_document() for one in found])
        return 0
    columns = ("request", "arrived (UTC)", "status", "failure class", "took", "in", "out", "route", "verdict")
    rows = [
        (
            short(one.request_ref),
            screen.moment(one.accepted_us),
            one.status or "never ended",
            one.failure_class,
            screen.duration(one.duration_us),
            one.input_tokens,
            one.output_tokens,
            one.route,
            screen.verdict_text(one.verdict),
        )
        for one in found
    ]
    screen.print_table(screen.console(), columns, rows)
    return 0

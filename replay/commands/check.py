"""What could be had again?  `replay check ID` says it before anything runs, and which pin is missing for more."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from replay.catalog import resolve, short
from replay.commands import screen
from replay.errors import ReplayRefused
from replay.plan import Level, Reach

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger

EXAMPLE = """\
levels: bitwise, token (same model, but something that reaches the bits is not as it was), decision (no model),
        latency, evidence
example:
  replay check req_0199
  replay check run_0199 --json
exit codes: 0 bitwise is reachable, 1 less than that, 2 no such recording
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replay check`."""
    parser.epilog = EXAMPLE
    parser.add_argument("id", metavar="ID", help="a request, a run, or a preparation")


def run(arguments: argparse.Namespace) -> int:
    """Assess a request, or every request of a run."""
    from replay.inferences import is_inference
    from replay.plan import assess
    from replay.preparations import is_preparation
    from replay.records import load_run
    from replay.surroundings import surroundings_of

    ledger = screen.open_ledger(arguments.ledger)
    target = resolve(ledger, arguments.id)
    if target.request_ref is None and is_preparation(ledger, target.run_id):
        return _preparation(ledger, target.run_id, as_json=arguments.json)
    if is_inference(ledger, target.run_id):
        raise ReplayRefused("check does not know one-shot requests", fix="Replay it, at one call each: replay run ID")
    recorded = load_run(ledger, target.run_id, only=None if target.request_ref is None else [target.request_ref])
    surroundings = surroundings_of(ledger, recorded)
    wanted = list(recorded.requests) if target.request_ref is None else [target.request_ref]
    found = {reference: assess(recorded.requests[reference], surroundings) for reference in wanted}
    if arguments.json:
        documents = [{"run": target.run_id, "request": ref} | reach.to_document() for ref, reach in found.items()]
        screen.print_json(documents[0] if target.request_ref else documents)
    elif target.request_ref is not None:
        _print_one(found[target.request_ref])
    else:
        _print_many(found)
    return 0 if all(reach.level is Level.BITWISE for reach in found.values()) else 1


def _preparation(ledger: Ledger, run_id: str, *, as_json: bool) -> int:
    """Assess whether a preparation can be rebuilt to the bit."""
    from replay.preparation_check import assess_preparation
    from replay.preparations import load_preparation

    reach = assess_preparation(ledger, load_preparation(ledger, run_id))
    if as_json:
        screen.print_json({"run": run_id, "request": None} | reach.to_document())
    else:
        _print_one(reach)
    return 0 if reach.level is Level.BITWISE else 1


def _print_one(reach: Reach) -> None:
    out = screen.console()
    out.print(f"[bold]{reach.level.word}[/bold] replay is reachable")
    for one in reach.missing:
        out.print(f"  {one.pin}: recorded {one.recorded}, here {one.here}; without it {one.allows.word} at best",
                  soft_wrap=True, markup=False)  # fmt: skip
        if one.fix:
            out.print(f"    fix: {one.fix}", soft_wrap=True, markup=False)


def _print_many(found: dict[str, Reach]) -> None:
    out = screen.console()
    levels = Counter(reach.level.word for reach in found.values())
    out.print(f"{len(found)} requests: {screen.counts(levels)}")
    rows = [
        (short(reference), reach.level.word, reach.missing[0].pin, str(reach.missing[0].here))
        for reference, reach in found.items()
        if reach.missing
    ]
    if rows:
        screen.print_table(out, ("request", "reachable", "missing", "here"), rows)

"""What went wrong last?  `replay last` shows the newest request that failed or whose replay diverged."""

from __future__ import annotations

import argparse

from replay.catalog import Target, last_incident, list_requests, list_runs
from replay.commands import screen
from replay.commands.show import show

EXAMPLE = """\
example:
  replay last
exit codes: 0 an incident, or the newest request when there is none, 2 nothing is recorded
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replay last`."""
    parser.epilog = EXAMPLE


def run(arguments: argparse.Namespace) -> int:
    """Show the newest incident, or, when all is well, the newest request."""
    ledger = screen.open_ledger(arguments.ledger)
    target = last_incident(ledger)
    if target is None:
        target = next(
            (
                Target(run_id=one.run_id, request_ref=requests[-1].request_ref)
                for one in list_runs(ledger)
                if (requests := list_requests(ledger, one.run_id))
            ),
            None,
        )
        if target is None:
            screen.console(stderr=True).print("No request is recorded yet.  Record some: replaylab record WORKLOAD")
            return 2
        screen.console(stderr=True).print("No incident: every request ended well.  The newest request:")
    return show(ledger, target, as_json=arguments.json)

"""How is a recording listed, shown and run again from the command line?  The `replay` command."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "list": ("replay.commands.listing", "List runs, or the requests of one run."),
    "last": ("replay.commands.last", "Show the newest incident: the request that last failed or diverged."),
    "show": ("replay.commands.show", "Show a request: its waterfall, pins, tokens, tools and citations."),
    "check": ("replay.commands.check", "Say which level of replay is reachable, and which pin is missing."),
    "run": ("replay.commands.run", "Run a request or a whole run again and give a verdict."),
    "blame": ("replay.commands.blame", "Say which neighbour, chunk or cache hit changed a request's bits or tokens."),
    "diff": ("replay.commands.diff", "Compare two requests: pins, stages, tokens, time."),
}

EXAMPLE = """\
example:
  replay list                       what ran
  replay run ID                     run it again under its own pins: exact, or where it first differs
  replay run ID --set compiler.precision=bfloat16
  replay diff ID_A ID_B             which pins differ, and where the two first part

ID is a request or a run, in full or its beginning; RUN/REQUEST names a request of one run.
exit codes: 0 same, 1 diverged, 2 refused or bad input, 3 failed
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(words)
    chosen = parser.parse_args(words)
    try:
        return int(chosen.run(chosen))
    except BrokenPipeError:
        # the reader (head, less) has gone: say nothing more, not even at interpreter exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 3
    except Exception as error:
        return _report(error, as_json=chosen.json)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser; only the chosen sub-command's module is imported."""
    parser = argparse.ArgumentParser(
        prog="replay",
        description="Run a recorded request again and say what is the same, what differs, and which pin is to blame.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        child = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if words and words[0] == name:
            module = importlib.import_module(module_name)
            child.add_argument("--json", action="store_true", help="print JSON on standard output")
            child.add_argument(
                "--ledger",
                type=Path,
                default=Path(os.environ.get("REPLAYLAB_LEDGER") or "ledger"),
                metavar="PATH",
                help="the ledger's folder (default: REPLAYLAB_LEDGER, or ./ledger)",
            )
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


def _report(error: Exception, *, as_json: bool) -> int:
    """Say one clear error: what, where, how to mend it; return its exit code.  Our own faults keep their trace."""
    from manifests.errors import ManifestError
    from replay.errors import ReplayRefused
    from traces.failures import ClassifiedError, FailureClass

    if not isinstance(error, (ClassifiedError, ManifestError)):
        raise error
    refused = isinstance(error, (ReplayRefused, ManifestError)) or (
        error.failure_class in (FailureClass.VALIDATION_POLICY, FailureClass.ARTIFACT_COMPATIBILITY)
    )
    fix = error.fix
    message = error.message if isinstance(error, ClassifiedError) else str(error)
    if as_json:
        body = {"message": message, "fix": fix, "error_type": getattr(error, "error_type", "pin_refused")}
        print(json.dumps({"error": body}, indent=2))
    else:
        print(f"error: {message}", file=sys.stderr)
        if fix and fix not in message:
            print(f"  fix: {fix}", file=sys.stderr)
    return 2 if refused else 3


if __name__ == "__main__":
    raise SystemExit(main())

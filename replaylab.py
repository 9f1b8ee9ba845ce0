"""Which room owns which sub-command?  The front door: it hands each sub-command over, importing the room only then."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name -> (module that offers add_arguments() and run(), one line for the listing)
COMMANDS = {
    "prepare": ("runtime.prepare.cli", "Take a model through the nine preparation stages into a package."),
    "packages": ("runtime.prepare.packages_cli", "List, show, verify and compare prepared packages."),
    "record": ("experiments.record", "Run a workload through the runtime and record it into the ledger."),
    "serve": ("runtime.gateway.cli", "Answer requests over HTTP, recording every stage."),
    "infer": ("runtime.gateway.infer", "Answer requests with a one-shot package, batched and recorded."),
    "study": ("experiments.study_cli", "Run an MLflow-tracked experiment."),
    "dashboard": ("dashboards.cli", "Open the trace-analysis pages in a browser."),
    "ledger": ("traces.ledger.cli", "Verify, rebuild, compact or drain a ledger."),
    "demo": ("experiments.demo", "The main job once: record an incident, replay it, name the pin."),
}

EXAMPLE = """\
example:
  replaylab prepare runtime/models/reference --backend onnxruntime
  replaylab record workload.jsonl && replay last

exit codes: 0 done, 1 a check found something, 2 refused or bad input, 3 failed
'replay' is its own command: replay --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="replaylab",
        description="Record a model-serving run, replay it bit for bit, and name the pin that made another one differ.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        child = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if words and words[0] == name:  # only the chosen room is imported
            module = importlib.import_module(module_name)
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    chosen = parser.parse_args(words)
    return int(chosen.run(chosen))


if __name__ == "__main__":
    raise SystemExit(main())

"""What can a person do with a ledger from the command line?  (``replaylab ledger ...``)"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traces.envelope import export
from traces.failures import ClassifiedError
from traces.ledger.ledger import Ledger

EXAMPLE = """\
example:
  replaylab ledger verify                      every signature, event and row
  replaylab ledger export events.jsonl --run run_0193...

exit codes: 0 done, nothing found; 1 verification found something; 2 refused or bad input; 3 failed
"""

ACTIONS = {
    "path": "Say where the ledger is and what it holds.",
    "drain": "Seal what waits in outboxes and project it.",
    "verify": "Check signatures, segments, head, projected rows and evidence.",
    "rebuild": "Make the DuckDB projection again from the segments.",
    "compact": "Rewrite the projection without free blocks (segments stay).",
    "export": "Write events as JSON Lines, or as OTLP-JSON spans.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``replaylab ledger``."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listing = "; ".join(f"{name}: {text}" for name, text in ACTIONS.items())
    parser.add_argument("action", choices=tuple(ACTIONS), metavar="ACTION", help=listing)
    parser.add_argument("file", nargs="?", type=Path, help="where export writes; standard output when left out")
    parser.add_argument("--ledger", type=Path, default=None, help="ledger folder (REPLAYLAB_LEDGER, else ./ledger)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--no-blobs", action="store_true", help="verify: do not read the evidence files")
    parser.add_argument("--run", dest="run_id", default=None, metavar="RUN", help="export: only this run")
    parser.add_argument(
        "--request", dest="request_ref", default=None, metavar="REQUEST", help="export: only this request"
    )
    parser.add_argument(
        "--format", choices=("envelope", "otlp"), default="envelope", help="export: envelope (default) or otlp"
    )


def run(arguments: argparse.Namespace) -> int:
    """Do one action and return the exit code."""
    actions: dict[str, Callable[[Ledger, argparse.Namespace], int]] = {
        "path": _path,
        "drain": _drain,
        "verify": _verify,
        "rebuild": _rebuild,
        "compact": _compact,
        "export": _export,
    }
    ledger = Ledger(arguments.ledger)
    if not ledger.exists:
        return _refuse(arguments, f"There is no ledger at {ledger.path}. Fix: record something, or give --ledger.", 2)
    try:
        return actions[str(arguments.action)](ledger, arguments)
    except ClassifiedError as error:
        return _refuse(arguments, str(error), 3)


def _refuse(arguments: argparse.Namespace, text: str, code: int) -> int:
    if arguments.json:
        print(json.dumps({"error": text, "exit_code": code}))
    else:
        print(f"replaylab ledger: {text}", file=sys.stderr)
    return code


def _say(arguments: argparse.Namespace, document: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(document, sort_keys=True) if arguments.json else "\n".join(lines))


def _path(ledger: Ledger, arguments: argparse.Namespace) -> int:
    from traces.ledger.segments import Segments

    segments = Segments(ledger.layout)
    last = segments.last()
    document = {
        "path": str(ledger.path.absolute()),
        "segments": len(segments.numbers()),
        "events": 0 if last is None else last.last,
        "pending": ledger.pending(),
        "database_bytes": ledger.layout.database.stat().st_size if ledger.layout.database.exists() else 0,
    }
    text = f"{document['path']}\n{document['events']} sealed events in {document['segments']} segments"
    _say(arguments, document, [text, f"{document['pending']} events wait for a drain"])
    return 0


def _drain(ledger: Ledger, arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    report = ledger.drain()
    lines = [f"sealed {report.events} events and {report.blobs} pieces of evidence in {report.segments} segments"]
    if not report.projected:
        lines.append("the projection is held by a reader; the next drain catches up")
    lines += [f"damaged outbox left in place: {name}" for name in report.damaged]
    _say(arguments, asdict(report), lines)
    return 1 if report.damaged else 0


def _verify(ledger: Ledger, arguments: argparse.Namespace) -> int:
    with _progress(ledger, "verifying") as advance:
        report = ledger.verify(blobs=not arguments.no_blobs, progress=advance)
    summary = (
        f"{report.segments} segments, {report.events} events, {report.rows} rows, {report.blobs} pieces of evidence"
    )
    lines = [f"{finding.kind}: {finding.detail}" for finding in report.findings]
    lines += [f"note: {note}" for note in report.notes]
    lines.append(f"{'intact' if report.ok else f'{len(report.findings)} findings'}: {summary}")
    _say(arguments, report.to_document(), lines)
    return 0 if report.ok else 1


def _rebuild(ledger: Ledger, arguments: argparse.Namespace) -> int:
    with _progress(ledger, "rebuilding") as advance:
        events = ledger.rebuild(progress=advance)
    _say(arguments, {"events": events}, [f"the projection was made again: {events} events"])
    return 0


def _compact(ledger: Ledger, arguments: argparse.Namespace) -> int:
    report = ledger.compact()
    document = {"events": report.events, "bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
    line = f"{report.events} events: {report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after"
    _say(arguments, document, [line])
    return 0


def _export(ledger: Ledger, arguments: argparse.Namespace) -> int:
    import msgspec

    events = ledger.events(arguments.run_id, arguments.request_ref)
    if arguments.format == "otlp":
        from traces.otlp import otlp_lines

        lines = list(otlp_lines(events))
    else:
        lines = [msgspec.json.encode(export(event)).decode() for event in events]
    text = "".join(line + "\n" for line in lines)
    if arguments.file is None:
        sys.stdout.write(text)
        return 0
    try:
        arguments.file.write_text(text, encoding="utf-8")
    except OSError as error:
        return _refuse(arguments, f"{arguments.file} cannot be written: {error.strerror}. Fix: name another file.", 2)
    _say(arguments, {"events": len(events), "file": str(arguments.file)}, [f"{len(events)} events in {arguments.file}"])
    return 0


@contextmanager
def _progress(ledger: Ledger, word: str) -> Generator[Callable[[int], None] | None]:
    """Show a bar on standard error where a person is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    from traces.ledger.segments import Segments

    last = Segments(ledger.layout).last()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(word, total=0 if last is None else last.last)
        yield lambda count: bar.advance(task, count)

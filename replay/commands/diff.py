"""What is different between two recordings?  `replay diff A B`: pins, first difference, tokens, time by stage."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from replay.catalog import Target, list_requests, resolve, short
from replay.commands import screen
from replay.commands.pins import print_pins, print_preparation
from replay.errors import UnknownRecording

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger

EXAMPLE = """\
A and B are requests; RUN/REQUEST names a request of a replay.  Two runs are compared when one replays the other;
runs of one-shot requests (replaylab infer) where they had the same inputs.
example:
  replay diff req_0199a req_0199b
  replay diff req_0199a run_0199/req_0199a      a request and one of its replays
  replay diff run_0198a run_0198b               two preparations: the first of nine stages that differs
exit codes: 0 the same, 1 different, 2 no such recording
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replay diff`."""
    parser.epilog = EXAMPLE
    parser.add_argument("left", metavar="A", help="a request, a run, or a preparation")
    parser.add_argument("right", metavar="B", help="the other one")
    parser.add_argument("--brief", action="store_true", help="only the first difference and the pins")


def run(arguments: argparse.Namespace) -> int:
    """Compare two requests, or a run and its replay request by request."""
    from replay.comparison import compare_requests
    from replay.inferences import is_inference, refuse_replay
    from replay.preparations import is_preparation

    ledger = screen.open_ledger(arguments.ledger)
    left, right = resolve(ledger, arguments.left), resolve(ledger, arguments.right)
    if (left.request_ref is None) != (right.request_ref is None):
        raise UnknownRecording("one is a run, the other a request", fix="Give two requests, or two runs.")
    for target in (left, right):
        refuse_replay(ledger, target.run_id)
    if _both(is_inference, ledger, (left, right), what="a one-shot recording"):
        from replay.commands.inference import diff_inferences

        return diff_inferences(ledger, left, right, as_json=arguments.json, brief=arguments.brief)
    if left.request_ref is None and _both(is_preparation, ledger, (left, right), what="a preparation"):
        from replay.commands.preparation import diff_preparations

        return diff_preparations(ledger, left.run_id, right.run_id, as_json=arguments.json)
    if left.request_ref is not None:
        found = compare_requests(ledger, left, right)
        if arguments.json:
            screen.print_json(found)
        else:
            _print(found, brief=arguments.brief)
        return 0 if found["verdict"] in ("exact", "within_tolerance") else 1
    return _runs(ledger, left, right, as_json=arguments.json)


def _both(is_one: Callable[[Ledger, str], bool], ledger: Ledger, targets: Sequence[Target], *, what: str) -> bool:
    """Tell whether both recordings are of a kind; UnknownRecording when only one is."""
    kinds = [is_one(ledger, target.run_id) for target in targets]
    if any(kinds) and not all(kinds):
        raise UnknownRecording(f"one is {what}, the other is not", fix="Give two of a kind: replay list shows them.")
    return all(kinds)


def _runs(ledger: Ledger, left: Target, right: Target, *, as_json: bool) -> int:
    """Compare the requests that two runs share."""
    from replay.comparison import compare_requests

    known = {one.request_ref for one in list_requests(ledger, left.run_id)}
    shared = [one.request_ref for one in list_requests(ledger, right.run_id) if one.request_ref in known]
    if not shared:
        raise UnknownRecording(
            "the two runs have no request in common", fix="Compare two requests: replay list RUN shows them."
        )
    found = [
        compare_requests(
            ledger,
            Target(run_id=left.run_id, request_ref=reference),
            Target(run_id=right.run_id, request_ref=reference),
        )
        for reference in shared
    ]
    if as_json:
        screen.print_json(found)
    else:
        out = screen.console()
        rows = [
            (short(one["left"]["request"]), screen.verdict_text(one["verdict"]), one["layer"], one["detail"])
            for one in found
        ]
        screen.print_table(out, ("request", "verdict", "layer", "what"), rows)
        print_pins(out, found[0]["pins"])
    return 0 if all(one["verdict"] in ("exact", "within_tolerance") for one in found) else 1


def _print(found: dict[str, Any], *, brief: bool) -> None:
    """Print the comparison of two requests."""
    out = screen.console()
    out.print(f"A  {found['left']['request']} of {found['left']['run']}", soft_wrap=True)
    out.print(f"B  {found['right']['request']} of {found['right']['run']}", soft_wrap=True)
    out.print(screen.verdict_text(found["verdict"]), found["detail"], soft_wrap=True)
    print_pins(out, found["pins"])
    print_preparation(out, found["preparation"])
    if brief:
        return
    if found["tokens"]:
        out.print("\n[bold]tokens around the first difference[/bold]")
        rows = [
            (
                f"{'>' if row['first'] else ' '} {row['generation'] + 1}.{row['index']}",
                _token(row, "left"),
                _token(row, "right"),
                _margin(row["left_margin"]),
                _margin(row["right_margin"]),
                row["left_bits"],
                row["right_bits"],
            )
            for row in found["tokens"]
        ]
        columns = ("token", "A", "B", "margin A", "margin B", "bits A", "bits B")
        screen.print_table(out, columns, rows)
    for number, (one, other) in enumerate(zip(*found["texts"], strict=False)):
        if one != other:
            out.print(f"\n[bold]generation {number + 1}[/bold]")
            out.print(f"A  {one}", soft_wrap=True, markup=False)
            out.print(f"B  {other}", soft_wrap=True, markup=False)
    out.print("\n[bold]time on the critical path[/bold]")
    times = [
        (
            row["stage"],
            screen.duration(row["left_us"]),
            screen.duration(row["right_us"]),
            _change(row["left_us"], row["right_us"]),
        )
        for row in found["latency"]
    ]
    screen.print_table(out, ("stage", "A", "B", "B - A"), times)


def _token(row: dict[str, Any], side: str) -> str:
    """Return a token's id and text."""
    if row[side] is None:
        return "(ended)"
    text = row[f"{side}_text"]
    return str(row[side]) if text is None else f"{row[side]} {text!r}"


def _margin(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _change(left: int | None, right: int | None) -> str:
    if left is None or right is None:
        return ""
    return ("+" if right >= left else "-") + screen.duration(abs(right - left))

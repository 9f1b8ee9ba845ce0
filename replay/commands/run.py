"""Is it the same again?  `replay run ID` runs a request, or every request of a run, and gives a verdict."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replay.catalog import Target, resolve, short
from replay.commands import screen
from replay.errors import PinRefused, ReplayRefused
from replay.jobs import MODES, Report
from replay.launch import died, how_it_ended
from replay.verdict import EXIT_FAILED, ReplayVerdict, Verdict, exit_code, tally

if TYPE_CHECKING:
    from replay.batch import Done
    from traces.ledger.ledger import Ledger

EXAMPLE = """\
modes:
  faithful   the recorded plans, other requests' rows replaced by stand-ins, effects from the record (default)
  alone      each request by itself, as tracing tools do it: shows what the batch changed
  forced     the recorded tokens are fed, so that one early flip does not hide what follows
  audit      no model: context, validators, policies and failure classes over the recorded evidence
example:
  replay run req_0199
  replay run run_0199 --mode alone
  replay run req_0199 --set compiler.precision=bfloat16
  replay run req_0199 --set 'tools.result.lookup_account={"account":"4821","plan":"gold",...}'
  replay run run_0198                               a preparation: rebuild, name the first of nine stages that differs
  replay run run_0198 --set compiler.optimization_level=basic
  replay run run_0198 --set compiler.onnxruntime=1.30.0   (in an environment of its own; also for requests)
exit codes: 0 exact or within tolerance, 1 diverged or unverified, 2 refused, 3 failed
"""


REQUESTS_ONLY: Mapping[str, Any] = {"mode": "faithful", "repeat": 1, "together": False}
PREPARATIONS_ONLY: Mapping[str, Any] = {"model": None, "stop_at_first": False}
"""Options that mean something for one kind of recording only, and what they are when they are not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replay run`."""
    parser.epilog = EXAMPLE
    parser.add_argument("id", metavar="ID", help="a request (one-shot ones too), a run, or a preparation")
    parser.add_argument("--mode", choices=MODES, default="faithful", help="how to run it again (default: faithful)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PIN=VALUE",
        dest="settings",
        help="run under another pin: dimension.field=value; repeat for more",
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="where a preparation's model lies now")
    parser.add_argument(
        "--stop-at-first", action="store_true", help="of a preparation: end at the first stage that differs"
    )
    parser.add_argument("--together", action="store_true",
                        help="run every recorded call of a whole run once, with all its rows: faster, and all its "
                        "tenants' prompts in one batch as they were")  # fmt: skip
    parser.add_argument("--repeat", type=_repeat, default=1, metavar="N", help="run everything N times (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Replay and print the verdict or verdicts."""
    from replay.commands.inference import run_inference
    from replay.commands.preparation import run_preparation
    from replay.groups import group_requests
    from replay.inferences import is_inference
    from replay.preparations import is_preparation
    from replay.records import load_run
    from replay.substitutes import check_values, parse_substitutions

    ledger = screen.open_ledger(arguments.ledger)
    target = resolve(ledger, arguments.id)
    if target.request_ref is None and is_preparation(ledger, target.run_id):
        _refuse_for("a preparation", arguments, REQUESTS_ONLY)
        return run_preparation(arguments, ledger, target)
    _refuse_for("a request", arguments, PREPARATIONS_ONLY)
    if is_inference(ledger, target.run_id):
        return run_inference(arguments, ledger, target)
    if arguments.together and (target.request_ref or arguments.settings or arguments.mode != "faithful"):
        raise ReplayRefused(
            "--together replays a whole run, faithfully and under its own pins",
            fix="Name the run, without --set and --mode; one request replays from its slice.",
        )
    recorded = load_run(ledger, target.run_id, only=None if target.request_ref is None else [target.request_ref])
    wanted = list(recorded.requests) if target.request_ref is None else [target.request_ref]
    try:
        substitutions = parse_substitutions(arguments.settings)
        for reference in wanted:
            check_values(recorded.requests[reference].pins, substitutions)
        group_requests([recorded.requests[reference] for reference in wanted], substitutions)
        done, notes = _replay(arguments, ledger, target, total=len(wanted) * arguments.repeat)
    except PinRefused as refusal:
        return _print_refusal(arguments, target, refusal)
    _print(arguments, done, notes, whole_run=target.request_ref is None)
    verdicts = [one.verdict for one in done]
    return EXIT_FAILED if any(died(verdict) for verdict in verdicts) else exit_code(verdicts)


def _refuse_for(what: str, arguments: argparse.Namespace, options: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing for what is replayed, instead of ignoring them."""
    given = [name for name, default in options.items() if getattr(arguments, name) != default]
    if given:
        shown = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ReplayRefused(
            f"{shown} does not apply to {what}", fix="Leave it out: replay run --help says what it is for."
        )


def _print_refusal(arguments: argparse.Namespace, target: Target, refusal: PinRefused) -> int:
    """Say which pin cannot be set, before anything ran."""
    verdict = ReplayVerdict(
        verdict=Verdict.REFUSED,
        refused_pin=refusal.pin,
        original={"run": target.run_id, "request": target.request_ref},
        replay={"run": None, "status": "refused", "error_type": refusal.error_type, "fix": refusal.fix},
        detail=refusal.message,
    )
    if arguments.json:
        screen.print_json(verdict.to_document())
    else:
        _print_one(verdict)
    return exit_code([verdict])


def _replay(
    arguments: argparse.Namespace, ledger: Ledger, target: Target, *, total: int
) -> tuple[list[Done], list[str]]:
    """Replay with a progress bar; return the verdicts, and what else a person should know."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from replay.batch import replay_requests

    counted: Counter[str] = Counter()
    notes: list[str] = []
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Progress(
        *columns, TimeElapsedColumn(), console=screen.console(stderr=True), disable=arguments.json, transient=True
    ) as bar:
        task = bar.add_task("replay", total=total, state="starting a worker")

        def count(one: Done) -> None:
            counted[one.verdict.verdict.value] += 1
            bar.update(task, advance=1, state=screen.counts(counted))

        done = replay_requests(
            ledger,
            target.run_id,
            requests=None if target.request_ref is None else [target.request_ref],
            mode=arguments.mode,
            settings=arguments.settings,
            repeat=arguments.repeat,
            together=arguments.together,
            on_verdict=count,
            on_report=_teller(lambda state: bar.update(task, state=state), notes),
            on_progress=lambda state: bar.update(task, state=state),
        )
    return done, notes


def _teller(tell: Callable[[str], None], notes: list[str]) -> Callable[[Report], None]:
    def on_report(report: Report) -> None:
        if report.kind == "loading":
            tell(f"loading {str(report.body['package'])[:19]}")
        elif report.kind == "apart":
            how = how_it_ended(report.body["exit_code"])
            notes.append(f"the worker process died ({how}) computing all together; replayed one by one")
            tell("one by one")
        elif report.kind == "progress":
            tell(f"{report.body['generations']} generations computed together in {report.body['calls']} calls")

    return on_report


def _print(arguments: argparse.Namespace, done: list[Done], notes: list[str], *, whole_run: bool) -> None:
    """Print one verdict, or a table and its summary."""
    if arguments.json:
        documents = [one.verdict.to_document() for one in done]
        if len(done) == 1 and not whole_run:
            screen.print_json(documents[0])
            return
        summary = {"mode": arguments.mode, "set": arguments.settings, "summary": tally(one.verdict for one in done)}
        screen.print_json(summary | {"notes": notes, "replays": documents})
        return
    for note in notes:
        screen.console().print(f"note: {note}", soft_wrap=True, markup=False)
    if len(done) == 1:
        _print_one(done[0].verdict)
        return
    _print_many(done, arguments.mode)


def _print_one(verdict: ReplayVerdict) -> None:
    """Print a verdict on one request."""
    out = screen.console()
    out.print(screen.verdict_text(verdict.verdict.value), verdict.detail, soft_wrap=True)
    for change in verdict.pins_changed:
        mark = "set" if change.get("set") else "follows"
        mark += ", can explain this" if change["pin"] in verdict.suspects else ""
        values = f"{_short(change['original'])} -> {_short(change['replay'])}"
        out.print(f"  {mark}: {change['pin']}  {values}", soft_wrap=True, markup=False)
    if verdict.replay.get("fix"):
        out.print(f"  fix: {verdict.replay['fix']}", soft_wrap=True)
    rows = [
        (name, verdict.original.get(name), verdict.replay.get(name))
        for name in ("run", "status", "failure_class", "tokens", "tokens_digest", "bits_digest", "response_digest")
        if verdict.original.get(name) is not None or verdict.replay.get(name) is not None
    ]
    screen.print_table(out, ("", "recorded", "replay"), [[name, _brief(a), _brief(b)] for name, a, b in rows])
    used = verdict.replay.get("slice")
    if used:
        out.print(_slice(used), soft_wrap=True)


def _print_many(done: list[Done], mode: str) -> None:
    """Print the replays that are not exact, and the counts of all."""
    out = screen.console()
    other = [one for one in done if one.verdict.verdict != "exact"]
    if other:
        rows = [
            (
                short(one.request),
                screen.verdict_text(one.verdict.verdict.value),
                one.verdict.layer,
                one.verdict.stage,
                one.verdict.step,
                one.verdict.token_index,
                one.verdict.detail,
            )
            for one in other[:40]
        ]
        columns = ("request", "verdict", "layer", "stage", "step", "token", "what")
        screen.print_table(out, columns, rows)
        if len(other) > len(rows):
            out.print(f"... and {len(other) - len(rows)} more: replay run ... --json")
    layers = Counter(one.verdict.layer for one in done if one.verdict.layer is not None)
    said = f"{len(done)} replays ({mode}): {screen.counts(tally(one.verdict for one in done))}"
    out.print(said + (f"; first layer: {screen.counts(layers)}" if layers else ""))
    used = [one.verdict.replay["slice"] for one in done if one.verdict.replay.get("slice")]
    if used:
        calls = sum(one["own_calls"] + one["prefix_calls"] + one["past_calls"] for one in used)
        steps = sorted(one["steps"] for one in used)
        out.print(
            f"slices of {steps[len(steps) // 2]} steps (median), {steps[-1]} at most, of {used[0]['recorded_steps']} "
            f"recorded; {calls} calls"
        )
    children = sorted({str(one.verdict.replay["run"]) for one in done if one.verdict.replay.get("run")})
    out.print("recorded as " + ", ".join(children), soft_wrap=True)


def _slice(used: Mapping[str, int]) -> str:
    """Say how much of the schedule one replay took."""
    said = f"slice: {used['steps']} of {used['recorded_steps']} recorded steps; {used['own_calls']} calls of its own"
    if used["prefix_calls"]:
        said += f", {used['prefix_calls']} for shared prefix blocks"
    if used["past_calls"]:
        said += f", {used['past_calls']} past the recording"
    return said


def _brief(value: Any) -> str:
    text = "" if value is None else str(value)
    return text[:23] if text.startswith("sha256:") else text


def _short(value: Any) -> str:
    text = _brief(value) or "none"
    return text if len(text) <= 48 else f"{text[:45]}..."


def _repeat(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 1000")
    return value

"""What in the schedule changed this request?  `replay blame ID` names the neighbour, the chunk or the cache hit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from replay.catalog import Target, resolve, short
from replay.commands import screen
from replay.errors import UnknownRecording

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger

EXAMPLE = """\
The request's slice runs again under edited plans, from the recorded one towards that of an idle engine, until two plans
one edit apart are found of which only one gives the recorded output.  An edit takes a neighbour's row out of one call,
moves the end of a chunk of the prompt, or undoes a prefix hit or a preemption.

--arrivals and --samples plan the recorded engine again, from the lengths of all its sequences, with arrivals moved: one
arrival by one step, or all of them by up to --jitter steps each.  Slices of equal shapes are replayed once.
example:
  replay blame req_0199
  replay blame req_0199 --samples 100 --jitter 2 --seed 7     how likely arrivals change it
  replay blame req_0199 --arrivals --json
exit codes: 0 nothing in the schedule changed it, 1 something did, 2 refused or bad input, 3 failed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replay blame`."""
    parser.epilog = EXAMPLE
    parser.add_argument("id", metavar="ID", help="a request")
    parser.add_argument("--generation", type=_positive, metavar="N", help="which model call of it (default: the first "
                        "that the schedule changed)")  # fmt: skip
    parser.add_argument("--max-replays", type=_positive, default=200, metavar="N",
                        help="give up the search after so many replays of the slice (default 200)")  # fmt: skip
    parser.add_argument("--arrivals", action="store_true", help="also move each arrival by one step, one at a time")
    parser.add_argument("--samples", type=_count, default=0, metavar="N",
                        help="also try N schedules with all arrivals jittered (default 0)")  # fmt: skip
    parser.add_argument("--jitter", type=_positive, default=1, metavar="STEPS",
                        help="how far an arrival moves at most, either way (default 1 engine step)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the jitter (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Search, and print what was found."""
    ledger = screen.open_ledger(arguments.ledger)
    target = resolve(ledger, arguments.id)
    if target.request_ref is None:
        raise UnknownRecording("a run has no single schedule to blame", fix="Name a request: replay list RUN")
    found = _search(arguments, ledger, target)
    document = {"run": target.run_id, "request": target.request_ref, "generations": found}
    if arguments.json:
        screen.print_json(document | {"detail": [sentence(one) for one in found]})
    else:
        _print(document)
    return 1 if any(one["findings"] for one in found) else 0


def _search(arguments: argparse.Namespace, ledger: Ledger, target: Target) -> list[dict[str, Any]]:
    """Run the search in a worker with the recorded environment, with a line that says how far it is."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from replay.blame_job import BlameJob, search

    job = BlameJob(
        ledger=ledger.path,
        run_id=target.run_id,
        request=str(target.request_ref),
        generation=arguments.generation,
        max_replays=arguments.max_replays,
        arrivals=arguments.arrivals,
        samples=arguments.samples,
        jitter=arguments.jitter,
        seed=arguments.seed,
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=screen.console(stderr=True), disable=arguments.json, transient=True) as progress:
        task = progress.add_task("starting a worker", total=None)
        return search(ledger, job, tell=lambda state: progress.update(task, description=state))


def _print(document: Mapping[str, Any]) -> None:
    out = screen.console()
    for one in document["generations"]:
        out.print(f"{short(document['request'])}, generation {one['generation']}: {one['tokens']} tokens, "
                  f"{one['edits']} edits between its plan and an idle engine's, {one['replays']} replays",
                  soft_wrap=True, markup=False)  # fmt: skip
        out.print(sentence(one), soft_wrap=True, markup=False)
        for finding in one["findings"]:
            if finding["resolved"]:
                _print_ends(finding)
        for line in around(one):
            out.print(line, soft_wrap=True, markup=False)


def _print_ends(finding: Mapping[str, Any]) -> None:
    """Print the two plans and the two tokens."""
    out = screen.console()
    before, after = finding["before"], finding["after"]
    rows = [
        (name, before[name], after[name])
        for name in ("rows", "batch", "tokens", "context", "position", "start", "count")
        if before is not None and after is not None and before[name] != after[name]
    ]
    other = finding["other"] or {}
    rows += [(name, finding["recorded"][name], other.get(name)) for name in ("token", "margin", "logits_digest")]
    screen.print_table(out, ("", "as recorded", "one edit on"), [[name, str(a), str(b)] for name, a, b in rows])


def sentence(found: Mapping[str, Any]) -> str:
    """Say in words what was found for one generation."""
    if not found["tokens"]:
        return "no token was generated"
    if not found["findings"]:
        return "nothing in the schedule changed this request: alone it has the same bits"
    said = [_of_finding(one) for one in found["findings"]]
    if all(one["layer"] == "bits" for one in found["findings"]):
        said.append("no other token follows from it")
    return "; ".join(said)


def around(found: Mapping[str, Any]) -> list[str]:
    """Say what other arrivals change."""
    said: list[str] = []
    if "arrivals" in found:
        shifts = found["arrivals"]["shifts"]
        changing = [one for one in shifts if one["bits"] is not None]
        said.append(f"arrivals: {len(changing)} of {len(shifts)} moves of one arrival by one step change the bits")
        said += [f"  {_moved(one)}" for one in changing]
    if "sensitivity" in found:
        score = found["sensitivity"]
        steps = f"{score['jitter']} step{'s' if score['jitter'] > 1 else ''}"
        said.append(
            f"arrivals jittered by up to {steps}: bits change in {_share(score['bits'])}, tokens in "
            f"{_share(score['tokens'])}; {score['distinct']} distinct slices, {found['replays_around']} replays"
        )
    if not all(found[name]["faithful"] for name in ("arrivals", "sensitivity") if name in found):
        said.append("  (simulated without jitter, its slice is not the recorded one: these schedules are like it only)")
    return said


def _share(rate: Mapping[str, Any]) -> str:
    sure = f"{100 * rate['confidence']:.0f}%"
    return f"{rate['count']} of {rate['samples']} ({sure} interval {rate['low']:.2f} to {rate['high']:.2f})"


def _moved(shift: Mapping[str, Any]) -> str:
    who = "this request" if shift["who"] is None else _name(shift["who"])
    when = "later" if shift["by"] > 0 else "earlier"
    token = "" if shift["token"] is None else f", another token at {shift['token']}"
    return f"{who} one step {when}: bits part at token {shift['bits']}{token}"


def _name(neighbour: Mapping[str, Any]) -> str:
    return f"request {short(neighbour['request'])}" if neighbour["request"] else str(neighbour["pseudonym"])


def _of_finding(finding: Mapping[str, Any]) -> str:
    layer = finding["layer"]
    if not finding["resolved"]:
        return (
            f"{layer} of token {finding['token_index']} change between steps {finding['first_step']} and "
            f"{finding['last_step']}: {finding['edits_left']} edits were left when the replays ran out"
        )
    said = f"{layer} of token {finding['token_index']} (step {finding['step']}) change when {_of_edit(finding)}"
    if layer == "tokens" and finding["other"]:
        said += f": {finding['recorded']['token']} becomes {finding['other']['token']}"
    return said + ("" if finding["repeated"] else " (NOT repeated: an end of the search gave something else again)")


def _of_edit(finding: Mapping[str, Any]) -> str:
    edit, before, after = finding["edit"], finding["before"], finding["after"]
    if edit["kind"] == "prefix_hit":
        return f"its prefix is computed anew instead of read from the cache (step {edit['step']})"
    if edit["kind"] == "preemption":
        return f"it is not preempted and recomputed (step {edit['step']})"
    padded = [
        f"{word} {before[name]} -> {after[name]}"
        for name, word in (("batch", "padded batch"), ("tokens", "padded tokens"), ("context", "padded context"),
                           ("position", "position in the batch"))
        if before[name] != after[name]
    ]  # fmt: skip
    if edit["kind"] == "chunk_boundary":
        end = f"{before['start'] + before['count']} -> {edit['chunk_end']}"
        return f"a chunk of its prompt ends elsewhere, {end} (step {edit['step']}" + _listed(padded) + ")"
    neighbour = edit["neighbour"]
    who = _name(neighbour)
    verb = "which joined then, leaves" if neighbour["joined"] else "leaves"
    return f"the row of {who} {verb} the call of step {edit['step']}" + _listed(padded)


def _listed(padded: list[str]) -> str:
    return f": {', '.join(padded)}" if padded else ""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10000")
    return value

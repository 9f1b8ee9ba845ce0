"""How was a one-shot request answered, and does it give the same bits?  `show`, `run` and `diff` on inference runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from replay.catalog import Target, short
from replay.commands import screen
from replay.errors import PinRefused, ReplayRefused
from replay.verdict import EXIT_FAILED, ReplayVerdict, Verdict, exit_code, tally

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger

MODES = ("faithful", "alone")
ALIKE = 24
"""Digits of an id that tell apart what was sent in one millisecond."""


def show_inference(ledger: Ledger, target: Target, *, as_json: bool) -> int:
    """Print who had a one-shot request's time, and in which call it was."""
    from replay.inferences import load_inferences

    recorded = load_inferences(ledger, target.run_id)
    seen = recorded.requests[target.request_ref or ""]
    if as_json:
        screen.print_json({"run": recorded.run_id, "package": recorded.package} | seen.to_document())
        return 0
    out = screen.console()
    out.print(f"[bold]{seen.request_ref}[/bold] of {recorded.run_id}", soft_wrap=True)
    out.print(f"{seen.status} in {screen.duration(seen.duration_us)}, package {recorded.package[:19]}", soft_wrap=True)
    if seen.failure is not None:
        said = f"{seen.failure.get('failure_class')}: {seen.failure.get('message')}"
        out.print(said, style="red", soft_wrap=True, markup=False)
    columns = (*seen.times_us, "all")
    values = (*seen.times_us.values(), sum(seen.times_us.values()))
    screen.print_table(out, columns, [[screen.duration(value) for value in values]])
    if seen.batch is None:
        out.print("no call took it")
    else:
        where = f"call {seen.batch} on instance {seen.instance}: {seen.batch_size} rows, padded to {seen.padded}"
        sizes = f" ({seen.shape})" if seen.shape else ""
        out.print(f"{where}{sizes}; its own from row {seen.offset}", soft_wrap=True)
    screen.print_table(out, ("output", "digest"), [(name, value[:19]) for name, value in seen.outputs.items()])
    out.print(f"\nreplay it: replay run {seen.request_ref}", soft_wrap=True)
    return 0


def run_inference(arguments: argparse.Namespace, ledger: Ledger, target: Target) -> int:
    """Answer one request, or every request of a run, again in a worker and print the verdicts."""
    from replay.inference_worker import replay_inferences
    from replay.inferences import load_inferences
    from replay.jobs import Job
    from replay.launch import died

    recorded = load_inferences(ledger, target.run_id)
    _check(arguments, bool(recorded.requests))
    wanted = tuple(recorded.requests) if target.request_ref is None else (target.request_ref,)
    job = Job(ledger=ledger.path, run_id=target.run_id, requests=wanted, mode=arguments.mode, repeat=arguments.repeat)
    try:
        _refuse_settings(arguments.settings)
        found = [verdict for _, _, verdict in replay_inferences(ledger, recorded, job)]
    except PinRefused as refusal:
        found = [_refused(target, refusal)]
    whole = target.request_ref is None or len(found) > 1
    if arguments.json:
        documents = [verdict.to_document() for verdict in found]
        summary = {"mode": arguments.mode, "summary": tally(found), "replays": documents}
        screen.print_json(summary if whole else documents[0])
    else:
        _print(found, arguments.mode)
    return EXIT_FAILED if any(died(verdict) for verdict in found) else exit_code(found)


def diff_inferences(ledger: Ledger, left: Target, right: Target, *, as_json: bool, brief: bool) -> int:
    """Compare two one-shot requests, or two runs of them; returns 0 when all are the same to the bit."""
    from replay.commands.pins import print_pins, print_preparation
    from replay.inference_comparison import compare_inferences

    found = compare_inferences(ledger, left, right)
    pairs = found["requests"]
    same = all(one["verdict"] == "exact" for one in pairs)
    if as_json:
        screen.print_json(found)
        return 0 if same else 1
    out = screen.console()
    for side, name in (("A", "left"), ("B", "right")):
        seen = found[name]
        said = f"{side}  {seen['run']}, package {seen['package'][:19]}, {len(pairs)} of {seen['requests']} compared"
        out.print(said, soft_wrap=True, markup=False)
    rows = [
        (
            short(one["left"]["request"], ALIKE),
            short(one["right"]["request"], ALIKE),
            screen.verdict_text(one["verdict"]),
            one["layer"],
            one["detail"],
        )
        for one in pairs
    ]
    screen.print_table(out, ("A", "B", "verdict", "layer", "what"), rows)
    print_pins(out, found["pins"])
    print_preparation(out, found["preparation"])
    if not brief:
        out.print("\n[bold]calls and times[/bold]")
        columns = ("A", "call", "took", "B", "call", "took")
        screen.print_table(out, columns, [(*_call(one["left"]), *_call(one["right"])) for one in pairs])
    return 0 if same else 1


def _call(seen: dict[str, Any]) -> tuple[str, str, str]:
    """Say which request, in which place of which call, and how long it took."""
    where = "none" if seen["batch"] is None else f"{seen['batch']}: row {seen['offset']} of {seen['padded']}"
    return short(seen["request"], ALIKE), where, screen.duration(seen["duration_us"])


def _check(arguments: argparse.Namespace, any_requests: bool) -> None:
    if arguments.mode not in MODES or arguments.together:
        given = "--together" if arguments.together else f"--mode {arguments.mode}"
        raise ReplayRefused(f"{given} does not apply to a one-shot request", fix="Leave it out, or say --mode alone.")
    if not any_requests:
        raise ReplayRefused("this run answered no request", fix="Choose another: replay list")


def _refuse_settings(settings: list[str]) -> None:
    """Refuse a pin to be set: a one-shot request replays under its own pins."""
    from replay.substitutes import parse_substitutions

    for one in parse_substitutions(settings):
        raise PinRefused(
            "a one-shot request replays under its own pins",
            pin=one.pin,
            fix="Prepare the model so, and answer the request with that package: replaylab infer",
        )


def _refused(target: Target, refusal: PinRefused) -> ReplayVerdict:
    return ReplayVerdict(
        verdict=Verdict.REFUSED,
        refused_pin=refusal.pin,
        original={"run": target.run_id, "request": target.request_ref},
        replay={"run": None, "status": "refused", "error_type": refusal.error_type, "fix": refusal.fix},
        detail=refusal.message,
    )


def _print(found: list[ReplayVerdict], mode: str) -> None:
    out = screen.console()
    if len(found) == 1:
        verdict = found[0]
        out.print(screen.verdict_text(verdict.verdict.value), verdict.detail, soft_wrap=True, markup=False)
        for change in verdict.pins_changed:
            said = f"  other here: {change['pin']}  {change['original']} -> {change['replay']}"
            out.print(said, soft_wrap=True, markup=False)
        if verdict.replay.get("fix"):
            out.print(f"  fix: {verdict.replay['fix']}", soft_wrap=True, markup=False)
        before, after = verdict.original.get("outputs", {}), verdict.replay.get("outputs", {})
        rows = [(name, before.get(name, "")[:19], after.get(name, "")[:19]) for name in sorted({*before, *after})]
        if rows:
            screen.print_table(out, ("output", "recorded", "replay"), rows)
    else:
        other = [one for one in found if one.verdict is not Verdict.EXACT]
        rows = [
            (short(str(one.original.get("request"))), screen.verdict_text(one.verdict.value), one.detail)
            for one in other[:40]
        ]
        if rows:
            screen.print_table(out, ("request", "verdict", "what"), rows)
        if len(other) > len(rows):
            out.print(f"... and {len(other) - len(rows)} more: replay run ... --json")
        out.print(f"{len(found)} replays ({mode}): {screen.counts(tally(found))}")
    children = sorted({str(one.replay["run"]) for one in found if one.replay.get("run")})
    if children:
        out.print("recorded as " + ", ".join(children), soft_wrap=True)

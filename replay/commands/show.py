"""What happened to one request?  `replay show ID`: waterfall with critical path, pins, tokens, tools, citations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, cast

from replay.catalog import Target, list_requests, resolve
from replay.commands import screen
from traces.stages import Stage

if TYPE_CHECKING:
    from rich.console import Console

    from traces.ledger.ledger import Ledger

EXAMPLE = """\
example:
  replay show req_0199
  replay show run_0199/req_0199     the request as one particular run (a replay) had it
  replay show run_0198              a preparation: its nine stages
exit codes: 0 shown, 2 no such recording
"""
BAR = 44


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replay show`."""
    parser.epilog = EXAMPLE
    parser.add_argument("id", metavar="ID", help="a request, a preparation, or a run to list its requests")
    parser.add_argument("--brief", action="store_true", help="only question, answer and waterfall")


def run(arguments: argparse.Namespace) -> int:
    """Show a request; a run shows its requests."""
    ledger = screen.open_ledger(arguments.ledger)
    target = resolve(ledger, arguments.id)
    if target.request_ref is None:
        from replay.commands.listing import print_requests
        from replay.commands.preparation import show_preparation
        from replay.preparations import is_preparation

        if is_preparation(ledger, target.run_id):
            return show_preparation(ledger, target.run_id, as_json=arguments.json)
        return print_requests(list_requests(ledger, target.run_id), as_json=arguments.json)
    return show(ledger, target, as_json=arguments.json, brief=arguments.brief)


def show(ledger: Ledger, target: Target, *, as_json: bool, brief: bool = False) -> int:
    """Print one request; `brief` leaves out generations, tools, pins and the verdict."""
    from replay.commands.inference import show_inference
    from replay.inferences import is_inference
    from replay.portrait import portrait
    from replay.records import load_request

    if is_inference(ledger, target.run_id):
        return show_inference(ledger, target, as_json=as_json)
    seen = portrait(ledger, load_request(ledger, target.run_id, target.request_ref or ""))
    if as_json:
        screen.print_json(seen)
        return 0
    out = screen.console()
    _print_head(out, seen)
    _print_waterfall(out, seen)
    if brief:
        return 0
    _print_generations(out, seen)
    _print_engine_time(out, seen)
    _print_tools(out, seen)
    _print_pins(out, seen)
    _print_preparation(out, seen)
    _print_verdict(out, seen)
    out.print(f"\nreplay it: replay run {seen['request']}", soft_wrap=True)
    return 0


def _print_head(out: Console, seen: dict[str, Any]) -> None:
    route = seen["route"] or {}
    took = screen.duration(seen["duration_us"])
    where = f", route {route.get('route')} ({route.get('backend')} {route.get('precision')})" if route else ""
    out.print(f"[bold]{seen['request']}[/bold] of {seen['run']}", soft_wrap=True)
    out.print(f"{seen['status'] or 'never ended'} in {took or 'unknown time'}{where}", soft_wrap=True)
    failure = seen["failure"]
    if failure is not None:
        stage = f" in {Stage(failure['stage']).word}" if failure["stage"] else ""
        out.print(f"{failure['failure_class']}{stage}: {failure['message']}", style="red", soft_wrap=True, markup=False)
        advice = f"  retry decision: {failure['retry_decision']}; fix: {failure['fix']}"
        out.print(advice, soft_wrap=True, markup=False)
    out.print(f"asked:    {seen['question']}", soft_wrap=True, markup=False)
    answer = seen["answer"]
    if answer is not None:
        out.print(f"answered: {answer.get('answer') or answer.get('text') or answer}", soft_wrap=True, markup=False)
    for citation in seen["citations"]:
        out.print(f"  cites {citation['source']} ({citation['kind']})", soft_wrap=True, markup=False)


def _print_waterfall(out: Console, seen: dict[str, Any]) -> None:
    """Print one line a stage: the whole bar is its time, the full part of it the critical path."""
    rows = seen["waterfall"]
    if not rows:
        return
    total = max(row["start_us"] + row["duration_us"] for row in rows if row["start_us"] is not None) or 1
    out.print("\n[bold]waterfall[/bold]  (█ on the critical path, ░ overlapped by a later stage)")
    for row in rows:
        mark = "" if row["status"] in ("ok", None) else f" [red]{row['status']}[/red]"
        decision = f" {row['decision']}" if row["decision"] else ""
        times = f"{screen.duration(row['duration_us']):>9} {screen.duration(row['critical_us']):>9}"
        name = row["name"] + (f" {row['attempt']}" if row["attempt"] > 1 else "")
        out.print(f"  {name:<16}{_bar(row, total)} {times}{mark}{decision}", soft_wrap=True)
    critical = sum(row["critical_us"] for row in rows)
    out.print(f"  {'end to end':<16}{'':{BAR}} {screen.duration(total):>9} {screen.duration(critical):>9}")


def _bar(row: dict[str, Any], total: int) -> str:
    if row["start_us"] is None:
        return " " * BAR
    first = min(BAR - 1, row["start_us"] * BAR // total)
    length = max(1, min(BAR - first, round(row["duration_us"] * BAR / total)))
    full = round(length * row["critical_us"] / row["duration_us"]) if row["duration_us"] else 0
    return f"{' ' * first}{'█' * full}{'░' * (length - full)}".ljust(BAR)


def _print_generations(out: Console, seen: dict[str, Any]) -> None:
    if not seen["generations"]:
        return
    out.print("\n[bold]generations[/bold]")
    rows = [
        (
            place + 1,
            one["prompt_tokens"],
            one["cached_tokens"],
            one["output_tokens"],
            one["finish_reason"],
            screen.duration(one["queue_us"]),
            screen.duration(one["first_token_us"]),
            screen.duration(one["per_token_us"]),
            one["steps"],
            None if one["smallest_margin"] is None else f"{one['smallest_margin']:.3g} at {one['smallest_margin_at']}",
        )
        for place, one in enumerate(seen["generations"])
    ]
    columns = (
        "no.",
        "prompt",
        "cached",
        "output",
        "ended by",
        "queue",
        "first token",
        "a token",
        "steps",
        "least margin",
    )
    screen.print_table(out, columns, rows)


def _print_engine_time(out: Console, seen: dict[str, Any]) -> None:
    """Print who had each generation's time in the engine, and which steps computed what it read from the cache."""
    known = [(place + 1, one) for place, one in enumerate(seen["generations"]) if one["latency"] is not None]
    if known:
        out.print("\n[bold]time in the engine[/bold]  (adds up to submission until end)")
        parts = list(known[0][1]["latency"])
        columns = ("no.", *(name.removesuffix("_us") for name in parts), "all")
        rows = [
            (
                place,
                *(screen.duration(one["latency"][name]) for name in parts),
                screen.duration(sum(one["latency"].values())),
            )
            for place, one in known
        ]
        screen.print_table(out, columns, rows)
    for place, one in enumerate(seen["generations"], 1):
        if one["cached_from"]:
            blocks = one["cached_from"]
            found = sorted({block["step"] for block in blocks})
            steps = f"step{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
            out.print(f"no. {place} read {len(blocks)} cache blocks that {steps} computed", soft_wrap=True)


def _print_tools(out: Console, seen: dict[str, Any]) -> None:
    for tool in seen["tools"]:
        call = f"tool {tool['tool']}({_inline(tool['arguments'])}) -> {_inline(tool['result'])}"
        out.print(f"{call}  [{tool['side_effect']}]", soft_wrap=True, markup=False)


def _print_pins(out: Console, seen: dict[str, Any]) -> None:
    """Print the pins that people ask about; --json has all of them."""
    pins = seen["pins"]
    if pins is None:
        return
    said = {
        "artifact": ("model", "package_digest", "quantization"),
        "compiler": ("backend", "backend_version", "precision", "optimization_level", "flags"),
        "hardware": ("cpu_model", "threads", "environment"),
        "scheduling": ("policy", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching"),
        "generation": ("seed", "sampler", "temperature", "max_tokens"),
        "context": ("index_digest", "ranking", "token_budget"),
        "tools": ("server", "server_version", "authorization_version"),
        "policy": ("policy_version", "repair_limit", "thresholds"),
    }
    out.print("\n[bold]pins[/bold]")
    for dimension, fields in said.items():
        document = pins[dimension]
        shown = ", ".join(f"{name} {_value(document[name])}" for name in fields if document[name] not in (None, {}, ()))
        out.print(f"  {dimension:<11}{shown}", soft_wrap=True, markup=False)


def _print_preparation(out: Console, seen: dict[str, Any]) -> None:
    """Print what preparation did to the package that answered."""
    if seen["preparation"]:
        out.print("\n[bold]how its package was prepared[/bold]")
        rows = [
            (f"{row['stage']} {row['name']}", screen.duration(row["duration_us"]), row["summary"])
            for row in seen["preparation"]
        ]
        screen.print_table(out, ("stage", "took", "recorded"), rows)


def _print_verdict(out: Console, seen: dict[str, Any]) -> None:
    verdict = seen["verdict"]
    if verdict is not None:
        out.print()
        out.print("replay verdict:", screen.verdict_text(verdict["verdict"]), verdict.get("detail", ""), soft_wrap=True)


def _value(value: Any) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return value[:19]
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value)
        return "{" + ", ".join(f"{name}={_value(entry)}" for name, entry in entries.items()) + "}"
    return str(value)


def _inline(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(f"{name}={value}" for name, value in values.items())

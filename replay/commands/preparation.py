"""What did a preparation do, is it the same again, and where do two part?  `show`, `run` and `diff` on preparations."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from replay.catalog import Target, short
from replay.commands import screen
from replay.errors import PinRefused
from replay.verdict import ReplayVerdict, Verdict, exit_code
from traces.stages import PREPARATION_STAGES

if TYPE_CHECKING:
    from rich.console import Console

    from replay.rebuild import RebuildReport
    from traces.ledger.ledger import Ledger


def show_preparation(ledger: Ledger, run_id: str, *, as_json: bool) -> int:
    """Print the nine stages of a preparation and the record of each."""
    from replay.preparations import load_preparation
    from runtime.prepare.table import summarize

    seen = load_preparation(ledger, run_id)
    if as_json:
        screen.print_json(seen.to_document())
        return 0
    out = screen.console()
    out.print(f"[bold]{seen.run_id}[/bold]", soft_wrap=True)
    options = ", ".join(f"{name} {value}" for name, value in seen.options.items() if value not in ({}, [], None))
    out.print(f"{seen.model} ({seen.model_digest[:19]}) for {seen.backend}: {options}", soft_wrap=True, markup=False)
    out.print(f"package: {seen.package or 'none'}", soft_wrap=True)
    rows: list[tuple[Any, ...]] = []
    for one in seen.stages:
        failed = None if one.failure is None else f"failed, {one.failure['failure_class']}: {one.failure['message']}"
        said = failed or summarize(one.stage, one.record)
        digest = (one.output_digest or "").removeprefix("sha256:")[:12]
        rows.append((f"{one.stage.value} {one.stage.word}", screen.duration(one.duration_us), said, digest))
    screen.print_table(out, ("stage", "took", "recorded", "emitted"), rows)
    if seen.verdict is not None:
        out.print("\nreplay verdict:", screen.verdict_text(seen.verdict["verdict"]), seen.verdict["detail"])
    else:
        out.print(f"\nrebuild it: replay run {short(seen.run_id)}", soft_wrap=True)
    return 0


def run_preparation(arguments: argparse.Namespace, ledger: Ledger, target: Target) -> int:
    """Rebuild a preparation in a worker and print the verdict."""
    from replay.environments import environment_for
    from replay.preparation_pins import parse_choices
    from replay.preparations import load_preparation
    from replay.rebuild import RebuildJob
    from replay.rebuild_worker import rebuild_in_worker
    from runtime.probe import pinned_environment

    recorded = load_preparation(ledger, target.run_id)
    job = RebuildJob(
        ledger=ledger.path,
        run_id=target.run_id,
        model=arguments.model,
        settings=tuple(arguments.settings),
        stop_at_first=arguments.stop_at_first,
    )
    try:
        choices = parse_choices(arguments.settings)
        variables = dict(os.environ) if recorded.hardware is None else pinned_environment(recorded.hardware)
        with _Bar(quiet=arguments.json) as bar:
            place = environment_for(choices, on_progress=bar.say)
            verdict = rebuild_in_worker(
                job, environment=place.variables(variables), interpreter=place.interpreter, on_report=bar.heard
            )
    except PinRefused as refusal:
        verdict = ReplayVerdict(
            verdict=Verdict.REFUSED,
            refused_pin=refusal.pin,
            original={"run": target.run_id, "request": None},
            replay={"run": None, "status": "refused", "error_type": refusal.error_type, "fix": refusal.fix},
            detail=refusal.message,
        )
    if arguments.json:
        screen.print_json(verdict.to_document())
    else:
        _print_verdict(verdict)
    return exit_code([verdict])


def diff_preparations(ledger: Ledger, left: str, right: str, *, as_json: bool) -> int:
    """Compare two preparations: pins, then stage by stage; returns 0 when all stages are the same."""
    from replay.preparation_comparison import compare_preparations

    found = compare_preparations(ledger, left, right)
    if as_json:
        screen.print_json(found)
        return 0 if found["equal"] else 1
    out = screen.console()
    for side, name in (("A", "left"), ("B", "right")):
        out.print(f"{side}  {found[name]['run']}  {found[name]['subject']}", soft_wrap=True, markup=False)
    first = found["first_stage"]
    verdict = "all stages are the same" if first is None else f"first stage that differs: {first}"
    out.print(screen.verdict_text("exact" if first is None else "diverged"), verdict)
    if found["pins"]:
        out.print("\n[bold]pins that differ[/bold]")
        rows = [(pin["pin"], _brief(pin["left"]), _brief(pin["right"])) for pin in found["pins"]]
        screen.print_table(out, ("pin", "A", "B"), rows)
    out.print()
    _print_stages(out, found["stages"], ("A", "B"))
    return 0 if found["equal"] else 1


class _Bar:
    """A bar over the nine stages, fed by a worker's reports."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("rebuilding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        self._progress = Progress(
            *columns, TimeElapsedColumn(), console=screen.console(stderr=True), disable=quiet, transient=True
        )
        self._task = self._progress.add_task("rebuild", total=len(PREPARATION_STAGES), state="starting a worker")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, state: str) -> None:
        """Say what is done before the first stage."""
        self._progress.update(self._task, state=state)

    def heard(self, report: RebuildReport) -> None:
        """Move with the worker."""
        if report.kind == "begun":
            self._progress.update(self._task, state=f"{report.body['stage']} {report.body['name']}")
        elif report.kind == "stage":
            self._progress.advance(self._task)


def _print_verdict(verdict: ReplayVerdict) -> None:
    out = screen.console()
    out.print(screen.verdict_text(verdict.verdict.value), verdict.detail, soft_wrap=True, markup=False)
    for change in verdict.pins_changed:
        mark = "set" if change.get("set") else "other here"
        out.print(
            f"  {mark}: {change['pin']}  {_brief(change['original'])} -> {_brief(change['replay'])}",
            soft_wrap=True,
            markup=False,
        )
    if verdict.replay.get("fix"):
        out.print(f"  fix: {verdict.replay['fix']}", soft_wrap=True, markup=False)
    _print_stages(out, verdict.replay.get("stages", []), ("recorded", "rebuilt"))
    if verdict.replay.get("run"):
        out.print(f"recorded as {verdict.replay['run']}", soft_wrap=True)


def _print_stages(out: Console, stages: list[dict[str, Any]], sides: tuple[str, str]) -> None:
    """Print one line a stage, and below it the fields of the first that differs."""
    if not stages:
        return
    done = {stage["stage"]: stage for stage in stages}
    first = next((stage for stage in stages if not stage["same"]), None)
    rows: list[tuple[Any, ...]] = []
    for described in PREPARATION_STAGES:
        stage = done.get(described.stage.value)
        name = f"{described.stage.value} {described.stage.word}"
        if stage is None:
            rows.append((name, "not reached", "", "", ""))
            continue
        word = screen.verdict_text("exact") if stage["same"] else screen.verdict_text("diverged")
        word.plain = "same" if stage["same"] else "first to differ" if stage is first else "differs"
        rows.append((name, word, screen.duration(stage["left_us"]), screen.duration(stage["right_us"]), _what(stage)))
    screen.print_table(out, ("stage", "", sides[0], sides[1], "differs in"), rows)
    if first is not None and first["fields"]:
        out.print(f"\n[bold]stage {first['stage']} {first['name']}[/bold]")
        fields = [(one["field"], one["left"], one["right"]) for one in first["fields"]]
        screen.print_table(out, ("field", *sides), fields)


def _what(stage: dict[str, Any]) -> str:
    names = [one["field"] for one in stage["fields"]]
    return ", ".join(names[:3]) + (f", {len(names) - 3} more" if len(names) > 3 else "")


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:19] if text.startswith("sha256:") else text if len(text) <= 48 else f"{text[:45]}..."

"""Can the main job be seen once, whole?  `replaylab demo`: record an incident, replay it bit for bit, name the pin."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from experiments.arrivals import Sent
    from experiments.recording import Answered, Recording
    from replay.jobs import ReplayMode
    from replay.verdict import ReplayVerdict
    from runtime.prepare.pipeline import PreparedPackage

EXAMPLE = """\
what happens:
  1  the reference model is prepared twice: float32 and bfloat16
  2  48 support requests of two tenants arrive over time; half-way the route is switched to bfloat16 (the incident)
  3  every request is replayed from its slice of the recorded batch schedule, then by itself
  4  one question from before the switch is compared with the same question after it
  5  one request is shown whole
example:
  replaylab demo --backend inductor
  replaylab demo --folder /tmp/demo --requests 96
exit codes: 0 every faithful replay is exact, 1 one is not, 2 refused, 3 failed
"""
ROUTE = "primary"
MARK = "replaylab-demo.json"


@dataclass(frozen=True, kw_only=True)
class Replays:
    """Verdicts on every request of a run in one mode, in order of arrival."""

    mode: str
    verdicts: tuple[ReplayVerdict, ...]
    seconds: float

    def count(self, word: str) -> int:
        """Count the verdicts with this word."""
        return sum(verdict.verdict.value == word for verdict in self.verdicts)

    def token_changes(self) -> int:
        """Count the requests whose replay said other tokens."""
        return sum(v.original.get("tokens_digest") != v.replay.get("tokens_digest") for v in self.verdicts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replaylab demo`."""
    parser.epilog = EXAMPLE
    parser.add_argument("--backend", default="eager", help="eager or inductor (default: %(default)s)")
    parser.add_argument(
        "--requests", type=_count, default=48, metavar="N", help="support requests (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of articles, accounts and questions (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, default=None, help="checkpoint folder (default: the reference model)")
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="made anew at each run (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads are a pin
    from experiments.errors import report
    from manifests.errors import ManifestError
    from traces.failures import ClassifiedError

    try:
        return _Demo(arguments).run()
    except (ClassifiedError, ManifestError) as error:
        return report(error, as_json=arguments.json)


class _Demo:
    def __init__(self, arguments: argparse.Namespace) -> None:
        from rich.console import Console

        self.arguments = arguments
        self.ledger: Path = arguments.folder / "ledger"
        self.out: Console = Console(highlight=False, quiet=arguments.json)
        self.found: dict[str, Any] = {}

    def run(self) -> int:
        """Walk through the five steps."""
        began = time.monotonic()
        _fresh_folder(self.arguments.folder)
        self.out.print("[bold]Record an incident, replay it bit for bit, name the pin that differs[/bold]\n")
        plain, other = (self._prepare(precision) for precision in ("float32", "bfloat16"))
        recording = self._record(plain, other)
        faithful = self._replay(recording.run_id, "faithful")
        alone = self._replay(recording.run_id, "alone")
        self._tell_replays(faithful, alone)
        before, after = _same_question(recording)
        self._compare(before, after)
        self.found |= {"run": recording.run_id, "seconds": round(time.monotonic() - began, 1)}
        exact = faithful.count("exact") == len(faithful.verdicts)
        self._finish(after)
        return 0 if exact else 1

    def _prepare(self, precision: str) -> PreparedPackage:
        from experiments.packages import prepare_package, reference_model

        model = self.arguments.model or reference_model()
        backend = self.arguments.backend
        began = time.monotonic()
        with _progress(f"preparing {backend} {precision}", total=9) as (bar, task):
            prepared = prepare_package(
                model, backend=backend, precision=precision, ledger=self.ledger, name=precision,
                on_stage=lambda: bar.advance(task),
            )  # fmt: skip
        seconds = time.monotonic() - began
        self.out.print(
            f"prepared  {backend} {precision:<9} nine stages in {seconds:.1f} s   {prepared.digest[:19]}",
            soft_wrap=True,
        )
        self.found.setdefault("packages", {})[precision] = prepared.digest
        return prepared

    def _record(self, plain: PreparedPackage, other: PreparedPackage) -> Recording:
        import asyncio

        from experiments.recording import record_workload
        from experiments.summary import summarize
        from experiments.support_desk import switched_workload
        from runtime.prepare.store import PackageStore
        from runtime.serve.deployment import create_support_desk
        from traces.ledger.ledger import Ledger

        seed, count = self.arguments.seed, self.arguments.requests
        deployment = create_support_desk(self.arguments.folder / "desk", seed=seed, packages={ROUTE: plain.digest})
        workload = switched_workload(seed, count, route=ROUTE, package=other.digest)
        with _progress("recording", total=count) as (bar, task):
            recording = asyncio.run(
                record_workload(
                    workload, ledger=self.ledger, deployment=deployment, store=PackageStore(self.ledger),
                    label=workload.name, on_done=lambda sent: bar.advance(task),
                )
            )  # fmt: skip
        ledger = Ledger(self.ledger)
        ledger.drain()
        summary = summarize(
            recording, ledger.events(run_id=recording.run_id, event_type=["engine.sequence", "engine.step"])
        )
        right = sum(_is_right(sent) for sent in recording.sent)
        first = summary["first_token_us"]["p50"]
        self.out.print(
            f"recorded  {summary['ok']} of {count} requests ok, {right} right, in {recording.wall_us / 1e6:.1f} s;"
            f" largest batch {summary['largest_batch']}; first token p50"
            f" {'-' if first is None else f'{first / 1000:.0f} ms'}; the route was switched half-way",
            soft_wrap=True,
        )
        self.found["recorded"] = summary | {"answered_right": right}
        return recording

    def _replay(self, run_id: str, mode: ReplayMode) -> Replays:
        from replay.batch import replay_requests
        from traces.ledger.ledger import Ledger

        began = time.monotonic()
        with _progress(f"replaying, {mode}", total=self.arguments.requests) as (bar, task):
            done = replay_requests(Ledger(self.ledger), run_id, mode=mode, on_verdict=lambda verdict: bar.advance(task))
        return Replays(mode=mode, verdicts=tuple(one.verdict for one in done), seconds=time.monotonic() - began)

    def _tell_replays(self, faithful: Replays, alone: Replays) -> None:
        total = len(faithful.verdicts)
        layers = Counter(verdict.layer for verdict in alone.verdicts if verdict.layer)
        self.out.print(
            f"replayed  [bold green]{faithful.count('exact')} of {total} exact[/bold green], each from its slice of the"
            f" batch schedule, in {faithful.seconds:.1f} s", soft_wrap=True,
        )  # fmt: skip
        self.out.print(
            f"          {alone.count('exact')} of {len(alone.verdicts)} exact when each is replayed alone:"
            f" [bold red]{alone.count('diverged')} diverge[/bold red]"
            f" (first in {', '.join(f'{layer}: {count}' for layer, count in layers.most_common())};"
            f" other tokens in {alone.token_changes()})", soft_wrap=True,
        )  # fmt: skip
        for replays in (faithful, alone):
            words = Counter(verdict.verdict.value for verdict in replays.verdicts)
            self.found[replays.mode] = {**words, "seconds": round(replays.seconds, 1)}
        self.found["alone"]["other_tokens"] = alone.token_changes()

    def _compare(self, before: str, after: str) -> None:
        if self.arguments.json:
            return
        from replay.cli import main as replay

        where = ["--ledger", str(self.ledger)]
        self.out.print(
            f"\n[bold]$ replay diff {_short(before)} {_short(after)} --brief[/bold]   one question, both sides",
            soft_wrap=True,
        )
        replay(["diff", before, after, "--brief", *where])
        self.out.print(f"\n[bold]$ replay show {_short(after)} --brief[/bold]")
        replay(["show", after, "--brief", *where])

    def _finish(self, after: str) -> None:
        if self.arguments.json:
            print(json.dumps(self.found, indent=2))
            return
        where = f"--ledger {self.ledger}"
        command = ".venv/bin/replay" if Path(".venv/bin/replay").exists() else "replay"
        self.out.print(f"\n{self.found['seconds']} s in all.  Go on:", soft_wrap=True)
        self.out.print(f"  {command} run {_short(after)} --set compiler.precision=float32 {where}", soft_wrap=True)
        self.out.print(f"  {command}lab dashboard {where}     the pages in a browser", soft_wrap=True)


def _fresh_folder(folder: Path) -> None:
    """Empty the demo's folder; one that the demo did not make is refused, so that nothing of a person's is lost."""
    from experiments.errors import WorkloadError

    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise WorkloadError(
                f"{folder} was not made by the demo and is left alone", path=folder, fix="Give another --folder."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text('{"made_by": "replaylab demo"}\n')


@contextmanager
def _progress(name: str, *, total: int) -> Generator[tuple[Progress, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(f"{name:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar, bar.add_task(name, total=total)


def _is_right(sent: Sent[Answered]) -> bool:
    """Say whether the final answer and its sources are the expected ones; a new ticket's number may be any."""
    if sent.answer is None or sent.request.expect is None:
        return False
    said = json.dumps(sent.answer.outcome.response.get("result"), separators=(",", ":"), ensure_ascii=False)
    wanted = re.escape(sent.request.expect["outputs"][-1]).replace(re.escape("{ticket}"), r"T-\d+")
    return re.fullmatch(wanted, said) is not None


def _same_question(recording: Recording) -> tuple[str, str]:
    """Return the first request and the last one that asked the same: before and after the switch."""
    first = recording.sent[0].request
    asked = [sent for sent in recording.sent if sent.answer and sent.request.question == first.question]
    references = [str(sent.answer.outcome.response["request"]) for sent in asked if sent.answer]
    return references[0], references[-1]


def _count(text: str) -> int:
    """Read the number of requests: one on either side of the switch at least."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError("the switch needs a request on either side: give 2 or more")
    return value


def _short(identity: str) -> str:
    from replay.catalog import short

    return short(identity)

"""How is a workload recorded from the command line?  `replaylab record WORKLOAD`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.workloads import FORMATS, Workload

if TYPE_CHECKING:
    from eval.token_latency import Objective
    from experiments.arrivals import Sent
    from experiments.recording import Answered
    from runtime.prepare.store import PackageStore
    from runtime.serve.deployment import Deployment

SUPPORT_DESK = "support-desk"
EXAMPLE = """\
example:
  replaylab prepare runtime/models/reference --backend onnxruntime
  replaylab record support-desk --limit 48            questions made from a seed
  replaylab record workload.jsonl --package float32 --package fast=bfloat16
  replaylab record AzureLLMInferenceTrace_code.csv --limit 200 --speed 20
  replaylab record workload.jsonl --scheduling policy=fair --scheduling max_num_queued_reqs=64
  replaylab record support-desk --slo-ttft-ms 500 --slo-tpot-ms 30      goodput: requests a second that kept both

A workload is JSON Lines ({"at_us", "tenant", "question", "generation", "deadline_us", "priority"}, or {"at_us",
"control": "activate", "route", "package"}), an Azure LLM
inference trace, or a Mooncake trace; the latter two are scaled to the model.
Times count from the scheduled arrival, so that a late client hides no queue; how late it sent is the send lag.
TPOT is (last - first token) / (tokens - 1) of a generation, ITL a gap between two chunks divided by the tokens that
ended it. A wait for a tool counts to the end of a request, and is no gap between tokens.
exit codes: 0 recorded (whatever became of single requests), 2 refused or bad input, 3 failed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `replaylab record`."""
    parser.epilog = EXAMPLE
    parser.add_argument("workload", metavar="WORKLOAD", help=f"a file, or the word {SUPPORT_DESK}")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="layout of the file (default: auto)")
    parser.add_argument("--limit", type=_count, default=None, metavar="N", help="send only the first N requests")
    parser.add_argument("--speed", type=_speed, default=1.0, metavar="X", help="send X times as fast (default 1)")
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="[ROUTE=]PACKAGE",
        help="package by digest or name for a route; repeat for more (default: the only one there is)",
    )
    parser.add_argument("--deployment", type=Path, default=None, metavar="FOLDER", help="serve this deployment")
    parser.add_argument("--seed", type=int, default=0, help="of the support desk made for the run (default 0)")
    parser.add_argument("--temperature", type=_temperature, default=None, help=f"for {SUPPORT_DESK} (default: greedy)")
    parser.add_argument(
        "--scheduling", action="append", default=[], metavar="FIELD=VALUE", help="an engine setting; repeat for more"
    )
    parser.add_argument("--prompt-tokens", type=_count, default=None, metavar="N", help="longest prompt of a trace")
    parser.add_argument("--output-tokens", type=_count, default=None, metavar="N", help="longest output of a trace")
    for name, what in {
        "ttft": "from its scheduled arrival to its first token",
        "tpot": "a token after the first, on average",
        "e2e": "from its scheduled arrival to its last token",
    }.items():
        parser.add_argument(
            f"--slo-{name}-ms",
            type=_milliseconds,
            default=None,
            metavar="MS",
            help=f"goodput: a good request takes at most MS {what}",
        )
    parser.add_argument(
        "--threads",
        type=int,
        choices=range(1, 65),
        default=1,
        metavar="1..64",
        help="compute threads, a pin (default: 1)",
    )
    parser.add_argument("--ledger", type=Path, default=None, metavar="PATH", help="default: REPLAYLAB_LEDGER, ./ledger")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Record the workload and print a summary."""
    from experiments.errors import report
    from manifests.errors import ManifestError
    from traces.failures import ClassifiedError

    try:
        return _run(arguments)
    except (ClassifiedError, ManifestError) as error:
        return report(error, as_json=arguments.json)


def _run(arguments: argparse.Namespace) -> int:
    import asyncio

    from experiments.recording import check_controls, record_workload
    from experiments.summary import summarize
    from experiments.summary_table import print_summary
    from runtime.prepare.store import PackageStore
    from traces.ledger.layout import default_ledger
    from traces.ledger.ledger import Ledger

    path: Path = arguments.ledger or default_ledger()
    store = PackageStore(path)
    deployment = _deployment(arguments, path, store)
    workload = _workload(arguments, deployment, store).limited(arguments.limit)
    check_controls(workload, deployment, store, path=Path(arguments.workload))
    with _Progress(workload, quiet=arguments.json) as progress:
        recording = asyncio.run(
            record_workload(
                workload,
                ledger=path,
                deployment=deployment,
                store=store,
                threads=arguments.threads,
                speed=arguments.speed,
                label=workload.name,
                on_sent=progress.sent,
                on_done=progress.done,
            )
        )
    ledger = Ledger(path)
    ledger.drain()
    events = ledger.events(run_id=recording.run_id, event_type=["engine.sequence", "engine.step"])
    summary = summarize(recording, events, objective=_objective(arguments))
    if arguments.json:
        print(json.dumps(summary | {"notes": list(workload.notes)}, indent=2))
    else:
        print_summary(summary, workload)
    return 0


def _deployment(arguments: argparse.Namespace, ledger: Path, store: PackageStore) -> Deployment:
    """Load the named deployment, or make a support desk over the packages; the same one is used again."""
    from experiments.errors import WorkloadError
    from manifests.canonical import digest
    from manifests.run import with_settings
    from manifests.scheduling import SchedulingManifest
    from runtime.prepare.load import check_scheduling
    from runtime.serve.deployment import DOCUMENT_FILE, Deployment, create_support_desk

    if arguments.deployment is not None:
        if arguments.package or arguments.scheduling:
            raise WorkloadError(
                "a deployment names its own packages and settings",
                path=arguments.deployment,
                fix="Leave out --package and --scheduling, or leave out --deployment.",
            )
        return Deployment.load(arguments.deployment)
    packages = _packages(arguments.package, store)
    scheduling = with_settings(SchedulingManifest(), arguments.scheduling, dimension="scheduling")
    check_scheduling(store, packages.values(), scheduling)
    name = digest({"seed": arguments.seed, "packages": packages, "scheduling": scheduling.to_document()})[7:19]
    folder = ledger / "deployments" / f"support-desk-{name}"
    if (folder / DOCUMENT_FILE).exists():
        return Deployment.load(folder)
    return create_support_desk(folder, seed=arguments.seed, packages=packages, scheduling=scheduling)


def _packages(named: list[str], store: PackageStore) -> dict[str, str]:
    """Return route to package digest; the first is the default route, `primary` unless it is named."""
    from experiments.errors import WorkloadError

    present = store.digests()
    if not named:
        if len(present) == 1:
            return {"primary": present[0]}
        message = "no package is prepared" if not present else f"{len(present)} packages are prepared; say which"
        fix = "Prepare one: replaylab prepare MODEL" if not present else "Give --package; see replaylab packages list."
        raise WorkloadError(message, path=store.root, fix=fix)
    routes: dict[str, str] = {}
    for place, text in enumerate(named):
        route, sign, package = text.partition("=")
        name = route if sign else ("primary" if place == 0 else f"route-{place + 1}")
        if name in routes:
            raise WorkloadError(f"two packages for the route {name!r}", path=store.root)
        routes[name] = store.resolve(package if sign else text)
    return routes


def _workload(arguments: argparse.Namespace, deployment: Deployment, store: PackageStore) -> Workload:
    """Read the workload, or make the support desk's own."""
    from experiments.support_desk import support_desk_workload
    from experiments.trace_files import TraceScale, read_workload

    path = Path(arguments.workload)
    if arguments.workload == SUPPORT_DESK and not path.exists():
        return support_desk_workload(arguments.seed, arguments.limit or 48, temperature=arguments.temperature)
    default = deployment.document.route(deployment.document.default_route)
    config = store.read_manifest(default.package).config if default is not None else {}
    positions = int(config.get("max_positions", 512))
    output = arguments.output_tokens or max(1, positions // 8)
    scale = TraceScale(
        prompt_tokens=arguments.prompt_tokens or max(1, min(positions // 2, positions - output)),
        output_tokens=output,
        tenants=tuple(tenant.name for tenant in deployment.document.tenants),
        token_range=(min(64, int(config.get("vocab_size", 512)) // 2), int(config.get("vocab_size", 512))),
    )
    return read_workload(path, layout=arguments.format, scale=scale)


class _Progress:
    """A progress bar on standard error: answered, under way, not ok."""

    def __init__(self, workload: Workload, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("recording"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._bar.add_task("record", total=len(workload.requests), state="loading packages")
        self._under_way = self._not_ok = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def sent(self) -> None:
        """Count a request out."""
        self._under_way += 1
        self._show()

    def done(self, sent: Sent[Answered]) -> None:
        """Count a request in."""
        self._under_way -= 1
        self._not_ok += sent.answer is None or sent.answer.outcome.status != "ok"
        self._bar.advance(self._task)
        self._show()

    def _show(self) -> None:
        failed = f", {self._not_ok} not ok" if self._not_ok else ""
        self._bar.update(self._task, state=f"{self._under_way} under way{failed}")


def _objective(arguments: argparse.Namespace) -> Objective | None:
    """Return what a good request keeps; None where nothing was asked."""
    from eval.token_latency import Objective

    limits = (arguments.slo_ttft_ms, arguments.slo_tpot_ms, arguments.slo_e2e_ms)
    first, rate, end = (None if limit is None else round(limit * 1_000) for limit in limits)
    return None if first is rate is end is None else Objective(first, rate, end)


def _count(text: str) -> int:
    """Read a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return value


def _speed(text: str) -> float:
    """Read a positive factor."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a positive factor")
    return value


def _temperature(text: str) -> float:
    """Read a temperature that a request envelope takes."""
    from runtime.serve.envelope import LARGEST_TEMPERATURE

    value = float(text)
    if not 0 <= value <= LARGEST_TEMPERATURE:
        raise argparse.ArgumentTypeError(f"{text} is no temperature from 0 to {LARGEST_TEMPERATURE}")
    return value


def _milliseconds(text: str) -> float:
    """Read a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no time; give milliseconds above 0")
    return value

"""`replaylab prepare`: take a model through the nine stages into a package, and say what each stage found."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.backends.protocol import BuildOptions
    from runtime.prepare.pipeline import PreparedPackage
    from runtime.prepare.store import PackageStore
    from traces.failures import ClassifiedError

EPILOG = """\
examples:
  replaylab prepare runtime/models/reference --backend onnxruntime --name desk
  replaylab prepare runtime/models/reference --backend inductor --flag freezing=true --json
  replaylab prepare runtime/models/reference --backend onnxruntime --batch-invariant
  replaylab prepare runtime/models/reference --like desk
  replaylab prepare classifier.onnx --backend onnxruntime --max-batch 32
  replaylab prepare --choices                      every level, precision and flag of every backend

each choice is a pin of the package, and of a replay (replay run ID --set PIN=VALUE):
  optimization     --optimization basic            --set compiler.optimization_level=basic
  passes left out  --flag disable_optimizers=MatMulAddFusion;GeluFusion
                                                   --set compiler.flags.disable_optimizers=MatMulAddFusion
  product layout   --flag products=plain           --set compiler.flags.products=plain
  precision        --precision bfloat16            --set compiler.precision=bfloat16
  memory plan      --flag memory_pattern=1         --set compiler.flags.memory_pattern=1
  vector length    --flag simdlen=256              --set compiler.flags.simdlen=256
  threads          --threads 2                     --set hardware.threads=2
  provider order   --provider A --provider B       --set compiler.execution_providers=A,B
  fixed shapes     --buckets 'decode=1,8;tokens=32;context=128'
                                                   --set 'compiler.buckets=decode=1,8;tokens=32;context=128'
  bounds           --max-batch 8                   --set compiler.bounds.max_batch=8
  a version                                        --set compiler.onnxruntime=1.30.0

exit codes: 0 prepared and ready, 1 rebuilt with --like and something differs,
            2 refused (the model, the backend or an option does not fit), 3 failed
Nothing that is already in the store is changed by a failure.
"""

LARGEST = 2**31 - 1
DEFAULT_BACKEND = "onnxruntime"
BOUNDS = ("max_batch", "max_tokens", "max_context")
CHOICES = (
    *("backend", "precision", "norm", "optimization", "flag", "batch_invariant", "buckets", "provider", "threads"),
    *BOUNDS,
)
"""Options that are part of what is made; --like takes all of them from a package."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument(
        "model", metavar="MODEL", type=Path, nargs="?", help="checkpoint folder, .pt2 program or .onnx file"
    )
    parser.add_argument(
        "--backend", help=f"eager, onnxruntime, inductor, executorch, iree or xla (default: {DEFAULT_BACKEND})"
    )
    parser.add_argument("--precision", help="float32, bfloat16 or int8 (default: float32)")
    parser.add_argument("--norm", help="fused or unfused RMS norm (default: fused)")
    parser.add_argument("--optimization", metavar="LEVEL", help="the backend's own level name (default: its choice)")
    parser.add_argument(
        "--flag", action="append", default=[], metavar="NAME=VALUE", help="backend setting; may be repeated"
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="bits of a row depend on nothing but itself, at some cost; --flag recipe=tile (default) or strict",
    )
    parser.add_argument("--buckets", metavar="PLAN", help="fixed shapes: decode=1,8;tokens=32;context=128, or default")
    parser.add_argument("--provider", action="append", default=[], metavar="NAME", help="execution provider, in order")
    parser.add_argument(
        "--threads",
        type=int,
        choices=range(1, 65),
        metavar="1..64",
        help="compute threads, a pin (default: 1)",
    )
    parser.add_argument("--max-batch", type=int, metavar="N", help="bound of rows (default: 64)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="bound of new tokens a row (default: 512)")
    parser.add_argument("--max-context", type=int, metavar="N", help="bound of cached tokens (default: 1024)")
    parser.add_argument("--deadline", type=_limit, default=600, metavar="SECONDS", help="for compilers (%(default)s)")
    parser.add_argument("--max-spread", type=_limit, metavar="PERCENT", help="refuse steady times that spread more")
    parser.add_argument("--max-step", type=_limit, metavar="MICROSECONDS", help="refuse a slower single decode step")
    parser.add_argument(
        "--like",
        metavar="PACKAGE",
        help="rebuild with this package's options and name the first stage that differs; no other choice goes with it",
    )
    parser.add_argument("--choices", action="store_true", help="list what each backend can be asked for, and stop")
    parser.add_argument("--name", help="also point this name at the package")
    parser.add_argument("--ledger", type=Path, help="ledger folder (default: REPLAYLAB_LEDGER or ./ledger)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Prepare, record into the ledger, print; returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads or 1))  # before torch is imported
    from rich.console import Console

    from traces.failures import ClassifiedError

    console = Console(stderr=True)
    if arguments.choices or arguments.model is None:
        return _print_choices(arguments)
    try:
        prepared, rebuilt = _prepare(arguments, console)
    except ClassifiedError as error:
        return report_failure(error, as_json=arguments.json)
    if arguments.json:
        print(json.dumps({**_document(prepared, arguments.name), "rebuild": rebuilt}, indent=2))
        return 1 if rebuilt and not rebuilt["equal"] else 0
    from runtime.prepare.table import stage_table
    from traces.console import output_console

    out = output_console(110)
    out.print(stage_table(prepared.reports))
    name = f"  ({arguments.name})" if arguments.name else ""
    out.print(f"ready: [bold]{prepared.digest}[/bold]{name}", soft_wrap=True)
    if rebuilt is None:
        return 0
    verdict = "equal in all nine stages" if rebuilt["equal"] else f"first differs at stage {rebuilt['first_stage']}"
    out.print(f"rebuilt like {rebuilt['package']}: {verdict}", soft_wrap=True)
    return 0 if rebuilt["equal"] else 1


def _print_choices(arguments: argparse.Namespace) -> int:
    """List what can be asked for; without a model and without --choices, say that the model is missing."""
    from runtime.prepare.choices import choices, choices_table
    from traces.console import output_console

    if not arguments.choices:
        print("error: no MODEL is given; fix: replaylab prepare MODEL, or --choices", file=sys.stderr)
        return 2
    described = choices()
    if arguments.json:
        print(json.dumps({"backends": described}, indent=2))
    else:
        output_console(140).print(choices_table(described))
    return 0


def _prepare(arguments: argparse.Namespace, console: Console) -> tuple[PreparedPackage, dict[str, Any] | None]:
    from runtime.backends.registry import backend_named
    from runtime.prepare.compare import compare_rebuild
    from runtime.prepare.recorded import prepare_recorded
    from runtime.prepare.store import PackageStore
    from runtime.prepare.table import StageProgress
    from traces.ledger.layout import default_ledger

    ledger: Path = arguments.ledger or default_ledger()
    store = PackageStore(ledger)
    backend, options = _options(arguments, store)
    backend_named(backend).check_here(options)
    before = store.preparation(arguments.like) if arguments.like else None
    with StageProgress(console) as progress:
        prepared = prepare_recorded(
            arguments.model,
            backend=backend,
            options=options,
            ledger=ledger,
            name=arguments.name,
            on_start=progress.started,
            on_finish=progress.finished,
        )
    return prepared, compare_rebuild(store, arguments.like, before, prepared.preparation)


def _options(arguments: argparse.Namespace, store: PackageStore) -> tuple[str, BuildOptions]:
    """Return the backend and what it is asked for; what was left open is the options' own default."""
    from runtime.backends.buckets import parse_plan
    from runtime.backends.contract import Bounds
    from runtime.backends.errors import BackendRefused
    from runtime.backends.protocol import BuildOptions
    from runtime.prepare.capture import check_reach, read_options

    asked = {name: getattr(arguments, name) for name in CHOICES}
    given = {name: value for name, value in asked.items() if value is not None and value is not False and value != []}
    if arguments.like:
        if given:
            named = ", ".join("--" + name.replace("_", "-") for name in given)
            raise BackendRefused(
                f"{named} cannot be given with --like, which takes every choice from the package",
                fix="leave out one or the other; to change one: replay run PREPARATION --set PIN=VALUE",
            )
        arguments.like = store.resolve(arguments.like)
        manifest = store.read_manifest(arguments.like)
        return manifest.compiler.backend, replace(read_options(manifest.options), **_limits(arguments))
    flags: dict[str, str] = {}
    for text in arguments.flag:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise BackendRefused(f"--flag {text!r} is not NAME=VALUE", fix="for example --flag freezing=true")
        flags[name] = value
    named_bounds = {name: value for name in BOUNDS if (value := getattr(arguments, name)) is not None}
    check_reach(arguments.model, named_bounds)
    bounds = Bounds(**named_bounds)
    plain = {name: given[name] for name in ("precision", "norm", "optimization", "threads") if name in given}
    return arguments.backend or DEFAULT_BACKEND, BuildOptions(
        **plain,
        flags=flags,
        providers=tuple(arguments.provider),
        bounds=bounds,
        buckets=parse_plan(arguments.buckets, bounds) if arguments.buckets else None,
        **_limits(arguments),
        batch_invariant=arguments.batch_invariant,
    )


def _limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read what decides whether a preparation succeeds and is no part of what it makes."""
    return {
        "deadline_seconds": arguments.deadline,
        "steady_spread_percent": arguments.max_spread,
        "steady_step_us": arguments.max_step,
    }


def _document(prepared: PreparedPackage, name: str | None) -> dict[str, Any]:
    return {
        "package": prepared.digest,
        "name": name,
        "artifact": prepared.manifest.artifact.to_document(),
        "compiler": prepared.manifest.compiler.to_document(),
        "stages": [
            {
                "stage": report.stage.value,
                "name": report.stage.word,
                "duration_us": report.duration_us,
                "input_digest": report.manifest.input_digest,
                "output_digest": report.manifest.output_digest,
                "record": dict(report.record),
            }
            for report in prepared.reports
        ],
    }


def report_failure(error: ClassifiedError, *, as_json: bool) -> int:
    """Say what failed, in which class and stage, and what to do; 2 for a refusal, 3 for a failure."""
    from runtime.backends.errors import BuildFailed
    from traces.failures import FailureClass

    refused = error.failure_class in (FailureClass.ARTIFACT_COMPATIBILITY, FailureClass.SHAPE_GUARD)
    code = 2 if refused and not isinstance(error, BuildFailed) else 3
    if as_json:
        print(json.dumps({"error": error.to_payload(), "stage": error.stage, "exit_code": code}, indent=2))
        return code
    where = f" at stage {error.stage}" if error.stage else ""
    said = f"{'refused' if code == 2 else 'failed'}{where} [{error.failure_class.value}]: {error.message}"
    print(said if error.fix is None else f"{said}\n  fix: {error.fix}", file=sys.stderr)
    return code


def _limit(text: str) -> int:
    """Read a limit: a whole number from 1 up."""
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {LARGEST}")
    return int(text)

"""How is a study run from the command line?  ``replaylab study compilers``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweep import Cell, CellResult, grid, run_sweep

if TYPE_CHECKING:
    from experiments.studies.compilers import CompilerStudy
    from experiments.tracking import Tracker
    from experiments.workloads import Workload

EXAMPLE = """\
example:
  replaylab study compilers --requests 24
  replaylab study compilers --backends eager,onnxruntime --precisions float32 --batch-sizes 1,8 --json
  mlflow ui --backend-store-uri sqlite:///mlflow.db

Every cell records the same requests at the same times. A cell that a backend refuses is a row with its reason.
exit codes: 0 done, 1 a faithful replay was not exact, 2 refused or bad input (or every cell refused), 3 failed
"""
EXPERIMENT = "replaylab-compilers"
FEWEST_REQUESTS = 4
WIDTH = 120
"""Columns of the table where there is no terminal to ask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = EXAMPLE
    parser.add_argument("study", choices=("compilers",), help="compilers: backend x precision x batch size")
    parser.add_argument("--backends", type=_words, default=("eager", "onnxruntime", "inductor"), metavar="NAMES")
    parser.add_argument("--precisions", type=_words, default=("float32", "bfloat16"), metavar="NAMES")
    parser.add_argument(
        "--batch-sizes", type=_counts, default=(1, 4, 8), metavar="N,N", help="requests at once: max_num_seqs"
    )
    parser.add_argument("--requests", type=_count, default=24, metavar="N", help="of the support desk (default 24)")
    parser.add_argument("--workload", type=Path, default=None, metavar="FILE", help="a JSON Lines workload instead")
    parser.add_argument("--model", type=Path, default=None, metavar="FOLDER", help="default: the reference model")
    parser.add_argument("--seed", type=int, default=0, help="of questions, arrivals and the bootstrap (default 0)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="first requests not measured (default 2)")
    parser.add_argument("--replays", type=_count, default=None, metavar="N", help="replay only the first N requests")
    parser.add_argument("--store", default="sqlite:///mlflow.db", help="MLflow's store (default: %(default)s)")
    parser.add_argument("--ledger", type=Path, default=None, metavar="PATH", help="default: REPLAYLAB_LEDGER, ./ledger")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Run the study and print its table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads are a pin
    from manifests.errors import ManifestError
    from traces.failures import ClassifiedError

    try:
        return _run(arguments)
    except (ClassifiedError, ManifestError, ValueError) as error:
        if arguments.json:
            print(json.dumps({"error": {"message": str(error)}}))
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the cells that were done are kept", file=sys.stderr)
        return 3


def reference_model() -> Path:
    """Return the folder of the reference model, without importing it."""
    spec = find_spec("runtime.models.reference")
    if spec is None or spec.origin is None:
        raise ValueError("the reference model is not installed; give --model FOLDER")
    return Path(spec.origin).parent


def _run(arguments: argparse.Namespace) -> int:
    from experiments.studies.compilers import CompilerStudy
    from experiments.tracking import Tracker
    from traces.ledger.layout import default_ledger

    workload = _workload(arguments)
    model = arguments.model or reference_model()
    if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
        raise ValueError(f"{model} holds no checkpoint (config.json and safetensors); give --model FOLDER")
    study = CompilerStudy(
        model=model,
        ledger=arguments.ledger or default_ledger(),
        workload=workload,
        seed=arguments.seed,
        warmup=min(arguments.warmup, len(workload.requests) - 2),
        replays=arguments.replays,
    )
    cells = grid(arguments.backends, arguments.precisions, arguments.batch_sizes)
    shared = {
        "workload": workload.name,
        "requests": len(workload.requests),
        "seed": arguments.seed,
        "warmup": study.warmup,
        "model": model.name,
        "ledger": str(study.ledger),
        "cells": len(cells),
    }
    tracker = Tracker(arguments.store, EXPERIMENT, name=f"compilers, {workload.name}", params=shared)
    results = _sweep(study, cells, tracker, arguments)
    _report(results, shared, tracker, arguments)
    if all(result.refused for result in results):
        return 2
    rates = [result.measured.metrics.get("replay_faithful_exact_rate") for result in results if result.measured]
    return 0 if all(rate is None or rate == 1 for rate in rates) else 1


def _sweep(
    study: CompilerStudy, cells: tuple[Cell, ...], tracker: Tracker, arguments: argparse.Namespace
) -> list[CellResult]:
    """Measure every cell under a progress bar, keeping each as soon as it is known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.fields[cell]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    done = False
    results: list[CellResult] = []
    try:
        with Progress(*columns, console=Console(stderr=True), disable=arguments.json) as progress:
            task = progress.add_task("study", total=len(cells), cell="", state="")

            def measure(cell: Cell) -> Any:
                progress.update(task, cell=cell.name, state="")
                return study.measure(cell, lambda words: progress.update(task, state=words))

            def keep(result: CellResult) -> None:
                results.append(result)
                _track(tracker, result)
                progress.advance(task)

            run_sweep(cells, measure, seed=arguments.seed, on_result=keep)
        done = True
    finally:
        measured = sum(not result.refused for result in results)
        counted = {"cells_measured": float(measured), "cells_refused": float(len(results) - measured)}
        tracker.finish(counted, finished=done)
    return results


def _track(tracker: Tracker, result: CellResult) -> None:
    """Keep one cell in MLflow."""
    params = {
        "backend": result.cell.backend,
        "precision": result.cell.precision,
        "max_num_seqs": result.cell.max_num_seqs,
    }
    if result.measured is None:
        tags = {"failure_class": result.failure_class or "", "refused": result.reason or ""}
        tracker.child(result.cell.name, params=params, metrics={}, tags=tags, finished=False)
        return
    metrics, tags = dict(result.measured.metrics), dict(result.measured.tags)
    if result.against_first is not None:
        one = result.against_first
        metrics |= {
            "latency_against_first_ms": one.difference / 1_000,
            "latency_against_first_ms_low": one.low / 1_000,
            "latency_against_first_ms_high": one.high / 1_000,
        }
        tags["latency_against_first"] = one.conclusion
    tracker.child(result.cell.name, params=params, metrics=metrics, tags=tags)


def _report(results: list[CellResult], shared: dict[str, Any], tracker: Tracker, arguments: argparse.Namespace) -> None:
    """Print the table, or the same as JSON."""
    if arguments.json:
        document = {
            "study": "compilers",
            **shared,
            "store": arguments.store,
            "experiment": EXPERIMENT,
            "parent_run": tracker.parent.run_id,
            "cells": [result.to_document() for result in results],
        }
        print(json.dumps(document, indent=2))
        return
    from experiments.studies.table import study_table
    from traces.console import output_console

    console = output_console(WIDTH)
    console.print(study_table(results))
    for result in results:
        if result.reason is not None:
            console.print(f"[yellow]{result.cell.name}[/yellow] refused ({result.failure_class}): ", end="")
            console.print(result.reason, markup=False, soft_wrap=True)
    console.print(
        f"\nMLflow experiment {EXPERIMENT}, parent run {tracker.parent.run_id}\n"
        f"  mlflow ui --backend-store-uri {arguments.store}\n  replaylab dashboard --ledger {shared['ledger']}",
        soft_wrap=True,
    )


def _workload(arguments: argparse.Namespace) -> Workload:
    """Read the file, or make the support desk's own questions."""
    from experiments.support_desk import support_desk_workload
    from experiments.workloads import read_jsonl

    if arguments.workload is not None:
        workload = read_jsonl(arguments.workload)
    else:
        workload = support_desk_workload(arguments.seed, arguments.requests)
    if len(workload.requests) < FEWEST_REQUESTS:
        raise ValueError(
            f"a study needs at least {FEWEST_REQUESTS} requests, {workload.name} has {len(workload.requests)}"
        )
    return workload


def _words(text: str) -> tuple[str, ...]:
    """Read names separated by commas."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise argparse.ArgumentTypeError("give at least one name")
    return words


def _counts(text: str) -> tuple[int, ...]:
    """Read whole numbers from 1 up, separated by commas."""
    return tuple(_count(word) for word in _words(text))


def _count(text: str) -> int:
    """Read a whole number from 1 up."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)

"""How are nine stages shown?  One line each while they run, one table at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from runtime.prepare.stage import StageReport
from traces.stages import PREPARATION_STAGES, Stage


class StageProgress:
    """A bar over the nine stages on a console."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=27),
            TextColumn("{task.completed:.0f}/9"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        self._task = self._progress.add_task("starting", total=len(PREPARATION_STAGES))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, stage: Stage) -> None:
        """Show which stage runs."""
        if self._task is not None:
            self._progress.update(self._task, description=f"{stage.value} {stage.word}")

    def finished(self, report: StageReport) -> None:
        """Move on by one stage."""
        if self._task is not None:
            self._progress.advance(self._task)


def stage_table(reports: Sequence[StageReport]) -> Table:
    """Make the table of finished stages: time, what each found, digest of what it emitted."""
    table = Table(title="nine stages", title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("recorded")
    table.add_column("emitted", no_wrap=True)
    for report in reports:
        table.add_row(
            f"{report.stage.value} {report.stage.word}",
            f"{report.duration_us / 1e6:.2f}",
            summarize(report.stage, report.record),
            report.manifest.output_digest.removeprefix("sha256:")[:12],
        )
    return table


def summarize(stage: Stage, record: Mapping[str, Any]) -> str:
    """Say a stage's record in one line."""
    return _SUMMARIES[stage](record)


def _known(value: Any, show: Callable[[Any], str] = str) -> str:
    if isinstance(value, Mapping) and "unknown" in value:
        return f"unknown ({cast(Mapping[str, Any], value)['unknown']})"
    return show(value)


def _validation(record: Mapping[str, Any], name: str) -> str:
    return _known(
        record[name],
        lambda found: f"max {found['max_abs']} from {found['reference']}, argmax equal {found['argmax_equal']}",
    )


def _counted(found: Mapping[str, Any]) -> str:
    """Give the nodes of a graph or of a part (IREE's are dispatches); of a program of several methods, by method."""
    count = found.get("nodes", found.get("dispatches"))
    if count is not None:
        return str(count)
    return ", ".join(f"{name} {_counted(entry)}" for name, entry in found.items())


def _optimize(record: Mapping[str, Any]) -> str:
    nodes = f"{record['graph_before']['nodes']} to {_counted(record['graph_after'])} nodes"
    return f"{nodes}, {len(record['pass_list'])} passes; {_validation(record, 'numerical_validation')}"


def _symbols(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {low}..{high}" for name, (low, high) in found.items()) or "all dimensions fixed"


def _partition(record: Mapping[str, Any]) -> str:
    owners = (f"{name} {_counted(entry)}" for name, entry in record["partition_map"].items())
    return f"{'; '.join(owners)}; {len(record['transfer_edges'])} crossings"


def _lower(record: Mapping[str, Any]) -> str:
    code = _known(record["code_size_bytes"], lambda size: f"{size / 1024:.0f} KiB of code")
    target = record["target"]
    # IREE names its target as LLVM does, with a processor where the others have instruction sets
    triple, machine = target.get("triple", target.get("target_triple")), target.get("isa", target.get("cpu"))
    return f"{triple} {machine}; {code}"


def _warm(record: Mapping[str, Any]) -> str:
    # canonical documents sort names as text, so the batch sizes come back as b1, b32, b8
    measured = sorted(
        (int(name.rpartition("_b")[2]), us) for name, us in record["steady_state_us"].items() if "_b" in name
    )
    what = "decode" if any(name.startswith("decode") for name in record["steady_state_us"]) else "call"
    steady = ", ".join(f"b{batch} {us / 1000:.2f}" for batch, us in measured)
    varies = [name for name, found in record["readiness_decision"]["invariance"].items() if found == "differs"]
    axes = ", ".join(name for name in varies if name != "control") or "nothing that was tried"
    return f"{what} ms: {steady}; {_validation(record, 'output_comparison')}; bits vary with {axes}"


_SUMMARIES: Mapping[Stage, Callable[[Mapping[str, Any]], str]] = {
    Stage.CAPTURE: lambda record: (
        f"{record['opset_or_dialect']}; warnings: {len(record['warnings'])}, "
        f"unsupported: {len(record['unsupported_nodes'])}"
    ),
    Stage.REPRESENT: lambda record: (
        f"{', '.join(f'{n} {c} nodes' for n, c in record['node_count'].items())}; "
        f"{record['parameter_count']:,} parameters; valid"
    ),
    Stage.ANALYZE: lambda record: (
        f"guards: {_known(record['guard_count'])}; " + _symbols(record["shape_profile"]["symbols"])
    ),
    Stage.OPTIMIZE: _optimize,
    Stage.PARTITION: _partition,
    Stage.LOWER: _lower,
    Stage.PACKAGE: lambda record: (
        f"{record['size_bytes'] / 1e6:.1f} MB in {len(record['manifest'])} files; {record['signature_status']}"
    ),
    Stage.LOAD: lambda record: (
        f"{record['load_us'] / 1000:.0f} ms, "
        f"{_known(record['resident_memory_bytes'], lambda size: f'{size / 1e6:.0f} MB resident')}, "
        + _known(record["cache_capacity"], lambda found: f"{found['bytes_per_slot']} B a slot")
    ),
    Stage.WARM: _warm,
}

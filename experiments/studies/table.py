"""How does a study's result look in a terminal?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.sweep import CellResult

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"


def study_table(results: Sequence[CellResult]) -> Table:
    """Return the table: a row a cell, times in milliseconds, median and 95th percentile."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("cell\n(backend, precision, at once)", no_wrap=True)
    for name in ("TTFT ms\np50 / p95", "TPOT ms\np50 / p95", "tokens\na second"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("latency against the first,\nms (95 % interval)", justify="right")
    for name in ("faithful\nexact", "alone\nexact"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_cells(result))
    return table


def _cells(result: CellResult) -> list[str]:
    name = f"{result.cell.backend} {result.cell.precision} {result.cell.max_num_seqs}"
    if result.measured is None:
        return [name, "[yellow]refused[/yellow]", "", "", "", "", ""]
    metrics = result.measured.metrics
    speed = metrics.get("output_tokens_per_second")
    return [
        name,
        _pair(metrics, "ttft_ms"),
        _pair(metrics, "tpot_ms"),
        NOTHING if speed is None else f"{speed:,.0f}",
        _against(result),
        _share(metrics, "faithful"),
        _share(metrics, "alone"),
    ]


def _pair(metrics: Mapping[str, float], name: str) -> str:
    values = [metrics.get(f"{name}_p{share}") for share in (50, 95)]
    return " / ".join(NOTHING if value is None else f"{value:.1f}" for value in values)


def _against(result: CellResult) -> str:
    one = result.against_first
    if one is None:
        return NOTHING
    said = f"{one.difference / 1_000:+.1f} ({one.low / 1_000:+.1f} to {one.high / 1_000:+.1f})"
    return said if one.resolved else f"{said}\nnot resolved"


def _share(metrics: Mapping[str, float], mode: str) -> str:
    rate, replayed = metrics.get(f"replay_{mode}_exact_rate"), metrics.get(f"replay_{mode}_requests")
    if rate is None or replayed is None:
        return NOTHING
    said = f"{round(rate * replayed)}/{replayed:.0f}"
    return said if rate == 1 else f"[red]{said}[/red]" if mode == "faithful" else f"[yellow]{said}[/yellow]"

"""How is the summary of a recorded run shown?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.summary import SHARES

if TYPE_CHECKING:
    from experiments.workloads import Workload

TIMES = {
    "first token (TTFT)": "first_token_us",
    "first token from sending": "first_token_from_send_us",
    "per output token (TPOT)": "per_output_token_us",
    "between tokens (ITL)": "inter_token_us",
    "between chunks": "chunk_gap_us",
    "end to end": "end_to_end_us",
    "send lag": "send_lag_us",
}
"""What each row of percentiles is called, and its field in the summary."""


def print_summary(summary: Mapping[str, Any], workload: Workload) -> None:
    """Print the summary and what to do next."""
    from rich.table import Table

    from traces.console import output_console

    failures = ", ".join(f"{count} {name}" for name, count in summary["failures"].items())
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "requests": f"{summary['requests']}, {summary['ok']} ok" + (f", {failures}" if failures else ""),
        "wall time": f"{summary['wall_us'] / 1e6:.2f} s" + (" (stopped early)" if summary["stopped"] else ""),
        "goodput": _goodput(summary["goodput"]),
        "": " / ".join(f"p{share}" for share in SHARES),
        **{name: _percentiles(summary[field]) for name, field in TIMES.items()},
        "tokens": f"{summary['prompt_tokens']} in ({summary['cached_tokens']} cached), {summary['output_tokens']} out",
        "engine": f"{summary['generations']} generations, {summary['engine_steps']} steps, "
        f"largest batch {summary['largest_batch'] or '-'}",
        "time in the engine": _shares(summary["engine_time_us"]),
        "events dropped": str(summary["events_dropped"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = output_console(110)
    console.print(table)
    for note in workload.notes:
        console.print(f"note: {note}")
    console.print(
        f"\nrun {summary['run']}\n  replay list {summary['run']}\n  replay run {summary['run']}", soft_wrap=True
    )


def _percentiles(values: Mapping[str, int | None]) -> str:
    """Say the percentiles in milliseconds."""
    if None in values.values():
        return "-"
    return " / ".join(f"{us / 1000:.1f}" for us in values.values() if us is not None) + " ms"


def _goodput(found: Mapping[str, Any] | None) -> str:
    """Say how many requests a second were good, and what good means."""
    if found is None:
        return "- (say what a good request keeps: --slo-ttft-ms, --slo-tpot-ms, --slo-e2e-ms)"
    asked = ", ".join(f"{name} <= {us / 1000:g} ms" for name, us in found["objective_us"].items() if us is not None)
    rate = "-" if found["requests_per_second"] is None else f"{found['requests_per_second']:.2f} requests/s"
    return f"{rate}, {found['good']} of {found['sent']} requests kept {asked}"


def _shares(parts: Mapping[str, int] | None) -> str:
    """Say who had the generations' time in the engine, greatest first."""
    total = 0 if parts is None else sum(parts.values())
    if parts is None or not total:
        return "-"
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {us * 100 / total:.0f}%" for name, us in ordered if us)

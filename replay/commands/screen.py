"""How does the `replay` command write tables, times and JSON the same way everywhere?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replay.errors import UnknownRecording

if TYPE_CHECKING:
    from rich.console import Console

    from traces.ledger.ledger import Ledger

VERDICT_STYLES = {
    "exact": "bold green",
    "within_tolerance": "green",
    "unverified": "yellow",
    "diverged": "bold red",
    "refused": "bold yellow",
}


def open_ledger(path: Path) -> Ledger:
    """Open an existing ledger; a folder that holds none is refused instead of being made."""
    from traces.ledger.ledger import Ledger

    if not (path / "outbox").is_dir() and not (path / "segments").is_dir():
        raise UnknownRecording(
            f"there is no ledger in {path}", fix="Record something first: replaylab record WORKLOAD, or give --ledger."
        )
    ledger = Ledger(path)
    if ledger.pending():
        ledger.drain()
    return ledger


def console(*, stderr: bool = False) -> Console:
    """Return a console that keeps long lines whole where neither a terminal nor COLUMNS says how wide it is."""
    from rich.console import Console

    from traces.console import output_console

    return Console(stderr=True, highlight=False) if stderr else output_console(160)


def print_json(document: Any) -> None:
    """Print a document as JSON for programs: keys in the order given, UTF-8 kept."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(screen: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print a table; numbers stand right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[place], (int, float)) or row[place] in (None, "") for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row))
    screen.print(table)


def verdict_text(word: str | None) -> Any:
    """Return a verdict in its colour."""
    from rich.text import Text

    return Text(word or "", style=VERDICT_STYLES.get(word or "", ""))


def moment(us: int) -> str:
    """Return a UTC time such as 2026-11-23 18:04:05."""
    return datetime.fromtimestamp(us / 1_000_000, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")


def duration(us: int | None) -> str:
    """Return a duration in the unit that reads best: 830 us, 12.4 ms, 3.21 s."""
    if us is None:
        return ""
    if us < 1_000:
        return f"{us} us"
    return f"{us / 1_000:.1f} ms" if us < 1_000_000 else f"{us / 1_000_000:.2f} s"


def counts(numbers: Mapping[str, int]) -> str:
    """Return counts as words: 46 ok, 2 failed."""
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items(), key=lambda item: -item[1]))

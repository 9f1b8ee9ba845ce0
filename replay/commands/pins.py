"""How are the pins of two recordings shown where they differ, and the stage at which their packages part?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from replay.commands import screen

if TYPE_CHECKING:
    from rich.console import Console


def print_pins(out: Console, pins: list[dict[str, Any]]) -> None:
    """Print the pins that differ, and what each can explain where that is known."""
    if not pins:
        out.print("\nno pin differs")
        return
    out.print("\n[bold]pins that differ[/bold]")
    explains = {"direct": "can explain it", "observed": "a result, not a cause", "inert": "changes no result"}
    rows = [
        (row["pin"], _value(row["left"]), _value(row["right"]), explains.get(row.get("role") or "", "")) for row in pins
    ]
    screen.print_table(out, ("pin", "A", "B", ""), rows)


def print_preparation(out: Console, found: dict[str, Any] | None) -> None:
    """Say at which preparation stage the two packages part, and in what."""
    if found is None:
        return
    first = found["first_stage"]
    if first is None:
        out.print(f"\nthe packages are the same in the first {found['stages_compared']} preparation stages")
        return
    names = [str(field["field"]) for field in found["fields"]]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    said = f"\nthe packages part at preparation stage {first}"
    out.print(said + (f": {', '.join(names[:4])}{more}" if names else ""), soft_wrap=True, markup=False)


def _value(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text[:19] if text.startswith("sha256:") else text if len(text) <= 48 else text[:45] + "..."

"""How wide is what a command prints?  As the terminal, or as COLUMNS says, or as the command likes it best."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def output_console(width: int) -> Console:
    """Return the console for standard output; `width` is for where neither a terminal nor COLUMNS says one."""
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    asked = int(columns) if columns.isdecimal() and int(columns) > 0 else None
    return Console(highlight=False, width=asked if asked or sys.stdout.isatty() else width)

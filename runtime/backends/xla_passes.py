"""What did each of XLA's passes do?  Read from the module texts that XLA writes after every pass that changed one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.xla_executable import count_instructions

SNAPSHOT = re.compile(r"\.(\d{4})\.(.+?)\.after_(.+?)(?:\.before_(.+?))?\.txt$")
BEFORE, AFTER = "before_optimizations.txt", "cpu_after_optimizations.txt"
FUSION = " fusion("


def dump_options(folder: Path) -> dict[str, Any]:
    """Compile options that make XLA write the module as text after every pass that changed it."""
    return {
        "xla_dump_to": str(folder),
        "xla_dump_hlo_pass_re": ".*",
        "xla_dump_hlo_as_text": True,
        "xla_dump_large_constants": False,
    }


@dataclass(frozen=True)
class PassReport:
    """The passes of one compile, in order."""

    passes: list[dict[str, Any]]
    """Name with its pipeline, and the module's instructions before and after it."""
    times_us: list[int]
    """Microseconds up to each snapshot since the one before; writing the text is part of it."""
    before: int
    after: int
    """Instructions of the module at the beginning and at the end."""
    fusions: int


def read_passes(folder: Path) -> PassReport:
    """Read the snapshots of the largest module in a dump folder, which is the program itself."""
    modules: dict[str, list[Path]] = {}
    for path in folder.glob("module_*.txt"):
        modules.setdefault(path.name.split(".")[0], []).append(path)
    if not modules:
        return PassReport([], [], 0, 0, 0)
    files = max(modules.values(), key=len)
    before = next(path for path in files if path.name.endswith(BEFORE))
    after = next(path for path in files if path.name.endswith(AFTER))
    count, written = count_instructions(before.read_text()), before.stat().st_mtime_ns
    passes: list[dict[str, Any]] = []
    times: list[int] = []
    for number, path in sorted(_snapshots(files)):
        match = SNAPSHOT.search(path.name)
        pipeline, name = (match.group(2), match.group(3)) if match else ("", str(number))
        found = count_instructions(path.read_text())
        if name != "pipeline-start" or found != count:
            passes.append({"name": f"{pipeline}.{name}", "before": count, "after": found})
            times.append(max(0, path.stat().st_mtime_ns - written) // 1000)
        count, written = found, path.stat().st_mtime_ns
    text = after.read_text()
    return PassReport(
        passes, times, count_instructions(before.read_text()), count_instructions(text), text.count(FUSION)
    )


def _snapshots(files: list[Path]) -> list[tuple[int, Path]]:
    found = [(SNAPSHOT.search(path.name), path) for path in files]
    return [(int(match.group(1)), path) for match, path in found if match]

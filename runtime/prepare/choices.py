"""What can a preparation be asked for?  Every choice of every backend, read from the table that checks them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from runtime.backends.protocol import Support
from runtime.backends.registry import BACKENDS, InstalledBackend, backend_named

PRECISIONS = ("float32", "bfloat16", "int8")


def choices(name: str | None = None) -> list[dict[str, Any]]:
    """Describe one backend's choices, or those of all; BackendRefused for an unknown name."""
    if name is not None:
        backend_named(name)
    return [_describe(backend) for backend in BACKENDS if name in (None, backend.name)]


def choices_table(described: list[dict[str, Any]]) -> Table:
    """Make the table that `replaylab prepare --choices` prints: one row a choice."""
    table = Table(title="choices of a preparation; each is a pin", title_justify="left")
    for column in ("backend", "option", "values", "as a pin of a replay"):
        table.add_column(column, overflow="fold", no_wrap=column == "backend")
    for one in described:
        rows: list[tuple[str, str, str]] = [
            ("--precision", " ".join(one["precisions"]), "compiler.precision"),
            ("--optimization", " ".join(one["levels"]), "compiler.optimization_level"),
            ("--norm", "fused unfused", "compiler.flags.norm"),
        ]
        rows += [
            (f"--flag {flag}=", " ".join(values), f"compiler.flags.{flag}") for flag, values in one["flags"].items()
        ]
        if one["providers"] is not None:
            rows.append(("--provider", " ".join(one["providers"]), "compiler.execution_providers"))
        if one["buckets"] != "never":
            rows.append(("--buckets", f"a plan ({one['buckets']})", "compiler.buckets"))
        for place, (option, values, pin) in enumerate(rows):
            mark = "" if one["installed"] else " (not installed)"
            table.add_row(one["backend"] + mark if place == 0 else "", option, values, pin)
        for missing, reason in one["refused"].items():
            table.add_row("", f"--precision {missing}", f"no: {reason}", "")
        table.add_section()
    return table


def _describe(backend: InstalledBackend) -> dict[str, Any]:
    cells = {name: backend.abilities[name] for name in PRECISIONS}
    return {
        "backend": backend.name,
        "installed": all(_installed(library) for library in backend.libraries),
        "extra": backend.extra,
        "precisions": [name for name, cell in cells.items() if cell.support is Support.SUPPORTED],
        "refused": {name: cell.reason for name, cell in cells.items() if cell.support is not Support.SUPPORTED},
        "levels": list(backend.levels),
        "flags": {name: list(values) for name, values in backend.flags.items()},
        "providers": None if backend.providers is None else list(backend.providers),
        "buckets": backend.buckets,
        "versions": {library: _installed(library) for library in backend.libraries},
    }


def _installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None

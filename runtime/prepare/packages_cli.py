"""`replaylab packages`: what is in the store, is it intact, and where do two packages part?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from runtime.prepare.store import PackageStore

EPILOG = """\
examples:
  replaylab packages list
  replaylab packages show desk
  replaylab packages verify
  replaylab packages compare desk desk-bfloat16 --json

exit codes: 0 done (verify: all intact; compare: equal), 1 something differs or is not intact, 2 no such package
"""


# action -> (how many packages it takes, one line for the listing)
ACTIONS: dict[str, tuple[int | str, str]] = {
    "list": (0, "Say what is in the store."),
    "show": (1, "Show one package: manifest and baseline."),
    "verify": ("*", "Check every digest and signature, of all packages unless some are named."),
    "compare": (2, "Name the first stage at which two packages differ."),
}
WIDTH = 140  # of tables that are not written to a terminal
SECTIONS = ("artifact", "compiler", "contract", "envelope")
LEFT_OUT = ("document", "passes", "inputs", "outputs")
"""What is long, or no news; --json has it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (count, summary) in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary)
        action.set_defaults(package=[])
        if count != 0:
            action.add_argument("package", nargs=count, metavar="PACKAGE", help="name, digest or its first digits")
        action.add_argument("--ledger", type=Path, help="ledger folder (default: REPLAYLAB_LEDGER or ./ledger)")
        action.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; returns the exit code."""
    from runtime.prepare.cli import report_failure
    from runtime.prepare.store import PackageStore
    from traces.failures import ClassifiedError
    from traces.ledger.layout import default_ledger

    try:
        store = PackageStore(arguments.ledger or default_ledger())
        action = {"list": _list, "show": _show, "verify": _verify, "compare": _compare}[arguments.action]
        document, code = action(store, arguments.package)
    except ClassifiedError as error:
        return report_failure(error, as_json=arguments.json)
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        _print(arguments.action, document)
    return code


def _list(store: PackageStore, _: list[str]) -> tuple[dict[str, Any], int]:
    from traces.failures import ClassifiedError

    names: dict[str, list[str]] = {}
    for name, package in store.aliases().items():
        names.setdefault(package, []).append(name)
    rows: list[dict[str, Any]] = []
    for package in store.digests():
        row: dict[str, Any] = {"package": package, "names": sorted(names.get(package, []))}
        try:
            manifest = store.read_manifest(package)
            row |= {
                "model": manifest.artifact.model,
                "backend": manifest.compiler.backend,
                "precision": manifest.compiler.precision,
                "bytes": sum(entry.size for entry in manifest.files.values()),
                "warmed": store.baseline(package) is not None,
                "readiness": store.readiness(package)["state"],
            }
        except ClassifiedError as error:
            row["error"] = error.message
        rows.append(row)
    return {"packages": rows}, 0


def _show(store: PackageStore, names: list[str]) -> tuple[dict[str, Any], int]:
    package = store.resolve(names[0])
    manifest = store.verify(package)
    document = {"package": package, "manifest": manifest.to_document(), "baseline": store.baseline(package)}
    return {**document, "readiness": store.readiness(package)}, 0


def _verify(store: PackageStore, names: list[str]) -> tuple[dict[str, Any], int]:
    from traces.failures import ClassifiedError

    wanted = [store.resolve(name) for name in names] or list(store.digests())
    results: list[dict[str, Any]] = []
    for package in wanted:
        try:
            manifest = store.verify(package)
            results.append({"package": package, "intact": True, "files": len(manifest.files)})
        except ClassifiedError as error:
            results.append({"package": package, "intact": False, "error": error.message})
    return {"packages": results}, 0 if all(entry["intact"] for entry in results) else 1


def _compare(store: PackageStore, names: list[str]) -> tuple[dict[str, Any], int]:
    from runtime.prepare.compare import compare_packages

    document = compare_packages(store, *(store.resolve(name) for name in names))
    return document, 0 if document["equal"] else 1


def _print(action: str, document: dict[str, Any]) -> None:
    from rich.table import Table

    from traces.console import output_console

    if action == "show":
        _print_package(document)
        return
    if action == "compare":
        table = Table(title=f"first stage that differs: {document['first_stage'] or 'none'}", title_justify="left")
        columns, rows = ("field", "left", "right"), document["differences"]
    elif action == "verify":
        table, columns, rows = Table(), ("package", "intact", "files", "error"), document["packages"]
    else:
        table, rows = Table(), document["packages"]
        columns = ("package", "names", "model", "backend", "precision", "bytes", "readiness", "error")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_text(column, row.get(column)) for column in columns))
    output_console(WIDTH).print(table)


def _text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "bytes":
        return f"{value / 1e6:.1f} MB"
    return str(value)[:19] if column == "package" else _words(value)


def _words(value: Any) -> str:
    """Say a JSON value in plain words."""
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in cast("dict[str, Any]", value).items())
    return ", ".join(map(_words, cast("list[Any]", value))) if isinstance(value, list) else str(value)


def _ranges(symbols: dict[str, list[int]]) -> str:
    """Say the inclusive ranges of dimensions."""
    return ", ".join(f"{name} {least}..{most}" for name, (least, most) in symbols.items())


def _print_package(document: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from runtime.prepare.table import summarize
    from traces.console import output_console
    from traces.stages import Stage

    console = output_console(WIDTH)
    manifest = document["manifest"]
    console.print(f"[bold]{document['package']}[/bold]", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=False)
    for section, fields in {"readiness": document["readiness"], **{name: manifest[name] for name in SECTIONS}}.items():
        shown = {name: value for name, value in fields.items() if name not in LEFT_OUT}
        for place, (name, value) in enumerate(shown.items()):
            said = _ranges(value) if name == "symbols" else _words(value)
            table.add_row("" if place else section, name.replace("_", " "), Text(said))
    console.print(table)
    table = Table(title="stages, as measured when it was warmed here", title_justify="left")
    for column in ("stage", "seconds", "recorded"):
        table.add_column(column)
    for stage in (document["baseline"] or {}).get("stages", []):
        summary = summarize(Stage(stage["stage"]), stage["record"])
        table.add_row(f"{stage['stage']} {stage['name']}", f"{stage['duration_us'] / 1e6:.2f}", summary)
    console.print(table)

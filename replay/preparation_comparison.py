"""How do two preparations, or the packages of two requests, differ: in pins, and first in which of nine stages?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifests.diff import diff_dimension
from manifests.preparation import PreparationManifest, StageManifest
from replay.preparations import RecordedPreparation, RecordedStage, load_preparation
from replay.stage_comparison import compare_stages, first_difference
from traces.failures import ClassifiedError
from traces.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.prepare.store import PackageStore
    from traces.ledger.ledger import Ledger


def compare_preparations(ledger: Ledger, left: str, right: str) -> dict[str, Any]:
    """Return the differences of two recorded preparations as JSON values."""
    one, other = load_preparation(ledger, left), load_preparation(ledger, right)
    stages = compare_stages(one.stages, other.stages)
    first = first_difference(stages)
    return {
        "left": _side(one),
        "right": _side(other),
        "equal": first is None,
        "first_stage": None if first is None else f"{first.stage.value} {first.stage.word}",
        "pins": _pins(one, other),
        "stages": [stage.to_document() for stage in stages],
    }


def compare_package_stages(ledger: Ledger, left: str | None, right: str | None) -> dict[str, Any] | None:
    """Name the first preparation stage at which the packages of two requests part.

    Returns {"first_stage", "fields": of that stage, "stages_compared"}; None for one package, or where a package's
    manifest is not here.  All nine are compared where both preparations are known, else the six in the manifests.
    """
    if left is None or right is None or left == right:
        return None
    ours, theirs = stages_of_package(ledger, left), stages_of_package(ledger, right)
    count = min(len(ours), len(theirs))
    if count == 0:
        return None
    first = first_difference(compare_stages(ours[:count], theirs[:count]))
    return {
        "first_stage": None if first is None else f"{first.stage.value} {first.stage.word}",
        "fields": [] if first is None else [dict(one) for one in first.fields],
        "stages_compared": count,
    }


def stages_of_package(ledger: Ledger, package: str) -> tuple[RecordedStage, ...]:
    """Return a package's stages: nine where its preparation is known here, six from its own manifest, or none."""
    from runtime.prepare.store import PackageStore

    store = PackageStore(ledger.path)
    try:
        known: PreparationManifest | None = store.preparation(package)
        stages: Sequence[StageManifest] = known.stages if known is not None else store.read_manifest(package).stages
    except (ClassifiedError, ValueError):
        return ()
    return tuple(
        RecordedStage(
            stage=Stage(one.stage), duration_us=None, output_digest=one.output_digest, emitted={}, record=one.record
        )
        for one in stages
    )


def portray_package(ledger: Ledger, package: str | None) -> list[dict[str, Any]]:
    """Say in a line a stage what preparation did to a package; empty where the package is not here.

    Times and memory are those of the newest preparation on this machine, where it was measured.
    """
    if package is None:
        return []
    from runtime.prepare.store import PackageStore
    from runtime.prepare.table import summarize

    rows: list[dict[str, Any]] = []
    measured = _baseline(PackageStore(ledger.path), package)
    for one in stages_of_package(ledger, package):
        seen = measured.get(one.stage.value, {})
        row = {"stage": one.stage.value, "name": one.stage.word, "digest": one.output_digest}
        try:
            said = summarize(one.stage, seen.get("record") or one.record)
        except (KeyError, TypeError):  # without measured fields some stages cannot be said in a line
            said = ""
        rows.append(row | {"duration_us": seen.get("duration_us"), "summary": said})
    return rows


def _baseline(store: PackageStore, package: str) -> dict[str, dict[str, Any]]:
    try:
        found = store.baseline(package)
    except (ClassifiedError, ValueError):
        return {}
    return {str(stage["stage"]): stage for stage in (found or {}).get("stages", [])}


def _side(one: RecordedPreparation) -> dict[str, Any]:
    subject = f"{one.model} {one.backend} {one.options['precision']}"
    return {"run": one.run_id, "subject": subject, "package": one.package}


def _pins(one: RecordedPreparation, other: RecordedPreparation) -> list[dict[str, Any]]:
    """List the pins that differ: artifact and compiler where both finished, options otherwise, and the machines."""
    found: list[dict[str, Any]] = []
    if one.manifest is not None and other.manifest is not None:
        for name in ("artifact", "compiler"):
            for pin in diff_dimension(name, getattr(one.manifest, name), getattr(other.manifest, name)):
                found.append({"pin": pin.path, "left": pin.left, "right": pin.right})
    names = ("symbols",) if found else tuple({**one.options, **other.options})
    for name in names:
        if one.options.get(name) != other.options.get(name):
            row = {"pin": f"options.{name}", "left": one.options.get(name), "right": other.options.get(name)}
            found.append(row)
    if one.hardware is not None and other.hardware is not None:
        for pin in diff_dimension("hardware", one.hardware, other.hardware):
            found.append({"pin": pin.path, "left": pin.left, "right": pin.right})
    return found

"""Where do two packages part?  By stage first, then by field."""

from __future__ import annotations

from typing import Any, cast

from manifests.preparation import PreparationManifest
from runtime.prepare.manifest import PackageManifest
from runtime.prepare.store import PackageStore
from traces.stages import Stage


def compare_packages(store: PackageStore, left: str, right: str) -> dict[str, Any]:
    """Compare two verified packages.

    Returns {"equal", "left", "right", "first_stage": name of the first stage whose emitted digest differs or None,
    "differences": [{"field", "left", "right"}]}.
    """
    one, two = store.verify(left), store.verify(right)
    differences: list[dict[str, str]] = []
    for section in ("artifact", "compiler", "config", "contract", "envelope", "files", "fixture", "options"):
        differ(section, _section(one, section), _section(two, section), differences)
    return {
        "equal": left == right,
        "left": left,
        "right": right,
        "first_stage": _first_of_nine(store, left, right) or first_stage(one, two),
        "differences": differences,
    }


def compare_rebuild(
    store: PackageStore, package: str | None, original: PreparationManifest | None, rebuilt: PreparationManifest
) -> dict[str, Any] | None:
    """Compare a rebuild with the preparation that made `package`, over all nine stages; None without a package.

    Without the original's own record of nine, the six in the package's signed manifest are compared.
    """
    if package is None:
        return None
    stages = original.stages if original is not None else store.read_manifest(package).stages
    pairs = zip(stages, rebuilt.stages, strict=False)
    first = next((f"{a.stage} {a.name}" for a, b in pairs if a.output_digest != b.output_digest), None)
    return {"package": package, "equal": first is None, "first_stage": first, "stages_compared": len(stages)}


def _first_of_nine(store: PackageStore, left: str, right: str) -> str | None:
    """Name the first of nine stages that differs, where both preparations are known here."""
    ours, theirs = store.preparation(left), store.preparation(right)
    first = ours.first_difference(theirs) if ours is not None and theirs is not None else None
    return None if first is None else f"{first} {Stage(first).word}"


def first_stage(one: PackageManifest, two: PackageManifest) -> str | None:
    """Name the first stage whose emitted digest differs between two packages."""
    for ours, theirs in zip(one.stages, two.stages, strict=False):
        if ours.output_digest != theirs.output_digest:
            return f"{ours.stage} {ours.name}"
    return None


def _section(manifest: PackageManifest, name: str) -> Any:
    return manifest.to_document()[name]


def differ(path: str, left: Any, right: Any, found: list[dict[str, str]]) -> None:
    """Add each field that is not the same on both sides: mappings by name, lists of one length by place."""
    if left == right:
        return
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):  # pyright: ignore[reportUnknownArgumentType]
            differ(f"{path}.{key}", left.get(key), right.get(key), found)
        return
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        ours, theirs = list(cast("list[Any]", left)), list(cast("list[Any]", right))
        if len(ours) == len(theirs):
            for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                differ(f"{path}[{place}]", one, other, found)
            return
        only, others = _without(ours, theirs), _without(theirs, ours)
        found.append({"field": path, "left": _listed(ours, only), "right": _listed(theirs, others)})
        return
    found.append({"field": path, "left": _short(left), "right": _short(right)})


def _without(entries: list[Any], others: list[Any]) -> list[Any]:
    return [entry for entry in entries if entry not in others]


def _listed(entries: list[Any], only: list[Any]) -> str:
    """Say how many entries a list has, and which the other one lacks."""
    shown = ", ".join(_short(entry) for entry in only[:6]) + (", ..." if len(only) > 6 else "")
    return f"{len(entries)} entries" + (f", only here: {shown}" if only else "")


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."

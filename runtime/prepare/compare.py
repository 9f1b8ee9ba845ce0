"""Where do two packages part?  By stage first, then by field."""

from __future__ import annotations

from typing import Any

from runtime.prepare.manifest import PackageManifest
from runtime.prepare.store import PackageStore


def compare_packages(store: PackageStore, left: str, right: str) -> dict[str, Any]:
    """Compare two verified packages.

    Returns {"equal", "left", "right", "first_stage": name of the first stage whose emitted digest differs or None,
    "differences": [{"field", "left", "right"}]}.
    """
    one, two = store.verify(left), store.verify(right)
    differences: list[dict[str, str]] = []
    for section in ("artifact", "compiler", "config", "contract", "envelope", "files", "fixture", "options"):
        _differ(section, _section(one, section), _section(two, section), differences)
    return {
        "equal": left == right,
        "left": left,
        "right": right,
        "first_stage": first_stage(one, two),
        "differences": differences,
    }


def first_stage(one: PackageManifest, two: PackageManifest) -> str | None:
    """Name the first stage whose emitted digest differs between two packages."""
    for ours, theirs in zip(one.stages, two.stages, strict=False):
        if ours.output_digest != theirs.output_digest:
            return f"{ours.stage} {ours.name}"
    return None


def _section(manifest: PackageManifest, name: str) -> Any:
    return manifest.to_document()[name]


def _differ(path: str, left: Any, right: Any, found: list[dict[str, str]]) -> None:
    if left == right:
        return
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):  # pyright: ignore[reportUnknownArgumentType]
            _differ(f"{path}.{key}", left.get(key), right.get(key), found)
        return
    found.append({"field": path, "left": _short(left), "right": _short(right)})


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."

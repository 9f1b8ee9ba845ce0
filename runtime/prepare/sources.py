"""Where does the model with this digest lie?  Packages name their source by content; this finds its folder again.

packages/sources.json holds the folders from which this ledger's packages were made.  It is a hint and no evidence: a
folder counts only when its content has the digest that is looked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from manifests.canonical import canonical_bytes
from runtime.models.source import identify
from runtime.prepare.store import PackageStore
from traces.failures import ClassifiedError
from traces.ledger.layout import write_durably

HINTS = "sources.json"
PLACES_VARIABLE = "REPLAYLAB_MODELS"
"""Folders of models, or folders that hold them, separated as in PATH."""


def remember_source(store: PackageStore, model_digest: str, folder: Path) -> None:
    """Note where a model lay when it was prepared; the newest place is tried first."""
    hints = _hints(store)
    place = str(folder.resolve())
    known = [place, *(other for other in hints.get(model_digest, []) if other != place)]
    if hints.get(model_digest) != known:
        store.create()
        write_durably(store.root / HINTS, canonical_bytes({**hints, model_digest: known}), mode=0o644)


def find_source(store: PackageStore, model_digest: str, *, given: Path | None = None) -> Path | None:
    """Find a folder whose content has this digest; None when it is nowhere that is known.

    Args:
        store: knows where its packages were made from.
        model_digest: of the model, as recorded.
        given: the only place to look, where a person says so.
    """
    tried: set[Path] = set()
    for place in [given] if given is not None else _places(store, model_digest):
        folder = place.resolve()
        if folder not in tried:
            tried.add(folder)
            if source_digest(folder) == model_digest:
                return folder
    return None


def source_digest(place: Path) -> str | None:
    """Name a model by its content; None where there is no model."""
    if not place.exists():
        return None
    try:
        return identify(place).digest
    except (ClassifiedError, OSError):
        return None


def _places(store: PackageStore, model_digest: str) -> Iterator[Path]:
    import runtime.models.reference as reference

    yield from (Path(place) for place in _hints(store).get(model_digest, []))
    yield Path(reference.__file__).parent
    for text in filter(None, os.environ.get(PLACES_VARIABLE, "").split(os.pathsep)):
        place = Path(text)
        yield place
        if place.is_dir():
            yield from sorted(place.iterdir())


def _hints(store: PackageStore) -> dict[str, list[str]]:
    try:
        return dict(json.loads((store.root / HINTS).read_bytes()))
    except (OSError, ValueError):  # a lost or damaged hint costs a search, nothing else
        return {}

"""How does an audit read and write tokens when no model is loaded?  A tokenizer is enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.artifact import ArtifactManifest
from manifests.canonical import digest
from manifests.compiler import CompilerManifest
from manifests.run import Pins
from replay.errors import PinRefused
from traces.failures import ClassifiedError

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TextConfig:
    """The sizes that the request path asks a model for."""

    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class TextModel:
    """A package without its executor: it can encode and decode, and says what it is."""

    tokenizer: Any
    config: TextConfig
    artifact: ArtifactManifest
    compiler: CompilerManifest
    executor: None = None


def text_model(ledger: Path, package: str, pins: Pins) -> TextModel:
    """Return what an audit needs of a package; another one with the same tokenizer will do when it is gone.

    Raises PinRefused naming the tokenizer when no package of the ledger has it.
    """
    from tokenizers import Tokenizer

    for found, folder in _packages(ledger, first=package):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            continue
        data = path.read_bytes()
        if digest(data) != pins.artifact.tokenizer_digest:
            continue
        config = TextConfig(int(manifest["config"]["vocab_size"]), int(manifest["config"]["max_positions"]))
        own = found == package
        artifact = ArtifactManifest.from_document(manifest["artifact"]) if own else pins.artifact
        compiler = CompilerManifest.from_document(manifest["compiler"]) if own else pins.compiler
        artifact = artifact.model_copy(update={"package_digest": package})
        return TextModel(Tokenizer.from_buffer(data), config, artifact, compiler)
    raise PinRefused(
        "no package of this ledger has the recorded tokenizer, which an audit needs",
        pin="artifact.tokenizer_digest",
        fix="Prepare the model again: replaylab prepare MODEL.",
    )


def has_tokenizer(ledger: Path, pins: Pins) -> bool:
    """Tell whether an audit of a request with these pins finds its tokenizer."""
    try:
        text_model(ledger, pins.artifact.package_digest or "", pins)
    except ClassifiedError:
        return False
    return True


def _packages(ledger: Path, *, first: str) -> Iterator[tuple[str, Path]]:
    """Yield (digest, folder) of the packages whose manifest is intact, the named one first."""
    root = ledger / "packages"
    folders = sorted(root.glob("sha256-*")) if root.is_dir() else []
    wanted = root / first.replace(":", "-")
    for folder in sorted(folders, key=lambda folder: folder != wanted):
        name = folder.name.replace("-", ":", 1)
        manifest = folder / "manifest.json"
        if manifest.is_file() and digest(manifest.read_bytes()) == name:
            yield name, folder

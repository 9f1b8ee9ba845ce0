"""What does a package hold besides its compiled code, whatever kind of model is inside?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.artifact import ArtifactManifest

FIXTURES, TOKENIZER = "fixtures.safetensors", "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class PackageContents:
    """What stage 7 binds into the manifest beside code and provenance."""

    files: Mapping[str, Path]
    """Fixtures, and a tokenizer where there is one, by their name in the package."""
    artifact: ArtifactManifest
    config: Mapping[str, Any]
    contract: Mapping[str, Any]
    fixture: Mapping[str, Any]
    """The reference, the tolerance and the digests of the reference's outputs."""

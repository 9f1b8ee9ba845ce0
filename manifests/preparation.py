"""How was a package made?  The nine stages of one preparation, so that it can be done again and compared."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from manifests.artifact import ArtifactManifest
from manifests.base import Digest, JsonMap, Manifest
from manifests.compiler import CompilerManifest

STAGE_IDS = tuple(f"a{number:02d}" for number in range(1, 10))


class StageManifest(Manifest):
    """Record what one preparation stage received, emitted and noted."""

    document: Literal["replaylab.stage/1"] = "replaylab.stage/1"
    stage: str
    """a01 to a09."""
    name: str
    """capture, represent, ..."""
    input_digest: Digest
    output_digest: Digest
    record: JsonMap = Field(default_factory=dict[str, Any])
    """What the specification lists under Record for this stage; no times, so that two builds compare."""


class PreparationManifest(Manifest):
    """Record one preparation from source to package."""

    document: Literal["replaylab.preparation/1"] = "replaylab.preparation/1"
    source_digest: Digest
    """Of the model folder as it was found."""
    options: JsonMap = Field(default_factory=dict[str, Any])
    """What the caller asked for."""
    artifact: ArtifactManifest
    compiler: CompilerManifest
    stages: tuple[StageManifest, ...]
    """In order, from a01; shorter than nine in a document written before the last stage ran."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        found = tuple(stage.stage for stage in self.stages)
        if found != STAGE_IDS[: len(found)]:
            raise ValueError(f"stages must run from a01 in order without gaps, found {', '.join(found)}")
        return self

    def first_difference(self, other: PreparationManifest) -> str | None:
        """Name the first stage whose emitted digest differs, or that only one side ran; None when all agree."""
        for index in range(max(len(self.stages), len(other.stages))):
            if index >= len(self.stages) or index >= len(other.stages):
                return STAGE_IDS[index]
            if self.stages[index].output_digest != other.stages[index].output_digest:
                return STAGE_IDS[index]
        return None

"""Stage 6: which code runs, made by which compiler for which target?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.one_shot import OneShotModel
from runtime.backends.protocol import Lowering
from runtime.prepare.capture import Source
from runtime.prepare.partition import Partitioned
from runtime.prepare.stage import StageOutcome


@dataclass(frozen=True)
class Lowered:
    """Emits: compiled code or selected kernels, as files tied to a target."""

    source: Source
    lowering: Lowering
    emitted: Mapping[str, Any]
    files: Mapping[str, Path]
    compiler: Mapping[str, Any]
    one_shot: OneShotModel | None
    """What calls must look like and answer, where one call answers a request; None for a decoder."""

    def document(self) -> Mapping[str, Any]:
        """Describe what the stage emitted."""
        return self.emitted


def run(received: Partitioned) -> StageOutcome[Lowered]:
    """Generate or select code and collect the files that the package needs."""
    boundary = received.lowering.lower()
    lowered = Lowered(
        received.source,
        received.lowering,
        boundary.emitted,
        received.lowering.files(),
        received.lowering.compiler(),
        received.lowering.one_shot(),
    )
    return StageOutcome(lowered, boundary.record)

"""Stage 2: is the captured program a valid graph, and what does it hold?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.backends.protocol import Lowering
from runtime.prepare.capture import Captured, Source
from runtime.prepare.stage import StageOutcome


@dataclass(frozen=True)
class Represented:
    """Emits: a valid IR with stable identifiers and explicit data dependencies."""

    source: Source
    lowering: Lowering
    emitted: Mapping[str, Any]

    def document(self) -> Mapping[str, Any]:
        """Describe what the stage emitted."""
        return self.emitted


def run(received: Captured) -> StageOutcome[Represented]:
    """Validate structure, references and operator versions, and describe the graph."""
    boundary = received.lowering.represent()
    return StageOutcome(Represented(received.source, received.lowering, boundary.emitted), boundary.record)

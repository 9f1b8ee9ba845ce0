"""Stage 5: who owns each part of the graph?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.backends.protocol import Lowering
from runtime.prepare.capture import Source
from runtime.prepare.optimize import Optimized
from runtime.prepare.stage import StageOutcome


@dataclass(frozen=True)
class Partitioned:
    """Emits: a graph with explicit ownership and transfer boundaries."""

    source: Source
    lowering: Lowering
    emitted: Mapping[str, Any]

    def document(self) -> Mapping[str, Any]:
        """Describe what the stage emitted."""
        return self.emitted


def run(received: Optimized) -> StageOutcome[Partitioned]:
    """Ask the backend which provider or library owns each node."""
    boundary = received.lowering.partition()
    return StageOutcome(Partitioned(received.source, received.lowering, boundary.emitted), boundary.record)

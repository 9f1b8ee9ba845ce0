"""Stage 4: what was rewritten, and does the result still compute the same?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.backends.protocol import Lowering
from runtime.prepare.analyze import Analyzed
from runtime.prepare.capture import Source
from runtime.prepare.stage import StageOutcome


@dataclass(frozen=True)
class Optimized:
    """Emits: a semantically equivalent graph with less work."""

    source: Source
    lowering: Lowering
    emitted: Mapping[str, Any]

    def document(self) -> Mapping[str, Any]:
        """Describe what the stage emitted."""
        return self.emitted


def run(received: Analyzed) -> StageOutcome[Optimized]:
    """Run the backend's graph passes and compare with eager float32."""
    boundary = received.lowering.optimize()
    return StageOutcome(Optimized(received.source, received.lowering, boundary.emitted), boundary.record)

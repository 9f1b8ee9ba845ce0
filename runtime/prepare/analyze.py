"""Stage 3: which shapes, types, layouts and guards does the program assume?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.backends.protocol import Lowering
from runtime.prepare.capture import Source
from runtime.prepare.represent import Represented
from runtime.prepare.stage import StageOutcome


@dataclass(frozen=True)
class Analyzed:
    """Emits: symbolic constraints, layout decisions and the key that names a specialization."""

    source: Source
    lowering: Lowering
    emitted: Mapping[str, Any]

    def document(self) -> Mapping[str, Any]:
        """Describe what the stage emitted."""
        return self.emitted


def run(received: Represented) -> StageOutcome[Analyzed]:
    """Read constraints back from the program and hold them against the declared ones."""
    boundary = received.lowering.analyze()
    return StageOutcome(Analyzed(received.source, received.lowering, boundary.emitted), boundary.record)

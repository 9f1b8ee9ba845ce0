"""Does a rebuild give the same bytes?  Where a toolchain does not, the package says so, from which stage on, and why.

Measured by `python -m tests.runtime.prepare.rebuild_trials`; whatever is not declared here must repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.backends.invariant import recipe_of
from runtime.backends.protocol import BuildOptions
from traces.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Unrepeatable:
    """One way of building whose bytes differ from build to build."""

    backend: str
    applies: Callable[[BuildOptions], bool]
    first: Stage
    reason: str


def _frozen_bfloat16(options: BuildOptions) -> bool:
    packed = options.batch_invariant and recipe_of(options.flags) == "tile"
    return options.precision == "bfloat16" and options.flags.get("freezing", str(packed).lower()) == "true"


DECLARED: tuple[Unrepeatable, ...] = (
    Unrepeatable(
        backend="inductor",
        applies=_frozen_bfloat16,
        first=Stage.OPTIMIZE,
        reason="Inductor folds and packs bfloat16 weights in another order from build to build",
    ),
)


def reproducible_build(backend: str, options: BuildOptions) -> dict[str, Any]:
    """Say whether a build repeats: {"reproducible": True}, or False with the stage from which on it does not, and why.

    Stages before that one repeat in any case.
    """
    for one in DECLARED:
        if one.backend == backend and one.applies(options):
            return {"reproducible": False, "from_stage": one.first.value, "reason": one.reason}
    return {"reproducible": True}

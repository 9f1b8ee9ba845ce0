"""Is one preparation stage the same twice?  Its emitted digest decides; its fields say in what it differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from replay.preparations import RecordedStage
from traces.stages import Stage

MOST_FIELDS = 12
"""Fields that are shown of one stage; where everything differs, the first ones say what it is."""


@dataclass(frozen=True, kw_only=True)
class StageComparison:
    """One stage on both sides.

    same    whether the emitted digests are equal; False also where only one side has the stage
    fields  what differs, each {"field", "left", "right"}: of what was emitted first, then of the record
    """

    stage: Stage
    same: bool
    left_us: int | None = None
    right_us: int | None = None
    left_digest: str | None = None
    right_digest: str | None = None
    fields: tuple[Mapping[str, str], ...] = ()
    right_record: Mapping[str, Any] | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form: in verdicts, in reports and in `replay diff --json`."""
        return {
            "stage": self.stage.value,
            "name": self.stage.word,
            "same": self.same,
            "left_us": self.left_us,
            "right_us": self.right_us,
            "left_digest": self.left_digest,
            "right_digest": self.right_digest,
            "fields": [dict(one) for one in self.fields],
        }


def compare_stage(left: RecordedStage | None, right: RecordedStage | None) -> StageComparison:
    """Hold one stage against the same stage of another preparation; either side may lack it."""
    present = left or right
    if present is None:
        raise ValueError("neither side has the stage")
    same = left is not None and right is not None and left.output_digest == right.output_digest
    same = same and left is not None and left.output_digest is not None
    return StageComparison(
        stage=present.stage,
        same=same,
        left_us=None if left is None else left.duration_us,
        right_us=None if right is None else right.duration_us,
        left_digest=None if left is None else left.output_digest,
        right_digest=None if right is None else right.output_digest,
        fields=() if same else tuple(_fields(left, right)),
    )


def compare_stages(left: Iterable[RecordedStage], right: Iterable[RecordedStage]) -> tuple[StageComparison, ...]:
    """Compare two preparations stage by stage, in order."""
    ours, theirs = {one.stage: one for one in left}, {one.stage: one for one in right}
    stages = sorted({*ours, *theirs}, key=lambda stage: stage.number)
    return tuple(compare_stage(ours.get(stage), theirs.get(stage)) for stage in stages)


def first_difference(stages: Iterable[StageComparison]) -> StageComparison | None:
    """Return the first stage that differs."""
    return next((one for one in stages if not one.same), None)


def _fields(left: RecordedStage | None, right: RecordedStage | None) -> list[dict[str, str]]:
    from runtime.prepare.compare import differ
    from runtime.prepare.stage import MEASURED

    found: list[dict[str, str]] = []
    if left is None or right is None:
        return found
    if left.failure or right.failure:
        differ("failure", _said(left), _said(right), found)
        return found
    differ("emitted", left.emitted, right.emitted, found)
    ours, theirs = ({k: v for k, v in side.record.items() if k not in MEASURED} for side in (left, right))
    differ("record", ours, theirs, found)
    return found[:MOST_FIELDS]


def _said(side: RecordedStage) -> dict[str, Any] | None:
    if side.failure is None:
        return None
    return {name: side.failure.get(name) for name in ("failure_class", "error_type", "message")}

"""A stage's boundary: complete records only, and every error leaves with a class."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from runtime.prepare.errors import RecordIncomplete
from runtime.prepare.stage import Journal, StageOutcome
from tests.runtime.prepare.conftest import ListRecorder
from traces.failures import ClassifiedError, FailureClass
from traces.stages import Stage, describe


@dataclass(frozen=True)
class Value:
    """Something that passes between stages."""

    number: int

    def document(self) -> Mapping[str, Any]:
        return {"number": self.number}


def outcome(**changes: Any) -> StageOutcome[Value]:
    return StageOutcome(Value(2), {**dict.fromkeys(describe(Stage.LOAD).record, 0), **changes})


def test_a_finished_stage_hands_on_its_value_and_keeps_its_report() -> None:
    journal = Journal(None)
    assert journal.run(Stage.LOAD, Value(1), lambda _: outcome(load_us=5)) == Value(2)
    (report,) = journal.reports
    assert report.record["load_us"] == 5
    assert "load_us" not in report.manifest.record
    again = Journal(None)
    again.run(Stage.LOAD, Value(1), lambda _: outcome(load_us=6))
    assert again.stages() == journal.stages(), "time is no part of what is compared"


def test_a_missing_or_an_invented_field_fails_the_stage() -> None:
    for changes in ({"invented": 1}, {}):
        broken = outcome(**changes)
        record = {name: value for name, value in broken.record.items() if changes or name != "instance_count"}
        recorder = ListRecorder()
        with pytest.raises(RecordIncomplete):
            Journal(recorder).run(Stage.LOAD, Value(1), lambda _, r=record: StageOutcome(Value(2), r))
        assert [event["event_type"] for event in recorder.events] == ["stage.started", "stage.failed"]


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FailureClass.CAPACITY_ADMISSION),
        (OSError(errno.EFBIG, "File too large"), FailureClass.CAPACITY_ADMISSION),
        (MemoryError(), FailureClass.CAPACITY_ADMISSION),
        (RuntimeError("kernel gone"), FailureClass.MODEL_PROVIDER),
        (ClassifiedError("late", failure_class=FailureClass.TIMEOUT_CANCELLATION), FailureClass.TIMEOUT_CANCELLATION),
    ],
)
def test_every_error_leaves_a_stage_with_class_stage_and_evidence(
    error: Exception, failure_class: FailureClass
) -> None:
    def work(_: Value) -> StageOutcome[Value]:
        raise error

    recorder = ListRecorder()
    with pytest.raises(ClassifiedError) as caught:
        Journal(recorder).run(Stage.LOWER, Value(1), work)
    assert caught.value.failure_class is failure_class
    assert caught.value.stage == "a06"
    assert recorder.events[-1]["failure_class"] == failure_class.value
    assert recorder.events[-1]["payload"]["evidence"]

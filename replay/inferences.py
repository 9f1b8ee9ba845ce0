"""What did `replaylab infer` record?  Which call each request was in, its times, its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manifests.hardware import HardwareManifest
from replay.catalog import kind_of
from replay.errors import IncompleteRecord, UnknownRecording
from replay.preparations import hardware_of

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger

PARTS = ("queue", "batch", "compute", "delivery")
"""The four parts of a request's time, which add up to the whole."""


@dataclass(frozen=True, kw_only=True)
class RecordedInference:
    """One request as it was answered.

    offset      first of its rows in the call; None, as padded is, where no call took it
    padded      rows of the call
    shape       every other size of the call
    outputs     output name to digest; empty where it got no answer
    input_ref   evidence of the inputs; None where it could not be kept
    failure     why it got no answer
    """

    request_ref: str
    status: str
    duration_us: int | None
    times_us: Mapping[str, int]
    batch: int | None
    batch_size: int | None
    instance: int | None
    offset: int | None
    padded: int | None
    shape: str
    outputs: Mapping[str, str]
    input_ref: str | None
    result_ref: str | None
    failure: Mapping[str, Any] | None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay show REQUEST --json` prints."""
        return {
            "request": self.request_ref,
            "status": self.status,
            "duration_us": self.duration_us,
            "times_us": dict(self.times_us),
            "batch": self.batch,
            "batch_size": self.batch_size,
            "padded": self.padded,
            "offset": self.offset,
            "shape": self.shape,
            "instance": self.instance,
            "outputs": dict(self.outputs),
            "failure": None if self.failure is None else dict(self.failure),
        }


@dataclass(frozen=True, kw_only=True)
class RecordedInferences:
    """One run of a one-shot package; hardware is None where the recording does not say what it ran on."""

    run_id: str
    package: str
    hardware: HardwareManifest | None
    settings: Mapping[str, Any]
    requests: Mapping[str, RecordedInference]


def is_inference(ledger: Ledger, run_id: str) -> bool:
    """Tell whether a run answered requests with a one-shot package."""
    return any(kind_of(event) == "inference" for event in ledger.events(run_id=run_id, event_type="run.started"))


def refuse_replay(ledger: Ledger, run_id: str) -> None:
    """Refuse a replay of one-shot requests where outputs are wanted: UnknownRecording, naming what it replayed."""
    for event in ledger.events(run_id=run_id, event_type="run.started"):
        if event.payload.get("of") == "inference" and kind_of(event) == "replay":
            raise UnknownRecording(
                f"{run_id} is a replay of one-shot requests: it keeps a verdict on each, and no outputs of its own",
                fix=f"Replay again to see what differs: replay run {event.payload['parent_run']}",
            )


def load_inferences(ledger: Ledger, run_id: str) -> RecordedInferences:
    """Read the requests of an inference run; IncompleteRecord where it ended before its package was loaded."""
    events = list(ledger.events(run_id=run_id))
    begun = next((event for event in events if event.event_type == "run.started"), None)
    if begun is None or not begun.payload.get("package"):
        raise IncompleteRecord(f"run {run_id} does not say which package answered", missing="artifact.package_digest")
    engine = next((event for event in events if event.event_type == "oneshot.started"), None)
    found = [_request(event) for event in events if event.event_type == "oneshot.request" and event.request_ref]
    return RecordedInferences(
        run_id=run_id,
        package=str(begun.payload["package"]),
        hardware=hardware_of(ledger, begun),
        settings={} if engine is None else engine.payload.get("settings", {}),
        requests={one.request_ref: one for one in found},
    )


def _request(event: TraceEvent) -> RecordedInference:
    told = event.payload
    return RecordedInference(
        request_ref=str(event.request_ref),
        status=str(event.status or "unknown"),
        duration_us=event.duration_us,
        times_us={part: int(told[f"{part}_us"]) for part in PARTS},
        batch=told.get("batch"),
        batch_size=event.batch_size,
        instance=told.get("instance"),
        offset=told.get("offset"),
        padded=told.get("padded"),
        shape=str(told.get("shape", "")),
        outputs=told.get("outputs", {}),
        input_ref=event.input_ref,
        result_ref=event.result_ref,
        failure=told.get("error"),
    )

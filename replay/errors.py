"""What can stop a replay before it has a verdict?

ClassifiedError
└── ReplayRefused          nothing was run; exit code 2
    ├── UnknownRecording   no run or request has this id, or more than one begins with it
    ├── IncompleteRecord   the ledger lacks something that this replay needs
    └── PinRefused         a pin cannot be set to this value; names the pin
ReplayFailed               the replay itself broke (a worker died, a step failed); exit code 3
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traces.failures import ClassifiedError, FailureClass


class ReplayRefused(ClassifiedError):
    """Refuse a replay before anything runs; the same request is refused again until something is changed."""

    def __init__(
        self,
        message: str,
        *,
        fix: str | None = None,
        evidence: Mapping[str, Any] | None = None,
        failure_class: FailureClass = FailureClass.VALIDATION_POLICY,
        error_type: str = "replay_refused",
    ) -> None:
        super().__init__(
            message, failure_class=failure_class, evidence=dict(evidence or {}), fix=fix, error_type=error_type
        )


class UnknownRecording(ReplayRefused):
    """No recording has this id, or more than one has an id that begins so."""

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(message, fix=fix, error_type="unknown_recording")


class IncompleteRecord(ReplayRefused):
    """The ledger lacks something that this replay needs; `missing` says what."""

    def __init__(self, message: str, *, missing: str, fix: str | None = None) -> None:
        self.missing = missing
        super().__init__(
            message,
            fix=fix or "See what can be replayed with: replay check ID",
            evidence={"missing": missing},
            failure_class=FailureClass.TELEMETRY_PERSISTENCE,
            error_type="incomplete_record",
        )


class PinRefused(ReplayRefused):
    """A pin cannot be set to this value here."""

    def __init__(self, message: str, *, pin: str, fix: str | None = None) -> None:
        self.pin = pin
        super().__init__(f"{pin}: {message}", fix=fix, evidence={"pin": pin}, error_type="pin_refused")


class ReplayFailed(ClassifiedError):
    """The replay broke while it ran; says nothing about the recording."""

    def __init__(self, message: str, *, fix: str | None = None, evidence: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            message,
            failure_class=FailureClass.MODEL_PROVIDER,
            evidence=dict(evidence or {}),
            fix=fix,
            error_type="replay_failed",
        )

"""Which errors may the runtime raise while it serves, and which failure class does each belong to?

    ClassifiedError                      traces.failures: the base of every error, with class, evidence and fix
      RuntimeFailure                     bound to one class by its type
        RequestRefused                   validation_policy     malformed, unauthorized or forbidden work
        OutputRejected                   validation_policy     the model's output broke a rule
        EffectMiss                       validation_policy     a replay asked for a call that was never recorded
        WriteForbidden                   validation_policy     a replay was about to perform a write
        CapacityRefused                  capacity_admission    quota, rate, concurrency or admission limit
        DeadlineExceeded                 timeout_cancellation  the deadline passed
        RequestCancelled                 timeout_cancellation  the caller went away or cancelled
        ProviderFailed                   model_provider        the model process or a provider failed
        ToolFailed                       tool_side_effect      a tool failed and certainly did nothing
        AmbiguousSideEffect              tool_side_effect      a write may or may not have happened
        RouteUnavailable                 artifact_compatibility  no loaded package can serve the request
        InputOutsideGuard                shape_guard           the input violates what the package was compiled for
      TelemetryPersistenceError          telemetry_persistence mandatory evidence could not be written (traces.failures)

The classes, their retry rules and containment are the specification's table "Failure handling by stage".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from traces.failures import ClassifiedError, FailureClass

__all__ = [
    "AmbiguousSideEffect",
    "CapacityRefused",
    "DeadlineExceeded",
    "EffectMiss",
    "InputOutsideGuard",
    "OutputRejected",
    "ProviderFailed",
    "RequestCancelled",
    "RequestRefused",
    "RouteUnavailable",
    "RuntimeFailure",
    "ToolFailed",
    "WriteForbidden",
]


class RuntimeFailure(ClassifiedError):
    """A failure whose class is given by its type; `reason` is the stable machine-readable name of the cause."""

    bound_class: ClassVar[FailureClass]

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        stage: Any = None,
        evidence: Mapping[str, Any] | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(
            message,
            failure_class=self.bound_class,
            stage=stage,
            evidence=dict(evidence or {}),
            fix=fix,
            error_type=reason,
        )


class RequestRefused(RuntimeFailure):
    """The request is malformed, unauthorized or forbidden; nothing costly was done for it."""

    bound_class = FailureClass.VALIDATION_POLICY


class OutputRejected(RuntimeFailure):
    """The model's output broke a schema, citation, business or permission rule."""

    bound_class = FailureClass.VALIDATION_POLICY


class EffectMiss(RuntimeFailure):
    """A replayed run asked for an effect that the recorded run never performed."""

    bound_class = FailureClass.VALIDATION_POLICY


class WriteForbidden(RuntimeFailure):
    """A replayed run was about to perform a write."""

    bound_class = FailureClass.VALIDATION_POLICY


class CapacityRefused(RuntimeFailure):
    """A quota, rate, concurrency or admission limit stands in the way."""

    bound_class = FailureClass.CAPACITY_ADMISSION


class DeadlineExceeded(RuntimeFailure):
    """The request's deadline passed before it was done."""

    bound_class = FailureClass.TIMEOUT_CANCELLATION


class RequestCancelled(RuntimeFailure):
    """The caller cancelled or went away."""

    bound_class = FailureClass.TIMEOUT_CANCELLATION


class ProviderFailed(RuntimeFailure):
    """The model process or a provider returned an error."""

    bound_class = FailureClass.MODEL_PROVIDER


class ToolFailed(RuntimeFailure):
    """A tool failed and certainly changed nothing."""

    bound_class = FailureClass.TOOL_SIDE_EFFECT


class AmbiguousSideEffect(RuntimeFailure):
    """A write may or may not have happened; it must be reconciled, never blindly repeated."""

    bound_class = FailureClass.TOOL_SIDE_EFFECT


class RouteUnavailable(RuntimeFailure):
    """No loaded package can serve the request."""

    bound_class = FailureClass.ARTIFACT_COMPATIBILITY


class InputOutsideGuard(RuntimeFailure):
    """The input violates what the package was compiled for."""

    bound_class = FailureClass.SHAPE_GUARD

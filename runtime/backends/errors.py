"""Which errors can a backend give?

ClassifiedError
  BackendError
    InputRefused            shape_guard             an input breaks the contract; nothing has run
    BackendRefused          artifact_compatibility  this backend cannot or may not do what was asked
    BackendMissing          artifact_compatibility  its libraries are not installed
    ProviderMismatch        artifact_compatibility  another execution provider than the requested one is active
    BuildFailed             artifact_compatibility  a compiler refused or failed
    BuildTimedOut           timeout_cancellation    a compiler passed its deadline
    CapacityExhausted       capacity_admission      memory or disk is not enough
    ExecutionFailed         model_provider          the backend failed, died or answered what is not a number
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from traces.failures import ClassifiedError, FailureClass


class BackendError(ClassifiedError):
    """Base of every error in this room; subclasses bind the failure class."""

    CLASS: ClassVar[FailureClass] = FailureClass.MODEL_PROVIDER
    NAME: ClassVar[str] = "backend_error"

    def __init__(
        self,
        message: str,
        *,
        fix: str | None = None,
        evidence: Mapping[str, Any] | None = None,
        stage: str | None = None,
    ) -> None:
        super().__init__(
            message,
            failure_class=self.CLASS,
            stage=stage,
            evidence=dict(evidence or {}),
            fix=fix,
            error_type=self.NAME,
        )


class InputRefused(BackendError):
    """An input breaks the declared contract: dtype, rank, bound, relation or index range.  Nothing has run."""

    CLASS = FailureClass.SHAPE_GUARD
    NAME = "input_refused"


class BackendRefused(BackendError):
    """The backend cannot, or may not, do what was asked."""

    CLASS = FailureClass.ARTIFACT_COMPATIBILITY
    NAME = "backend_refused"


class BackendMissing(BackendRefused):
    """The backend's libraries are not installed."""

    NAME = "backend_missing"


class ProviderMismatch(BackendRefused):
    """The execution providers that are active are not the ones that were requested."""

    NAME = "provider_mismatch"


class BuildFailed(BackendRefused):
    """A compiler refused the program or failed."""

    NAME = "build_failed"


class BuildTimedOut(BackendError):
    """A compiler passed its deadline."""

    CLASS = FailureClass.TIMEOUT_CANCELLATION
    NAME = "build_timed_out"


class CapacityExhausted(BackendError):
    """Memory or disk is not enough."""

    CLASS = FailureClass.CAPACITY_ADMISSION
    NAME = "capacity_exhausted"


class ExecutionFailed(BackendError):
    """The backend failed, died or answered something that is not a number."""

    CLASS = FailureClass.MODEL_PROVIDER
    NAME = "execution_failed"


CAPACITY_SIGNS = (
    "can't allocate memory",
    "Failed to allocate memory",
    "bad_alloc",
    "RESOURCE_EXHAUSTED",
    "No space left",
)
"""Texts by which allocators say that memory or disk ran out; their exception classes do not tell it apart."""


def classify_execution(error: Exception, backend: str) -> BackendError:
    """Name a backend's own exception: capacity by its text, everything else as failed execution."""
    text = str(error).strip().splitlines()
    evidence = {"backend": backend, "exception": type(error).__name__, "text": text[0][:500] if text else ""}
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in CAPACITY_SIGNS):
        return CapacityExhausted(
            f"{backend} ran out of memory during a step",
            fix="lower max_num_seqs, max_num_batched_tokens or num_blocks",
            evidence=evidence,
        )
    return ExecutionFailed(
        f"{backend} failed during a step: {evidence['text'] or evidence['exception']}",
        fix="retry on another instance; if it repeats, compare with the eager backend",
        evidence=evidence,
    )

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
      HostOutOfMemory       capacity_admission      a hosting process died of its memory limit
    ExecutionFailed         model_provider          the backend failed, died or answered what is not a number
      HostDied              model_provider          the process that hosted the backend died
      InstanceRefused       model_provider          the hosting process died too often; it is not started again
    HostTimedOut            timeout_cancellation    the hosting process passed a deadline and was ended
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from traces.failures import ClassifiedError, FailureClass


class BackendError(ClassifiedError):
    """Base of every error in this room; subclasses bind the failure class."""

    CLASS: ClassVar[FailureClass] = FailureClass.MODEL_PROVIDER
    NAME: ClassVar[str] = "backend_error"
    LOST_INSTANCE: ClassVar[bool] = False
    """Whether the process that ran the call is gone: which of the call's rows was to blame is then not known."""

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


class HostDied(ExecutionFailed):
    """The process that hosted the backend died: a signal, an abort, an exit."""

    NAME = "host_died"
    LOST_INSTANCE = True


class HostOutOfMemory(CapacityExhausted):
    """The process that hosted the backend died because memory ran out."""

    NAME = "host_out_of_memory"
    LOST_INSTANCE = True


class HostTimedOut(BackendError):
    """The process that hosted the backend passed a deadline and was ended."""

    CLASS = FailureClass.TIMEOUT_CANCELLATION
    NAME = "host_timed_out"
    LOST_INSTANCE = True


class InstanceRefused(ExecutionFailed):
    """The hosting process died too often; it is not started again."""

    NAME = "instance_refused"


def restored_error(payload: Mapping[str, Any]) -> BackendError:
    """Make the error again that another process described with `to_payload`; an unknown name is a failed execution."""
    kinds: dict[str, type[BackendError]] = {}
    waiting: list[type[BackendError]] = [BackendError]
    while waiting:
        kind = waiting.pop()
        kinds[kind.NAME] = kind
        waiting.extend(kind.__subclasses__())
    made = kinds.get(str(payload.get("error_type")), ExecutionFailed)
    return made(
        str(payload.get("message")),
        fix=payload.get("fix"),
        evidence=payload.get("evidence"),
        stage=payload.get("stage"),
    )


CAPACITY_SIGNS = (
    "can't allocate memory",
    "Failed to allocate memory",
    "Cannot allocate memory",
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

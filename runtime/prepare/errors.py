"""Which errors can preparation give, besides those of the backends?

ClassifiedError
  PrepareError
    PackageRefused      artifact_compatibility  a package's digest, signature, files or envelope are not right
    PackageUnknown      artifact_compatibility  no package has that digest or name
    WarmupRefused       artifact_compatibility  a loaded package does not answer as its fixtures say
    MetadataIncomplete  artifact_compatibility  a package's manifest lacks a field or has a wrong one
    RecordIncomplete    telemetry_persistence   a stage left out a field that the specification lists
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from traces.failures import ClassifiedError, FailureClass


class PrepareError(ClassifiedError):
    """Base of every error in this room; subclasses bind the failure class."""

    CLASS: ClassVar[FailureClass] = FailureClass.ARTIFACT_COMPATIBILITY
    NAME: ClassVar[str] = "prepare_error"

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


class PackageRefused(PrepareError):
    """A package's digest, signature, files or envelope are not right; no parser has seen its bytes."""

    NAME = "package_refused"


class PackageUnknown(PrepareError):
    """No package has that digest or name."""

    NAME = "package_unknown"


class WarmupRefused(PrepareError):
    """A loaded package does not answer as its fixtures say."""

    NAME = "warmup_refused"


class MetadataIncomplete(PrepareError):
    """A package's manifest lacks a field or has a wrong one."""

    NAME = "metadata_incomplete"


class RecordIncomplete(PrepareError):
    """A stage left out a field that the specification lists, or added one."""

    CLASS = FailureClass.TELEMETRY_PERSISTENCE
    NAME = "record_incomplete"

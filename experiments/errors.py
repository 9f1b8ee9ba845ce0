"""What can go wrong in an experiment before a request reaches the runtime?

ClassifiedError
└── WorkloadError    a workload or trace file cannot be used: says file, line, what and how to mend it
"""

from __future__ import annotations

from pathlib import Path

from traces.failures import ClassifiedError, FailureClass


class WorkloadError(ClassifiedError):
    """Refuse a workload file: bad input, never retried unchanged."""

    def __init__(self, message: str, *, path: Path, line: int | None = None, fix: str | None = None) -> None:
        where = str(path) if line is None else f"{path}:{line}"
        super().__init__(
            f"{where}: {message}",
            failure_class=FailureClass.VALIDATION_POLICY,
            evidence={"file": path.name, "line": line, "rule": message},
            fix=fix,
            error_type="workload_refused",
        )

"""What can go wrong in an experiment before a request reaches the runtime?

ClassifiedError
└── WorkloadError    a workload or trace file cannot be used: says file, line, what and how to mend it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from manifests.errors import ManifestError
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


def report(error: ClassifiedError | ManifestError, *, as_json: bool) -> int:
    """Say one clear error, what and how to mend it; return the exit code: 2 for a refusal, 3 for a failure."""
    message = error.message if isinstance(error, ClassifiedError) else str(error)
    if as_json:
        print(json.dumps({"error": {"message": message, "fix": error.fix}}, indent=2))
    else:
        print(f"error: {message}", file=sys.stderr)
        if error.fix and error.fix not in message:
            print(f"  fix: {error.fix}", file=sys.stderr)
    refusals = (FailureClass.VALIDATION_POLICY, FailureClass.ARTIFACT_COMPATIBILITY)
    return 2 if isinstance(error, ManifestError) or error.failure_class in refusals else 3

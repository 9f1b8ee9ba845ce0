"""How is a preparation rebuilt in a process of its own?  `python -m replay.rebuild_worker`, and how it is started.

A process of its own, because libraries read their numeric settings once, and because a compiler may take its process
with it.  Standard output carries reports and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from replay.errors import ReplayFailed
from replay.launch import worker_process
from replay.rebuild import RebuildJob, RebuildReport, rebuild
from replay.verdict import ReplayVerdict
from traces.failures import ClassifiedError

MODULE = ("-m", "replay.rebuild_worker")


def rebuild_in_worker(
    job: RebuildJob,
    *,
    environment: Mapping[str, str],
    interpreter: str = sys.executable,
    on_report: Callable[[RebuildReport], None] = lambda report: None,
    command: Sequence[str] = MODULE,
) -> ReplayVerdict:
    """Run a rebuild in a worker and return its verdict; ReplayFailed when the worker dies or fails without one."""
    with worker_process(job, environment, (interpreter, *command)) as (lines, ended):
        stage = "a01"
        for line in lines:
            report = RebuildReport.decode(line)
            on_report(report)
            if report.kind == "begun":
                stage = str(report.body["stage"])
            elif report.kind == "verdict":
                return ReplayVerdict.from_document(report.body)
            elif report.kind == "failed":
                raise ReplayFailed(str(report.body["message"]), fix=report.body.get("fix"))
        code, last_words = ended()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise ReplayFailed(
        f"the rebuild's worker died ({how}) in stage {stage}",
        fix="Its last words:\n" + last_words.strip(),
        evidence={"exit_code": code, "last_words": last_words, "stage": stage},
    )


def main() -> int:
    """Read one job from standard input, rebuild, report on standard output."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints from here on, C libraries included, goes to standard error

    def say(report: RebuildReport) -> None:
        reports.write(report.encode() + "\n")
        reports.flush()

    try:
        rebuild(RebuildJob.decode(sys.stdin.readline()), say)
    except ClassifiedError as error:
        evidence = json.loads(json.dumps(error.evidence, default=str))
        say(RebuildReport(kind="failed", body={"message": str(error), "fix": error.fix, "evidence": evidence}))
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

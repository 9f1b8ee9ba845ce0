"""How does the `replay` command have a schedule searched?  One job to a worker of the recorded environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from replay.errors import ReplayFailed
from replay.jobs import Report
from replay.launch import raise_failed, worker_process

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger

WORKER = (sys.executable, "-m", "replay.blame_worker")


@dataclass(frozen=True, kw_only=True)
class BlameJob:
    """What is to be searched.

    generation    which generation of the request, from 1; None searches them in order until one has a finding
    max_replays   most replays of a slice for each generation
    arrivals      whether each arrival is moved by one step, too
    samples       jittered schedules to try; 0 estimates no sensitivity
    jitter        largest move of an arrival in them, in engine steps
    seed          of the moves
    """

    ledger: Path
    run_id: str
    request: str
    generation: int | None = None
    max_replays: int = 200
    arrivals: bool = False
    samples: int = 0
    jitter: int = 1
    seed: int = 0

    def encode(self) -> str:
        """Return the job as one line of JSON."""
        return json.dumps(asdict(self) | {"ledger": str(self.ledger.resolve())})

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read what `encode` wrote."""
        document = json.loads(text)
        return cls(**(document | {"ledger": Path(document["ledger"])}))


def search(ledger: Ledger, job: BlameJob, *, tell: Callable[[str], None] = lambda state: None) -> list[dict[str, Any]]:
    """Run a search and return what was found, one document a generation; `tell` hears how far it is.

    Raises ReplayFailed when the worker dies or the recorded plan does not give the recorded output, and ReplayRefused
    when the record lacks what the search needs.
    """
    from replay.groups import worker_environment
    from replay.records import load_request

    environment = worker_environment(load_request(ledger, job.run_id, job.request), ())
    found: list[dict[str, Any]] = []
    done = False
    with worker_process(job, environment, WORKER) as (lines, ended):
        for line in lines:
            report = Report.decode(line)
            if report.kind == "loading":
                tell(f"loading {str(report.body['package'])[:19]}")
            elif report.kind == "progress":
                tell(", ".join(f"{count} {word}" for word, count in report.body.items()))
            elif report.kind == "found":
                found.append(dict(report.body))
            elif report.kind == "failed":
                raise_failed(report.body)
            done = done or report.kind == "done"
        code, last_words = ended()
    if not done:
        raise ReplayFailed(
            f"the worker process ended with code {code} before the search did",
            fix="Its last words:\n" + last_words.strip(),
            evidence={"exit_code": code, "last_words": last_words},
        )
    return found

"""What is said between the `replay` command and the worker process that runs the model?

One job goes in as JSON on standard input; reports come out as JSON lines.  The worker is a process of its own because
libraries read their numeric settings once, at load: the environment must be pinned before it starts, and a library
that kills its process must not take the verdicts on other requests with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

ReplayMode = Literal["faithful", "alone", "forced", "audit"]
MODES: tuple[ReplayMode, ...] = ("faithful", "alone", "forced", "audit")

THREADS_VARIABLE = "REPLAYLAB_REPLAY_THREADS"
"""Environment variable that tells a worker its number of compute threads."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker is to run again.

    ledger    folder of the ledger, which also takes the recording of the replay
    run_id    the run that is replayed
    requests  references of its requests, in order
    mode      faithful, alone, forced or audit
    settings  `--set` options as written, already checked
    repeat    how many times each request is run; each time is a child run of its own
    together  whether every recorded call is run once with all its rows; only for a whole run under its own pins
    """

    ledger: Path
    run_id: str
    requests: tuple[str, ...]
    mode: ReplayMode = "faithful"
    settings: tuple[str, ...] = ()
    repeat: int = 1
    together: bool = False

    def encode(self) -> str:
        """Return the job as one line of JSON."""
        document = {
            "ledger": str(self.ledger.resolve()),
            "run_id": self.run_id,
            "requests": list(self.requests),
            "mode": self.mode,
            "settings": list(self.settings),
            "repeat": self.repeat,
            "together": self.together,
        }
        return json.dumps(document)

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read what `encode` wrote."""
        document = json.loads(text)
        return cls(
            ledger=Path(document["ledger"]),
            run_id=document["run_id"],
            requests=tuple(document["requests"]),
            mode=document["mode"],
            settings=tuple(document["settings"]),
            repeat=document["repeat"],
            together=document["together"],
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """One line from a worker.

    kind   loading (a package), begun (a request), verdict (on a request), failed (the whole job), done;
           of a search also progress and found; of who starts workers, apart (none could run all together)
    body   loading: package; begun: request, repeat; verdict: request, repeat, verdict; failed: message, fix, ...;
           apart: exit_code, last_words
    """

    kind: Literal["loading", "begun", "verdict", "progress", "found", "failed", "done", "apart"]
    body: Mapping[str, Any]

    def encode(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps({"kind": self.kind, "body": dict(self.body)})

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read what `encode` wrote."""
        document = json.loads(text)
        return cls(kind=document["kind"], body=document["body"])

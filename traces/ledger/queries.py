"""Which questions does a ledger answer by name?

Each question is one SQL text over the views, with named parameters, and one function that answers it as a polars frame.
``Ledger.rows(SQL, ...)`` answers the same text as plain rows, without a data-frame library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import polars


class Answering(Protocol):
    """Whoever can ask the projection: a ``Ledger``."""

    def frame(self, sql: str, parameters: Mapping[str, Any] | None = None) -> polars.DataFrame:
        """Answer a question as a polars frame."""
        ...


EVENTS = """
SELECT body FROM event
WHERE ($run_id IS NULL OR run_id = $run_id)
  AND ($request_ref IS NULL OR request_ref = $request_ref)
  AND ($event_types::VARCHAR[] IS NULL OR list_contains($event_types::VARCHAR[], event_type))
ORDER BY seq
"""

# A run without the steps of its engines and without the events of other requests.
RUN_EVENTS_OF = """
SELECT body FROM event
WHERE run_id = $run_id
  AND (list_contains($request_refs::VARCHAR[], request_ref) OR (request_ref IS NULL AND event_type <> 'engine.step'))
ORDER BY seq
"""

STEP_COUNT = "SELECT count(*) AS steps FROM event WHERE run_id = $run_id AND event_type = 'engine.step'"

# What one request's replay needs of the engine: its steps from and to, not those of the whole run.
STEP_EVENTS = """
SELECT body FROM event
WHERE run_id = $run_id AND event_type = 'engine.step' AND engine_id = $engine_id AND step BETWEEN $first AND $last
ORDER BY step, seq
"""

RUNS = "SELECT * FROM run ORDER BY started_us DESC, run_id DESC"

REQUESTS = """
SELECT * FROM request WHERE ($run_id IS NULL OR run_id = $run_id)
ORDER BY accepted_us DESC, request_ref DESC
"""

# A replay keeps the request_ref under another run: the request's own run is the earliest that knows it.
LAST_INCIDENT = """
WITH diverged AS (
    SELECT DISTINCT request_ref FROM event
    WHERE event_type = 'replay.verdict' AND payload.verdict::VARCHAR = 'diverged' AND request_ref IS NOT NULL
), live AS (
    SELECT * FROM request QUALIFY row_number() OVER (PARTITION BY request_ref ORDER BY accepted_us, run_id) = 1
)
SELECT live.*, request_ref IN (SELECT request_ref FROM diverged) AS diverged
FROM live
WHERE (status IS NOT NULL AND status <> 'ok') OR request_ref IN (SELECT request_ref FROM diverged)
ORDER BY coalesce(terminal_us, accepted_us) DESC, request_ref DESC LIMIT 1
"""

WATERFALL = """
WITH chosen AS (
    SELECT coalesce($run_id, (
        SELECT run_id FROM event WHERE request_ref = $request_ref ORDER BY ts_us, seq LIMIT 1
    )) AS run_id
)
SELECT span.*, started_us - min(started_us) OVER () AS offset_us
FROM span JOIN chosen USING (run_id)
WHERE request_ref = $request_ref
ORDER BY started_us, first_seq
"""

STAGE_LATENCY = """
SELECT track, stage,
       count(*) AS spans,
       quantile_cont(duration_us, 0.50)::BIGINT AS p50_us,
       quantile_cont(duration_us, 0.95)::BIGINT AS p95_us,
       quantile_cont(duration_us, 0.99)::BIGINT AS p99_us,
       max(duration_us) AS max_us,
       sum(duration_us)::BIGINT AS total_us
FROM stage_latency WHERE ($run_id IS NULL OR run_id = $run_id)
GROUP BY track, stage ORDER BY stage
"""

STEPS = """
SELECT * EXCLUDE (payload), payload::JSON::VARCHAR AS payload FROM step
WHERE run_id = $run_id AND ($engine_id IS NULL OR engine_id = $engine_id)
ORDER BY engine_id, step, seq
"""

FAILURES = """
SELECT failure_class, stage, error_type,
       count(*) AS failures,
       count(DISTINCT request_ref) AS requests,
       max(ts_us) AS last_us,
       arg_max(request_ref, ts_us) AS last_request
FROM failure WHERE ($run_id IS NULL OR run_id = $run_id)
GROUP BY failure_class, stage, error_type ORDER BY failures DESC, failure_class, stage
"""

ATTEMPTS = """
SELECT * FROM attempt WHERE request_ref = $request_ref AND ($run_id IS NULL OR run_id = $run_id) ORDER BY seq
"""


def runs(ledger: Answering) -> polars.DataFrame:
    """One row a run, newest first: times, requests, terminal statuses, failures, the run it replays."""
    return ledger.frame(RUNS)


def requests(ledger: Answering, run_id: str | None = None) -> polars.DataFrame:
    """One row a request, newest first, of one run or of all."""
    return ledger.frame(REQUESTS, {"run_id": run_id})


def last_incident(ledger: Answering) -> polars.DataFrame:
    """The newest request that did not end ok or whose replay diverged: one row, or none."""
    return ledger.frame(LAST_INCIDENT)


def waterfall(ledger: Answering, request_ref: str, *, run_id: str | None = None) -> polars.DataFrame:
    """A request's spans by start, with ``offset_us`` from the first span; by default in its live run."""
    return ledger.frame(WATERFALL, {"request_ref": request_ref, "run_id": run_id})


def stage_latency(ledger: Answering, run_id: str | None = None) -> polars.DataFrame:
    """Exact p50, p95, p99, maximum and sum of every stage's duration, microseconds."""
    return ledger.frame(STAGE_LATENCY, {"run_id": run_id})


def steps(ledger: Answering, run_id: str, engine_id: str | None = None) -> polars.DataFrame:
    """An engine's steps in order; ``payload`` is the plan as JSON text."""
    return ledger.frame(STEPS, {"run_id": run_id, "engine_id": engine_id})


def failures(ledger: Answering, run_id: str | None = None) -> polars.DataFrame:
    """Failures counted by class, stage and type, with the newest request of each."""
    return ledger.frame(FAILURES, {"run_id": run_id})


def attempts(ledger: Answering, request_ref: str, *, run_id: str | None = None) -> polars.DataFrame:
    """Every recorded attempt of a request with its retry decision, in order."""
    return ledger.frame(ATTEMPTS, {"request_ref": request_ref, "run_id": run_id})

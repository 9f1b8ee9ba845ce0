"""What does the DuckDB projection look like, and how does an older file become a newer one?

One wide table of immutable events with typed columns, one table of segments (its highest number is the high-water mark
of the projection), and views.  Migrations are numbered, appended, never edited.  No primary key and no index on events:
rows arrive in (run_id, seq) order and zone maps do the work.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from traces.envelope import TraceEvent

ColumnType = Literal["BIGINT", "VARCHAR", "BLOB", "VARIANT", "INTEGER"]


class Column(NamedTuple):
    """One column of the event table."""

    name: str
    type: ColumnType


_INTEGERS = frozenset(
    {
        "ts_us",
        "mono_us",
        "outbox_seq",
        "schema_version",
        "attempt",
        "duration_us",
        "deadline_us",
        "seed",
        "top_k",
        "max_tokens",
        "step",
        "batch_size",
        "batch_position",
        "queue_depth",
        "kv_blocks",
        "kv_hit_tokens",
        "input_tokens",
        "output_tokens",
        "cache_read_tokens",
        "cache_write_tokens",
        "reasoning_tokens",
        "first_token_us",
        "cost_microusd",
    }
)

# Position in the ledger first, then the envelope's columns in its own order, the payload, and the canonical body.
ENVELOPE: tuple[Column, ...] = tuple(
    Column(name, "VARIANT" if name == "payload" else "BIGINT" if name in _INTEGERS else "VARCHAR")
    for name in TraceEvent.__struct_fields__
)
EVENT_COLUMNS: tuple[Column, ...] = (
    Column("seq", "BIGINT"),
    Column("segment", "INTEGER"),
    Column("leaf_hash", "BLOB"),
    *ENVELOPE,
    Column("body", "BLOB"),
)

_MIGRATION_1 = f"""
CREATE TABLE segment (
    number INTEGER, first BIGINT, leaves BIGINT, root BLOB, previous BLOB, sealed_us BIGINT, checkpoint VARCHAR
);
CREATE TABLE event ({", ".join(f'"{column.name}" {column.type}' for column in EVENT_COLUMNS)});
"""

_MIGRATION_2 = """
CREATE VIEW run AS
SELECT run_id,
       min(ts_us) AS started_us,
       max(ts_us) AS ended_us,
       max(ts_us) - min(ts_us) AS duration_us,
       any_value(component) FILTER (event_type = 'run.started') AS component,
       any_value(payload.kind::VARCHAR) FILTER (event_type = 'run.started') AS kind,
       any_value(payload.parent::VARCHAR) FILTER (event_type = 'run.started') AS parent,
       any_value(status) FILTER (event_type = 'run.completed') AS status,
       count(DISTINCT request_ref) AS requests,
       count(*) FILTER (event_type = 'request.terminal' AND status = 'ok') AS requests_ok,
       count(*) FILTER (event_type = 'request.terminal' AND status <> 'ok') AS requests_not_ok,
       count(*) FILTER (failure_class IS NOT NULL) AS failures,
       count(*) AS events
FROM event GROUP BY run_id;

CREATE VIEW span AS
SELECT run_id, request_ref, span_id,
       any_value(trace_id) AS trace_id,
       any_value(parent_span_id) AS parent_span_id,
       any_value(track) AS track,
       any_value(stage) AS stage,
       any_value(component) AS component,
       max(attempt) AS attempt,
       arg_max(event_type, seq) AS last_event,
       coalesce(min(ts_us) FILTER (event_type LIKE '%.started'), min(ts_us - coalesce(duration_us, 0))) AS started_us,
       max(ts_us) FILTER (event_type NOT LIKE '%.started') AS ended_us,
       coalesce(max(duration_us), max(mono_us) - min(mono_us)) AS duration_us,
       arg_max(status, seq) AS status,
       any_value(failure_class) AS failure_class,
       any_value(error_type) AS error_type,
       any_value(effect_origin) AS effect_origin,
       any_value(tool_name) AS tool_name,
       any_value(input_ref) AS input_ref,
       any_value(result_ref) AS result_ref,
       min(seq) AS first_seq
FROM event WHERE span_id IS NOT NULL GROUP BY run_id, request_ref, span_id;

CREATE VIEW request AS
SELECT run_id, request_ref,
       any_value(trace_id) AS trace_id,
       any_value(tenant_ref) AS tenant_ref,
       any_value(actor_ref) AS actor_ref,
       any_value(model_route) AS model_route,
       coalesce(any_value(manifest_digest) FILTER (event_type = 'request.manifest'), any_value(manifest_digest))
           AS manifest_digest,
       coalesce(min(ts_us) FILTER (event_type = 'request.accepted'), min(ts_us)) AS accepted_us,
       max(ts_us) FILTER (event_type = 'request.terminal') AS terminal_us,
       coalesce(max(duration_us) FILTER (event_type = 'request.terminal'),
                max(ts_us) FILTER (event_type = 'request.terminal') - min(ts_us)) AS duration_us,
       arg_max(status, seq) FILTER (event_type = 'request.terminal') AS status,
       arg_max(finish_reason, seq) FILTER (finish_reason IS NOT NULL) AS finish_reason,
       coalesce(arg_max(failure_class, seq) FILTER (event_type = 'request.terminal'),
                arg_max(failure_class, seq) FILTER (failure_class IS NOT NULL)) AS failure_class,
       arg_max(error_type, seq) FILTER (error_type IS NOT NULL) AS error_type,
       max(input_tokens) AS input_tokens,
       max(output_tokens) AS output_tokens,
       max(first_token_us) AS first_token_us,
       max(cost_microusd) AS cost_microusd,
       arg_max(payload.verdict::VARCHAR, seq) FILTER (event_type = 'replay.verdict') AS verdict,
       count(*) AS events
FROM event WHERE request_ref IS NOT NULL GROUP BY run_id, request_ref;

CREATE VIEW step AS
SELECT run_id, engine_id, step, ts_us, mono_us, duration_us, batch_id, batch_size, queue_depth, kv_blocks,
       kv_hit_tokens, input_tokens, output_tokens, payload, seq
FROM event WHERE event_type = 'engine.step';

CREATE VIEW attempt AS
SELECT run_id, request_ref, stage, attempt, component, event_type, status, failure_class, error_type, retry_decision,
       duration_us, ts_us, seq
FROM event WHERE attempt IS NOT NULL AND event_type NOT LIKE '%.started';

CREATE VIEW failure AS
SELECT run_id, request_ref, stage, component, failure_class, error_type, retry_decision, status, attempt, event_type,
       ts_us, payload, seq
FROM event WHERE failure_class IS NOT NULL;

CREATE VIEW stage_latency AS
SELECT run_id, track, stage, component, request_ref, attempt, duration_us, status, ts_us
FROM event
WHERE stage IS NOT NULL AND duration_us IS NOT NULL AND event_type IN ('stage.completed', 'stage.failed');
"""

# A replay names its parent as parent_run; its requests keep their references, so a run is needed to tell them apart.
_MIGRATION_3 = """
CREATE OR REPLACE VIEW run AS
SELECT run_id,
       min(ts_us) AS started_us,
       max(ts_us) AS ended_us,
       max(ts_us) - min(ts_us) AS duration_us,
       any_value(component) FILTER (event_type = 'run.started') AS component,
       any_value(payload.kind::VARCHAR) FILTER (event_type = 'run.started') AS kind,
       any_value(coalesce(payload.parent_run::VARCHAR, payload.parent::VARCHAR)) FILTER (event_type = 'run.started')
           AS parent,
       any_value(payload.mode::VARCHAR) FILTER (event_type = 'run.started') AS mode,
       arg_max(status, seq) FILTER (event_type = 'run.completed') AS status,
       count(DISTINCT request_ref) AS requests,
       count(*) FILTER (event_type = 'request.terminal' AND status = 'ok') AS requests_ok,
       count(*) FILTER (event_type = 'request.terminal' AND status <> 'ok') AS requests_not_ok,
       count(*) FILTER (failure_class IS NOT NULL) AS failures,
       count(*) AS events
FROM event GROUP BY run_id;
"""

MIGRATIONS: tuple[str, ...] = (_MIGRATION_1, _MIGRATION_2, _MIGRATION_3)

"""What ran, how did its requests end, and what did replays say?  Rows for the lists, from the ledger's views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from dashboards.rows import LatencyRow, RequestRow, RunRow, VerdictRow
from dashboards.words import FAILED, short_digest
from traces.envelope import TraceEvent
from traces.stages import Stage

NAMING = ("model", "backend", "precision")
"""What a preparation is called by."""
GOOD_ENDS = ("ok", "review", "replayed")
"""Ends that are no failure: an answer, a human who was asked, a replay that left a verdict and nothing else."""


def run_rows(
    rows: Iterable[Mapping[str, Any]], starts: Iterable[TraceEvent], requests: Iterable[Mapping[str, Any]]
) -> list[RunRow]:
    """Return one row a run, newest first.

    Args:
        rows: the ledger's ``run`` view.
        starts: the run.started and run.completed events, which say what was run and what came of it.
        requests: the ledger's ``request`` view of all runs.
    """
    told: dict[str, dict[str, Any]] = {}
    for event in starts:
        told.setdefault(event.run_id, {}).update(event.payload)
    models = {one["package"]: one["model"] for one in told.values() if one.get("package") and one.get("model")}
    times: dict[str, list[int]] = {}
    failed: dict[str, int] = {}
    for request in requests:
        bad = request["status"] is not None and request["status"] not in GOOD_ENDS
        failed[request["run_id"]] = failed.get(request["run_id"], 0) + bad
        if request["duration_us"] is not None:
            times.setdefault(request["run_id"], []).append(request["duration_us"])
    found = [
        _run_row(
            row,
            told.get(row["run_id"], {}),
            times.get(row["run_id"], []),
            failed=failed.get(row["run_id"], 0),
            models=models,
        )
        for row in rows
    ]
    return sorted((row for row in found if row is not None), key=lambda row: row.started_us, reverse=True)


def request_rows(rows: Iterable[Mapping[str, Any]], prefills: Iterable[TraceEvent]) -> list[RequestRow]:
    """Return one row a request, in order of arrival.

    Args:
        rows: the ledger's ``request`` view.
        prefills: stage.completed events; the first prefill's end is when the first token was there.
    """
    first: dict[str | None, int] = {}
    for event in prefills:
        if event.stage is Stage.PREFILL:
            first[event.request_ref] = min(event.ts_us, first.get(event.request_ref, event.ts_us))
    found = [
        RequestRow(
            run_id=row["run_id"],
            request_ref=row["request_ref"],
            accepted_us=row["accepted_us"],
            status=row["status"] or "running",
            tenant_ref=row["tenant_ref"],
            route=row["model_route"],
            failure_class=row["failure_class"] if row["status"] not in GOOD_ENDS else None,
            total_us=row["duration_us"],
            first_token_us=first[row["request_ref"]] - row["accepted_us"] if row["request_ref"] in first else None,
            input_tokens=row["input_tokens"],
            output_tokens=row["output_tokens"],
            manifest_digest=row["manifest_digest"],
        )
        for row in rows
    ]
    return sorted(found, key=lambda row: (row.accepted_us, row.request_ref))


def verdict_rows(events: Iterable[TraceEvent], starts: Iterable[TraceEvent]) -> list[VerdictRow]:
    """Return one row a replay verdict, newest first.

    Args:
        events: the replay.verdict events.
        starts: the run.started events, which say how each replay was run.
    """
    told = {event.run_id: event.payload for event in starts}
    rows = [
        VerdictRow(
            run_id=event.run_id,
            request_ref=event.request_ref,
            verdict=str(event.payload.get("verdict", "unverified")),
            mode=_text(told.get(event.run_id, {}).get("mode")),
            changed=_settings(told.get(event.run_id, {})),
            layer=_text(event.payload.get("layer")),
            stage=_text(event.payload.get("stage")),
            token_index=event.payload.get("token_index"),
            detail=str(event.payload.get("detail") or ""),
            at_us=event.ts_us,
            kept=told.get(event.run_id, {}).get("of") != "inference",
        )
        for event in events
    ]
    return sorted(rows, key=lambda row: row.at_us, reverse=True)


def latency_rows(rows: Iterable[Mapping[str, Any]]) -> list[LatencyRow]:
    """Return the percentiles of each request stage, in the order of stages."""
    return [
        LatencyRow(
            stage=row["stage"], count=row["spans"], p50_us=row["p50_us"], p95_us=row["p95_us"], p99_us=row["p99_us"]
        )
        for row in rows
        if row["track"] == "B"
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lie, linear between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _run_row(
    row: Mapping[str, Any],
    payload: Mapping[str, Any],
    times: Sequence[int],
    *,
    failed: int,
    models: Mapping[str, str],
) -> RunRow | None:
    """Return the row of one run; None for the ledger's own housekeeping.  `models`: package digest to model."""
    if not payload and not row["requests"]:
        return None
    told = str(payload.get("kind") or row["kind"])
    kind = told if told in ("replay", "preparation", "inference") else "live"
    return RunRow(
        run_id=row["run_id"],
        kind=kind,
        name=_name(kind, payload, models),
        started_us=row["started_us"],
        duration_us=row["duration_us"],
        requests=row["requests"],
        failed=failed,
        p50_us=percentile(times, 0.50) if times else None,
        p95_us=percentile(times, 0.95) if times else None,
        parent_run=_text(payload.get("parent_run") or row["parent"]),
        mode=_text(payload.get("mode")),
        outcome=_outcome(row["status"], payload),
        package=_text(payload.get("package")),
        message="; fix: ".join(filter(None, (_text(payload.get("message")), _text(payload.get("fix"))))) or None,
    )


def _outcome(status: str | None, payload: Mapping[str, Any]) -> str:
    """Count the verdicts of a replay; say how another run ended, an error by its sign and its name."""
    verdicts = cast("Mapping[str, int]", payload.get("verdicts") or {})
    if verdicts:
        return ", ".join(f"{number} {word.replace('_', ' ')}" for word, number in sorted(verdicts.items()))
    if status is None:
        return "running"
    if status != "error":
        return status
    return f"{FAILED} {str(payload.get('error_type') or payload.get('error') or status).replace('_', ' ')}"


def _name(kind: str, payload: Mapping[str, Any], models: Mapping[str, str]) -> str:
    """Say in a few words what was run."""
    if kind == "replay":
        return ", ".join(["replay", str(payload.get("mode", "faithful")), *_settings(payload)])
    if kind == "preparation":
        return " ".join(["prepare", *(str(payload[name]) for name in NAMING if payload.get(name))])
    if kind == "inference":
        package = str(payload.get("package"))
        return f"infer {models.get(package) or short_digest(package)}"
    label = payload.get("label") or payload.get("workload")
    return label if isinstance(label, str) else kind


def _settings(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the pins that a replay changed, as they were written."""
    changed = payload.get("set")
    return tuple(str(one) for one in cast("list[Any]", changed)) if isinstance(changed, list) else ()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

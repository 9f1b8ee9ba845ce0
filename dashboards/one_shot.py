"""What happened to the requests of a one-shot model?  Their parts, their calls and their outputs as plain records.

Such a request passes no stages: it waits to be taken, its call is put together, computed and handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from dashboards.overview import percentile
from dashboards.rows import LatencyRow, SpanRow
from traces.envelope import TraceEvent

ENDED = "oneshot.request"
"""The event that a one-shot request ends with, and the only one it has of its own."""
CALLED = "oneshot.batch"

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "queue": "Waiting to be taken",
        "batch": "Taken, until its call began",
        "compute": "In the model",
        "delivery": "Computed, until it was handed over",
    }
)
"""The parts of a request's time, in order of time; they follow each other without a gap."""


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """One one-shot request as its only event tells it."""

    request_ref: str
    arrived_us: int
    """UTC epoch."""
    total_us: int
    status: str
    parts_us: Mapping[str, int]
    """Part to microseconds; they add up to the whole."""
    call: int | None
    """Number of the call that it was part of; None when it never reached one."""
    rows: int | None
    """Rows of that call that did useful work, its own and others."""
    padded_rows: int | None
    instance: int | None
    outputs: Mapping[str, str]
    """Output name to the digest of its values."""
    failure_class: str | None = None
    error_type: str | None = None
    message: str | None = None
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class CallRow:
    """One call of the model."""

    number: int
    requests: int
    rows: int
    padded_rows: int
    due: str
    """Why it was not held back any longer."""
    instance: int | None
    duration_us: int | None
    failed: bool


def read_one_shot(event: TraceEvent) -> OneShot:
    """Read the event of a one-shot request, which arrived as long ago as it took."""
    told, error = event.payload, event.payload.get("error") or {}
    total = event.duration_us or 0
    return OneShot(
        request_ref=event.request_ref or "",
        arrived_us=event.ts_us - total,
        total_us=total,
        status=str(event.status or "ok"),
        parts_us={name: int(told.get(f"{name}_us", 0)) for name in PARTS},
        call=told.get("batch"),
        rows=event.batch_size,
        padded_rows=told.get("padded"),
        instance=told.get("instance"),
        outputs=dict(told.get("outputs") or {}),
        failure_class=None if event.failure_class is None else str(event.failure_class),
        error_type=error.get("error_type"),
        message=error.get("message"),
        fix=error.get("fix"),
    )


def part_spans(one: OneShot) -> tuple[SpanRow, ...]:
    """Return the bars of the request's waterfall: each part begins where the one before it ended."""
    ends = list(accumulate(one.parts_us.values()))
    failed = None if one.failure_class is None else "queue" if one.call is None else "compute"
    return tuple(
        SpanRow(
            stage=name,
            label=name.capitalize(),
            start_us=end - taken,
            end_us=end,
            critical=((end - taken, end),),
            status="error" if name == failed else "ok",
            detail=PARTS[name],
        )
        for (name, taken), end in zip(one.parts_us.items(), ends, strict=True)
    )


def part_latency(found: Sequence[OneShot]) -> list[LatencyRow]:
    """Return how long each part took over many requests; nothing for none."""
    rows: list[LatencyRow] = []
    for name in PARTS if found else ():
        times = [one.parts_us[name] for one in found]
        p50, p95, p99 = (percentile(times, share) for share in (0.50, 0.95, 0.99))
        rows.append(LatencyRow(stage=name, count=len(times), p50_us=p50, p95_us=p95, p99_us=p99))
    return rows


def call_rows(events: Iterable[TraceEvent]) -> list[CallRow]:
    """Return the calls of a run in order."""
    found = [
        CallRow(
            number=int(event.payload["batch"]),
            requests=len(event.payload["requests"]),
            rows=sum(event.payload["rows"]),
            padded_rows=int(event.payload["padded"]),
            due=str(event.payload.get("due", "")),
            instance=event.payload.get("instance"),
            duration_us=event.duration_us,
            failed=bool(event.payload.get("failed")),
        )
        for event in events
    ]
    return sorted(found, key=lambda row: row.number)


def with_ends(rows: Iterable[Mapping[str, Any]], events: Iterable[TraceEvent]) -> list[Mapping[str, Any]]:
    """Return the ledger's request rows with the ends that one-shot requests and their replays have.

    Args:
        rows: the ledger's ``request`` view, which knows the ends of requests that went through the stages.
        events: the ``oneshot.request`` and ``replay.verdict`` events.
    """
    ends: dict[tuple[str, str | None], dict[str, Any]] = {}
    for event in events:
        key = (event.run_id, event.request_ref)
        if event.event_type == ENDED:
            one = read_one_shot(event)
            ends[key] = {
                "status": one.status,
                "accepted_us": one.arrived_us,
                "duration_us": one.total_us,
                "failure_class": one.failure_class,
            }
        else:
            ends.setdefault(key, {"status": "replayed"})
    named = [(row, ends.get((row["run_id"], row["request_ref"]), {})) for row in rows]
    return [row if row["status"] is not None else {**row, **end} for row, end in named]

"""Which request is meant?  Two boxes that follow the address and change it."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from dashboards import ledger, places
from dashboards.parts import callout, empty, mono
from dashboards.rows import RequestRow, RunRow
from dashboards.theme import WAITING
from dashboards.words import count, duration, moment, short_id


def nothing_yet(path: Path, title: str) -> None:
    """Say that there is nothing to look at, and the command that changes it: draining, where events wait for it."""
    waiting = ledger.pending(path)
    if waiting:
        empty(
            f"{count(waiting, 'event')} wait for a drain",
            "Pages read what was drained. Drain, then read again.",
            ledger.command(path, "replaylab ledger drain"),
        )
        return
    empty(title, "Record a workload, then read again.", ledger.command(path, "replaylab record support-desk"))


def has_requests(path: Path) -> bool:
    """Say whether there is any request to choose."""
    return bool(_with_requests(path))


def choose_request(
    path: Path, *, run_parameter: str, request_parameter: str, side: str = "", fallback: int = 0
) -> tuple[str, str] | None:
    """Return (run, request) from the boxes; None, with a word on why, when there is nothing to choose from.

    Args:
        run_parameter: the query parameter that names the run.
        request_parameter: the one that names the request.
        side: ``Left`` or ``Right`` of a comparison; its boxes stand one above the other.
        fallback: which request of the run is shown when the address names none.
    """
    runs = _with_requests(path)
    if not runs:
        nothing_yet(path, "No request is recorded here yet")
        return None
    left, right = (st.container(), st.container()) if side else st.columns(2)
    asked_run, asked_request = places.chosen(run_parameter), places.chosen(request_parameter)
    index = next((place for place, row in enumerate(runs) if row.run_id == asked_run), None)
    if index is None:
        say_missing(asked_run, "this ledger")
        index = next((place for place, row in enumerate(runs) if row.kind != "replay"), 0)
    run = left.selectbox(
        f"{side} run".strip().capitalize(),
        runs,
        index=index,
        format_func=_say_run,
        key=f"box-{run_parameter}-{asked_run}",
    )
    requests = ledger.requests(path, run.run_id)
    if not requests:
        empty("This run holds no requests", "It was stopped before the first one arrived.")
        return None
    place = next((spot for spot, row in enumerate(requests) if row.request_ref == asked_request), None)
    if place is None:
        say_missing(asked_request if run.run_id == asked_run else None, "this run")
    request = right.selectbox(
        f"{side} request".strip().capitalize(),
        requests,
        index=place if place is not None else min(fallback, len(requests) - 1),
        format_func=_say_request,
        key=f"box-{request_parameter}-{run.run_id}-{asked_request}",
    )
    if (run.run_id, request.request_ref) != (asked_run, asked_request):
        st.query_params[run_parameter] = run.run_id
        st.query_params[request_parameter] = request.request_ref
    return run.run_id, request.request_ref


def _with_requests(path: Path) -> list[RunRow]:
    return [row for row in ledger.runs(path) if row.requests] if ledger.exists(path) else []


def say_missing(asked: str | None, where: str) -> None:
    """Say that the address names what is not there, before something else is shown in its place."""
    if asked is not None:
        callout(f"{mono(asked)} is not in {where}; another one is shown.", WAITING)


def _say_run(row: RunRow) -> str:
    return f"{row.name}, {moment(row.started_us)}, {short_id(row.run_id)}"


def _say_request(row: RequestRow) -> str:
    return f"{short_id(row.request_ref)}, {row.status}, {duration(row.total_us)}"

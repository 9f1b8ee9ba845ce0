"""What ran, and how did one run go?"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, cast

import streamlit as st

from dashboards import ledger, places
from dashboards.charts import batch_occupancy, stage_latency, waterfall
from dashboards.chooser import nothing_yet, say_missing
from dashboards.engine_view import engines, step_rows
from dashboards.one_shot import call_rows
from dashboards.one_shot_view import one_shot_calls, one_shot_times
from dashboards.overview import percentile
from dashboards.parts import callout, empty, facts, figure, heading, mono, section, table
from dashboards.rows import RequestRow, RunRow, VerdictRow
from dashboards.stage_details import stage_details
from dashboards.story import span_rows
from dashboards.theme import DIVERGED
from dashboards.words import FAILED, UNKNOWN, duration, moment, short_digest, short_id, stage_title

ROW_HEIGHT = 35
"""Pixels of one row in Streamlit's tables."""
ROWS_SHOWN = 7
"""Runs in sight at once; requests twice as many."""
STEPS_SHOWN = 400
"""Engine steps in one chart: more are unreadable."""


def show() -> None:
    """Draw the page."""
    heading("Runs", "Everything this ledger has recorded, newest first. Choose a run to look into it.")
    path = ledger.ledger_path()
    found = ledger.runs(path) if ledger.exists(path) else []
    if not found:
        nothing_yet(path, "Nothing is recorded here yet")
        return
    chosen = _choose(found, ledger.verdicts(path))
    st.divider()
    _run(path, chosen)


def _choose(found: list[RunRow], verdicts: list[VerdictRow]) -> RunRow:
    """List the runs and return the chosen one: the selected row, the address, or the newest that is no replay."""
    rows = [
        {
            "Started (UTC)": moment(row.started_us),
            "What": row.name,
            "Kind": row.kind,
            "Requests": row.requests or None,
            "Failed": row.failed if row.requests else None,
            "Median": duration(row.p50_us),
            "Outcome": _verdict_words([one for one in verdicts if one.run_id == row.run_id]) or row.outcome,
            "Run": short_id(row.run_id),
        }
        for row in found
    ]
    state = st.dataframe(
        rows,
        hide_index=True,
        height="content" if len(rows) <= ROWS_SHOWN else ROW_HEIGHT * (ROWS_SHOWN + 1),
        on_select="rerun",
        selection_mode="single-row",
        key="runs",
        placeholder=UNKNOWN,
        column_config={
            "Median": st.column_config.TextColumn(help="Median end-to-end time of the run's requests."),
            "Outcome": st.column_config.TextColumn(
                help="Verdicts of a replay, counted; of another run, how it ended itself, whatever became of requests."
            ),
        },
    )
    picked = _selected(state)
    if picked and picked[0] < len(found):
        st.query_params["run"] = found[picked[0]].run_id
        return found[picked[0]]
    asked = places.chosen("run")
    by_address = next((row for row in found if row.run_id == asked), None)
    if by_address is None:
        say_missing(asked, "this ledger")
    return by_address or next((row for row in found if row.requests and row.kind != "replay"), found[0])


def _run(path: Path, row: RunRow) -> None:
    """Show one run."""
    st.html(f'<h2 style="margin:0">{_title(row)}</h2><div class="rl-quiet rl-mono">{row.run_id}</div>')
    if row.package is not None:
        st.html(f'<span class="rl-quiet">package</span> {mono(short_digest(row.package, 12), title=row.package)}')
    if row.message is not None:
        callout(f"<b>{escape(row.outcome)}.</b> {escape(row.message)}", DIVERGED)
    stages = ledger.preparation(path, row.run_id)
    requests = ledger.requests(path, row.run_id)
    if requests:
        _headline(row, requests)
        names = ["Requests", "Time by stage", "Engine", *(["Preparation"] if stages else [])]
        shown = st.tabs(names)
        with shown[0]:
            _requests(path, row, requests)
        with shown[1]:
            _latency(path, row)
        with shown[2]:
            _engine(path, row)
        if stages:
            with shown[3]:
                _preparation(stages)
    elif stages:
        _preparation(stages)
    else:
        empty("This run holds no requests", "It may still be starting, or it was stopped before the first one arrived.")


def _title(row: RunRow) -> str:
    parent = f' <span class="rl-quiet" style="font-size:0.6em">of {short_id(row.parent_run)}</span>'
    return escape(row.name[:1].upper() + row.name[1:]) + (parent if row.parent_run else "")


def _headline(row: RunRow, requests: list[RequestRow]) -> None:
    """Say the run in six numbers."""
    firsts = [one.first_token_us for one in requests if one.first_token_us is not None]
    tokens = sum(one.output_tokens or 0 for one in requests)
    ends = [one.accepted_us + one.total_us for one in requests if one.total_us is not None]
    busy = max(ends) - requests[0].accepted_us if ends else 0
    rate = f"{tokens / busy * 1_000_000:,.0f}" if busy > 0 and tokens else UNKNOWN
    facts(
        [
            ("requests", f"{row.requests:,}", None),
            ("failed", f"{row.failed:,}", None),
            ("median, end to end", duration(row.p50_us), None),
            ("95th percentile", duration(row.p95_us), None),
            ("median to first token", duration(percentile(firsts, 0.5)) if firsts else UNKNOWN, "TTFT"),
            ("output tokens a second", rate, None),
            ("first arrival to last answer", duration(busy or None), None),
        ]
    )


def _requests(path: Path, row: RunRow, requests: list[RequestRow]) -> None:
    """List the requests; one opens, two compare."""
    verdicts = ledger.verdicts(path)
    state = st.dataframe(
        [_request_cells(row, one, verdicts, since_us=requests[0].accepted_us) for one in requests],
        hide_index=True,
        height="content" if len(requests) <= 2 * ROWS_SHOWN else ROW_HEIGHT * (2 * ROWS_SHOWN + 1),
        on_select="rerun",
        selection_mode="multi-row",
        key=f"requests-{row.run_id}",
        placeholder=UNKNOWN,
        column_config={
            "At": st.column_config.TextColumn(help="Arrival, counted from the first request of the run."),
            "First token": st.column_config.TextColumn(help="From acceptance to the first generated token."),
            "Pins": st.column_config.TextColumn(help="Digest of the eight pins. Equal digests mean equal conditions."),
            "Replays": st.column_config.TextColumn(help="What replays of this request said, newest first."),
        },
    )
    picked = [requests[index] for index in _selected(state) if index < len(requests)]
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Open request", type="primary", disabled=len(picked) != 1, icon=":material/timeline:"):
            places.open_request(row.run_id, picked[0].request_ref)
        if st.button("Compare the two", disabled=len(picked) != 2, icon=":material/compare_arrows:"):
            left, right = picked
            places.open_comparison((row.run_id, left.request_ref), (row.run_id, right.request_ref))
        if not picked:
            st.caption("Tick one request to open it, two to compare them.")


def _request_cells(row: RunRow, one: RequestRow, verdicts: list[VerdictRow], *, since_us: int) -> dict[str, Any]:
    said = [verdict for verdict in verdicts if verdict.request_ref == one.request_ref]
    own = [verdict for verdict in said if verdict.run_id == row.run_id] if row.kind == "replay" else said
    words = list(dict.fromkeys(f"{verdict.mode or 'replay'}: {verdict.verdict.replace('_', ' ')}" for verdict in own))
    return {
        "Request": short_id(one.request_ref),
        "At": duration(one.accepted_us - since_us),
        "Status": _status(one),
        "Replays": ", ".join(words) or UNKNOWN,
        "End to end": duration(one.total_us),
        "First token": duration(one.first_token_us),
        "Tokens in": one.input_tokens,
        "Tokens out": one.output_tokens,
        "Route": one.route or UNKNOWN,
        "Tenant": short_id(one.tenant_ref),
        "Pins": short_digest(one.manifest_digest),
    }


def _status(one: RequestRow) -> str:
    """Say how a request ended; a failure stands out by its sign and names its class."""
    if one.failure_class is None:
        return one.status
    return f"{FAILED} {one.failure_class.replace('_', ' ')}"


def _latency(path: Path, row: RunRow) -> None:
    """Show where the time goes over all requests."""
    one_shots = ledger.one_shots(path, row.run_id)
    if one_shots:
        one_shot_times(one_shots)
        return
    rows = ledger.stage_latency(path, row.run_id)
    if not rows:
        empty("No stage was timed", "The run recorded no finished stage.")
        return
    section("How long each stage takes", lead="Inclusive times: stages overlap, so they add up to more than the total.")
    figure(stage_latency(rows), key="latency", alt="Median and 95th percentile of each stage")
    table(
        ["Stage", "Times", "Median", "95th percentile", "99th percentile"],
        [
            [
                stage_title(one.stage),
                f"{one.count:,}",
                duration(one.p50_us),
                duration(one.p95_us),
                duration(one.p99_us),
            ]
            for one in rows
        ],
        numeric=(1, 2, 3, 4),
    )


def _engine(path: Path, row: RunRow) -> None:
    """Show how full the batches were."""
    calls = call_rows(ledger.calls(path, row.run_id))
    if calls:
        one_shot_calls(calls)
        return
    events = ledger.steps(path, row.run_id)
    if not events:
        empty("No engine steps", "A run records its schedule step by step when a language model generated in it.")
        return
    names = engines(events)
    engine = st.pills("Engine", names, default=names[0], key="engine") if len(names) > 1 else None
    rows = step_rows(events, engine_id=engine or (names[0] if names else None))
    section("Batch occupancy", term="occupancy", lead="Each block is one engine step, as wide as it lasted.")
    first = 0
    if len(rows) > STEPS_SHOWN:
        first = st.slider("First step shown", 0, len(rows) - STEPS_SHOWN, 0, step=STEPS_SHOWN // 4)
    shown = rows[first : first + STEPS_SHOWN]
    figure(batch_occupancy(shown), key="occupancy", alt="Rows of the batch over time")
    useful, padded = sum(one.rows for one in rows), sum(one.padded_rows for one in rows)
    facts(
        [
            ("engine steps", f"{len(rows):,}", None),
            ("rows that worked", f"{useful / padded:.0%}" if padded else UNKNOWN, "occupancy"),
            ("mean rows a step", f"{useful / len(rows):.1f}", None),
            ("median step", duration(percentile([one.duration_us for one in rows], 0.5)), None),
            ("steps with prompt rows", f"{sum(1 for one in rows if one.prefill_rows):,}", None),
        ]
    )


def _preparation(stages: Any) -> None:
    """Show the nine preparation stages."""
    total = max((run.end_us or run.start_us) for run in stages)
    section("From model to package", lead="Nine stages, each with what it received, emitted and recorded.")
    chart = waterfall(span_rows(stages, total_us=total), total_us=total, since="the start")
    figure(chart, key="preparation", alt="Preparation stages")
    stage_details(stages, key="preparation")


def _verdict_words(verdicts: list[VerdictRow]) -> str:
    """Count verdicts: ``47 exact, 1 diverged``; nothing for none."""
    counted: dict[str, int] = {}
    for one in verdicts:
        counted[one.verdict] = counted.get(one.verdict, 0) + 1
    return ", ".join(f"{number} {word.replace('_', ' ')}" for word, number in counted.items())


def _selected(state: Any) -> list[int]:
    """Return the selected rows of a table."""
    return cast("list[int]", state["selection"]["rows"]) if state else []

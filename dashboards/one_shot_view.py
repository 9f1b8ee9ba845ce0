"""How is a one-shot request shown?  Where its time went, the call that it shared, its outputs; and two of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import streamlit as st

from dashboards.charts import stage_deltas, stage_latency, waterfall
from dashboards.one_shot import PARTS, CallRow, OneShot, part_latency, part_spans
from dashboards.parts import badge, callout, facts, figure, mono, section, stage_dot, table
from dashboards.story import RequestStory
from dashboards.theme import DIVERGED, SAME, WAITING
from dashboards.words import UNKNOWN, duration, short_digest, signed_duration

CALLS_SHOWN = 200
"""Calls in one table: more are unreadable."""


def one_shot_request(one: OneShot) -> None:
    """Show where the time went, the call and the outputs of one request."""
    section("Where the time went", lead="The parts follow each other and add up to the end-to-end time.")
    chart = waterfall(part_spans(one), total_us=one.total_us, since="arrival")
    figure(chart, key="waterfall", alt="The parts of the request's time")
    section("The call it shared", lead="Others in the call are counted and never named.")
    facts(
        [
            ("call", _number(one.call), None),
            ("rows of the call", _number(one.rows), None),
            ("padded to", _number(one.padded_rows), None),
            ("executor", _number(one.instance), None),
        ]
    )
    section("Outputs")
    if not one.outputs:
        st.caption("The request left no output.")
        return
    table(
        ["Output", "Digest of its values"], [[f"<b>{escape(name)}</b>", _digest(said)] for name, said in _sorted(one)]
    )


def one_shot_times(found: Sequence[OneShot]) -> None:
    """Show how long each part takes over all requests of a run."""
    rows = part_latency(found)
    section("How long each part takes", lead="The parts follow each other: those of one request add up to its time.")
    figure(stage_latency(rows), key="latency", alt="Median and 95th percentile of each part")
    table(
        ["Part", "Times", "Median", "95th percentile", "99th percentile"],
        [
            [PARTS[row.stage], f"{row.count:,}", duration(row.p50_us), duration(row.p95_us), duration(row.p99_us)]
            for row in rows
        ],
        numeric=(1, 2, 3, 4),
    )


def one_shot_calls(calls: Sequence[CallRow]) -> None:
    """Show how the requests of a run were put into calls."""
    section("Calls", term="occupancy", lead="Requests of one shape share a call; rows beyond theirs are padding.")
    useful, padded = sum(call.rows for call in calls), sum(call.padded_rows for call in calls)
    facts(
        [
            ("calls", f"{len(calls):,}", None),
            ("rows that worked", f"{useful / padded:.0%}" if padded else UNKNOWN, "occupancy"),
            ("mean rows a call", f"{useful / len(calls):.1f}", None),
            ("failed calls", f"{sum(call.failed for call in calls):,}", None),
        ]
    )
    table(
        ["Call", "Requests", "Rows", "Padded to", "Executor", "Sent because of", "Took", "Ended"],
        [
            [
                f"{call.number:,}",
                f"{call.requests:,}",
                f"{call.rows:,}",
                f"{call.padded_rows:,}",
                _number(call.instance),
                escape(call.due or UNKNOWN),
                duration(call.duration_us),
                badge("failed" if call.failed else "ok"),
            ]
            for call in calls[:CALLS_SHOWN]
        ],
        numeric=(0, 1, 2, 3, 4, 6),
    )
    if len(calls) > CALLS_SHOWN:
        st.caption(f"The first {CALLS_SHOWN:,} of {len(calls):,} calls.")


def compare_one_shot(left: RequestStory, right: RequestStory) -> None:
    """Say whether two one-shot requests had the same input and gave the same outputs, and what each part took."""
    one, two = left.one_shot, right.one_shot
    if one is None or two is None:
        callout("Only one side is a request of a one-shot model: choose another one on either side.", WAITING)
        return
    names = [name for name, _ in _sorted(one)] + [name for name, _ in _sorted(two) if name not in one.outputs]
    differing = [name for name in names if one.outputs.get(name) != two.outputs.get(name)]
    _verdict(left, right, names, differing)
    section("Input and outputs")
    pairs = [("input", short_digest(left.accepted_ref, 64), short_digest(right.accepted_ref, 64))]
    pairs += [(name, one.outputs.get(name, UNKNOWN), two.outputs.get(name, UNKNOWN)) for name in names]
    table(
        ["What", "Left", "Right", ""],
        [
            [f"<b>{escape(name)}</b>", _digest(first), _digest(second), _sameness(first, second)]
            for name, first, second in pairs
        ],
    )
    section("Time")
    table(
        ["Part", "Left took", "Right took", "Difference"],
        [
            [
                f"{stage_dot(name)}{said}",
                duration(one.parts_us[name]),
                duration(two.parts_us[name]),
                signed_duration(two.parts_us[name] - one.parts_us[name]),
            ]
            for name, said in PARTS.items()
        ],
        numeric=(1, 2, 3),
    )
    figure(stage_deltas(part_spans(one), part_spans(two)), key="deltas", alt="Time of each part, right minus left")


def _verdict(left: RequestStory, right: RequestStory, names: Sequence[str], differing: Sequence[str]) -> None:
    """Say in one sentence where they part."""
    if left.accepted_ref is None or right.accepted_ref is None or not names:
        callout(f"{badge('not fully known', WAITING)} Input or outputs of one side were not recorded.", WAITING)
    elif left.accepted_ref != right.accepted_ref:
        callout(f"{badge('first difference', DIVERGED)} <b>They were given different input.</b>", DIVERGED)
    elif differing:
        said = ", ".join(escape(name) for name in differing)
        callout(f"{badge('first difference', DIVERGED)} <b>The same input, other bits</b> in {said}.", DIVERGED)
    else:
        callout(f"{badge('same', SAME)} <b>Every output is the same to the bit</b>, on the same input.", SAME)


def _sorted(one: OneShot) -> list[tuple[str, str]]:
    return sorted(one.outputs.items())


def _digest(said: str) -> str:
    return mono(short_digest(said, 16), title=said)


def _sameness(first: str, second: str) -> str:
    if UNKNOWN in (first, second):
        return UNKNOWN
    return badge("same", SAME) if first == second else badge("differs", WAITING)


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"

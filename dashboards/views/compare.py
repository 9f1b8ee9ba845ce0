"""Where do two requests part, and which pins differ between them?"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards import ledger
from dashboards.charts import stage_deltas, token_margins, waterfall
from dashboards.chooser import choose_request, has_requests, nothing_yet
from dashboards.conversation import conversation, show_conversation
from dashboards.engine_view import first_difference, generations, token_rows
from dashboards.judged import first_divergence
from dashboards.one_shot_view import compare_one_shot
from dashboards.parts import (
    badge,
    callout,
    figure,
    heading,
    section,
    stage_dot,
    table,
    token_legend,
    token_strip,
    value_html,
)
from dashboards.pins import differences
from dashboards.rows import TokenRow
from dashboards.story import RequestStory, StageRun, span_rows
from dashboards.theme import DIVERGED, QUIET, SAME, WAITING
from dashboards.words import UNKNOWN, duration, short_id, signed_duration, stage_title
from eval.divergence import Divergence
from manifests.run import DIMENSIONS
from traces.stages import REQUEST_STAGES

LAYER_WORDS = {
    "input": "They were given different input",
    "schedule": "They were scheduled differently",
    "bits": "The logits have other bits",
    "margin": "The margins differ beyond the tolerance",
    "token": "The model chose another token",
    "tool": "A tool was called or answered differently",
    "decision": "A decision came out differently",
    "failure": "They ended differently",
}
"""Layer of the first divergence to the sentence that says it."""

OWN_STAGES = ("b01", "b04", "b09", "b10")
"""Stages whose documents name the request itself, so that those of two requests of their own always differ."""


def show() -> None:
    """Draw the page."""
    heading("Compare", "Two requests side by side: the pins that differ, where they first part, and what it cost.")
    path = ledger.ledger_path()
    if not has_requests(path):
        nothing_yet(path, "No request is recorded here yet")
        return
    columns = st.columns(2, gap="large")
    with columns[0]:
        left_place = choose_request(path, run_parameter="left_run", request_parameter="left", side="Left")
    if left_place is None:
        return
    with columns[1]:
        right_place = choose_request(
            path, run_parameter="right_run", request_parameter="right", side="Right", fallback=1
        )
    left = ledger.story(path, *left_place)
    right = ledger.story(path, *right_place) if right_place else None
    if left is None or right is None:
        return
    if left_place == right_place:
        st.caption("Both sides are the same request of the same run: choose another one on either side.")
    if "replayed" in (left.status, right.status):
        callout("A replay of one-shot requests keeps a verdict on each, and no outputs of its own.", WAITING)
        return
    if left.one_shot is not None or right.one_shot is not None:
        compare_one_shot(left, right)
        return
    read = ledger.reader(path)
    results = (generations(left.sequences, read), generations(right.sequences, read))
    found = first_divergence(left, right, *results)
    _verdict(found)
    _pins(left, right)
    _answers(path, (left, right), results)
    _stages(left, right, found)
    _time(left, right)


def _verdict(found: Divergence) -> None:
    """Say in one sentence where they part."""
    if found.verdict in ("exact", "within_tolerance"):
        callout(
            f"{badge('same', SAME)} <b>Nothing that was recorded differs</b>, down to the bits of every token.", SAME
        )
        return
    if found.verdict == "unverified":
        why = "; ".join(found.unverified[:2])
        callout(
            f"{badge('not fully known', WAITING)} <b>Nothing differs in what could be compared.</b> "
            f'<span class="rl-quiet">{escape(why)}</span>',
            WAITING,
        )
        return
    where = [stage_title(found.stage) if found.stage else None]
    where.append(f"token {found.token_index}" if found.token_index is not None else None)
    where.append(f"engine step {found.step} on the left" if found.step is not None else None)
    place = ", ".join(word for word in where if word)
    sentence = LAYER_WORDS.get(found.layer or "", "They differ")
    expected, actual = found.detail.get("expected"), found.detail.get("actual")
    sides = ""
    if expected is not None or actual is not None:
        what = str(found.detail.get("what", "")).replace("_", " ")
        sides = f'<br><span class="rl-quiet">{escape(what)}:</span> {value_html(expected)} &rarr; {value_html(actual)}'
    callout(
        f"{badge('first difference', DIVERGED)} <b>{sentence}</b> in {escape(place or 'the request')}.{sides}", DIVERGED
    )


def _pins(left: RequestStory, right: RequestStory) -> None:
    """List the pins that differ, to the field."""
    section("Pins that differ", term="pins")
    if left.pins is None or right.pins is None:
        st.caption("One side recorded no pins: it failed before a route was chosen.")
        return
    found = differences(left.pins, right.pins)
    changed = {difference.dimension for difference in found}
    same = [name for name in DIMENSIONS if name not in changed]
    if found:
        table(
            ["Pin", "Left", "Right"],
            [
                [
                    f"<b>{one.dimension}</b>.{escape(one.field)}",
                    value_html(one.left, depth=1),
                    value_html(one.right, depth=1),
                ]
                for one in found
            ],
        )
    words = " ".join(badge(name, SAME) for name in same)
    said = "All eight dimensions are the same" if not changed else "The same on both sides"
    st.html(f'<div class="rl-quiet" style="margin-top:0.5rem">{said}: {words or UNKNOWN}</div>')


def _answers(
    path: Path, stories: tuple[RequestStory, RequestStory], results: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    """Show the generated tokens side by side and mark where they part."""
    section("Answers", term="bits")
    for column, story in zip(st.columns(2, gap="large"), stories, strict=True):
        with column:
            show_conversation(conversation(story, ledger.reader(path)))
    texts = [ledger.token_text(path, story.pins) for story in stories]
    if not results[0] and not results[1]:
        st.caption("Neither side generated a token.")
        return
    for number, (one, two) in enumerate(zip_longest(*results)):
        sides = [token_rows([result] if result else [], text) for result, text in zip((one, two), texts, strict=True)]
        bits, tokens = first_difference(*sides)
        if max(len(results[0]), len(results[1])) > 1:
            st.html(f'<div class="rl-quiet"><b>Generation {number + 1}</b> {_parting(bits, tokens)}</div>')
        else:
            st.html(f'<div class="rl-quiet">{_parting(bits, tokens)}</div>')
        for column, side in zip(st.columns(2, gap="large"), sides, strict=True):
            with column:
                if side:
                    token_strip(side, bits_differ_at=bits, tokens_differ_at=tokens)
                else:
                    st.caption("No such generation on this side.")
        _margins(sides, bits, tokens, number)
    token_legend(compared=True)


def _margins(sides: Sequence[Sequence[TokenRow]], bits: int | None, tokens: int | None, number: int) -> None:
    """Draw both sides' margins where there are enough to look at."""
    if not any(row.margin is not None for side in sides for row in side):
        return
    first = bits if bits is not None else tokens
    chart = token_margins([("left", sides[0]), ("right", sides[1])], diverged_at=first)
    figure(chart, key=f"margins-{number}", alt="Margins of both sides")


def _parting(bits: int | None, tokens: int | None) -> str:
    """Say at which token bits and tokens part."""
    if bits is None and tokens is None:
        return "the same tokens with the same bits"
    said = [f"bits part at token {bits}"] if bits is not None else []
    said.append(f"tokens part at token {tokens}" if tokens is not None else "the tokens stay the same")
    return ", ".join(said)


def _stages(left: RequestStory, right: RequestStory, found: Divergence) -> None:
    """Put the stages side by side: how each ended, whether it emitted the same, how long it took."""
    section("Stage by stage")
    rows: list[list[str]] = []
    twins = left.request_ref != right.request_ref
    for description in REQUEST_STAGES:
        pairs = list(zip_longest(left.passes(description.stage), right.passes(description.stage)))
        for place, (one, two) in enumerate(pairs or [(None, None)]):
            first = found.stage == description.stage.value and place == (found.generation or 0)
            rows.append(_stage_cells(description.stage.value, one, two, first=first, twins=twins))
    table(["Stage", "Left", "Right", "Emitted", "Left took", "Right took", "Difference"], rows, numeric=(4, 5, 6))


def _stage_cells(code: str, one: StageRun | None, two: StageRun | None, *, first: bool, twins: bool) -> list[str]:
    """Return one line of the table; the first divergence is marked."""
    mark = f" {badge('parts here', DIVERGED)}" if first else ""
    known = one is not None and two is not None and one.duration_us is not None and two.duration_us is not None
    delta = two.duration_us - one.duration_us if known else None  # pyright: ignore
    return [
        f"{stage_dot(code)}{escape(stage_title(code))}{mark}",
        _ending(one),
        _ending(two),
        badge("its own", QUIET) if twins and code in OWN_STAGES else _emitted(one, two),
        duration(one.duration_us if one else None),
        duration(two.duration_us if two else None),
        signed_duration(delta),
    ]


def _ending(run: StageRun | None) -> str:
    if run is None:
        return '<span class="rl-quiet">did not run</span>'
    return badge(run.failure_class or run.status, DIVERGED if run.failure_class else None)


def _emitted(one: StageRun | None, two: StageRun | None) -> str:
    if one is None or two is None or one.result_ref is None or two.result_ref is None:
        return UNKNOWN
    if one.result_ref == two.result_ref:
        return badge("same", SAME)
    title = escape(f"{one.result_ref}\n{two.result_ref}", quote=True)
    return f'<span title="{title}">{badge("differs", WAITING)}</span>'


def _time(left: RequestStory, right: RequestStory) -> None:
    """Compare where the time went."""
    section("Time", term="critical path")
    totals = [story.total_us for story in (left, right)]
    spans = [span_rows(story.stages, total_us=story.total_us) for story in (left, right)]
    if not all(spans):
        st.caption("One side has no timed stage.")
        return
    known = totals[0] is not None and totals[1] is not None
    delta = totals[1] - totals[0] if known else None  # pyright: ignore
    st.html(
        f'<div class="rl-quiet">left {duration(totals[0])}, right {duration(totals[1])}, '
        f"<b>{signed_duration(delta)}</b> end to end</div>"
    )
    figure(stage_deltas(*spans), key="deltas", alt="Critical-path time of each stage, right minus left")
    longest = max((total for total in totals if total is not None), default=None)
    for column, side, story, name in zip(
        st.columns(2, gap="large"), spans, (left, right), ("Left", "Right"), strict=True
    ):
        with column:
            st.caption(f"{name}: {short_id(story.request_ref)}")
            chart = waterfall(side, total_us=story.total_us, until_us=longest)
            figure(chart, key=f"waterfall-{name}", alt=f"{name} waterfall")

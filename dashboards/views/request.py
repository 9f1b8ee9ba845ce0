"""What happened to one request, where did its time go, and under which pins did it run?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import streamlit as st

from dashboards import ledger, places
from dashboards.charts import batch_occupancy, token_margins, waterfall
from dashboards.chooser import choose_request
from dashboards.conversation import conversation, show_conversation
from dashboards.engine_view import engine_time, generations, own_steps, step_rows, token_rows
from dashboards.evidence_view import decisions_table, effects_table, evidence_list, tools_table
from dashboards.one_shot_view import one_shot_request
from dashboards.parts import (
    badge,
    callout,
    empty,
    facts,
    figure,
    heading,
    key_values,
    mono,
    section,
    table,
    token_legend,
    token_strip,
)
from dashboards.pins import dimension_views
from dashboards.rows import StepRow, TokenRow, VerdictRow
from dashboards.stage_details import stage_details
from dashboards.story import RequestStory, span_rows
from dashboards.theme import DIVERGED, WAITING
from dashboards.words import UNKNOWN, duration, moment, short_digest, short_id, stage_label, stage_title
from traces.failures import FailureClass, rule_of

VERDICTS_SHOWN = 4
"""Newest verdicts that are listed at once."""
STEPS_AROUND = 12
"""Engine steps shown before the request's first and after its last."""


def show() -> None:
    """Draw the page."""
    heading("Request", "One request from boundary to response: where the time went, what was pinned, what it left.")
    path = ledger.ledger_path()
    place = choose_request(path, run_parameter="run", request_parameter="request")
    if place is None:
        return
    story = ledger.story(path, *place)
    if story is None:
        empty("This request is not in the ledger", "The address names a request that was never recorded here.")
        return
    read = ledger.reader(path)
    _headline(story)
    show_conversation(conversation(story, read))
    _replays(path, story)
    if story.one_shot is not None:
        one_shot_request(story.one_shot)
        evidence_list(story, read)
        return
    if story.status == "replayed":
        empty("This replay keeps a verdict", "What the request computed is with the run that was replayed.")
        return
    _waterfall(story)
    shown = st.tabs(["Answer and tokens", "Stages", "Pins", "Tools, policy, effects", "Engine", "Evidence"])
    with shown[0]:
        _answer(path, story, read)
    with shown[1]:
        stage_details(story.stages, key="stage", read_blob=read)
    with shown[2]:
        _pins(story)
    with shown[3]:
        tools_table(story)
        decisions_table(story)
        effects_table(story)
    with shown[4]:
        _engine(path, story, read)
    with shown[5]:
        evidence_list(story, read)


def _headline(story: RequestStory) -> None:
    """Say how the request ended and what it took."""
    ended = [("status", badge(story.status), None), ("end to end", duration(story.total_us), None)]
    generated = [
        ("to first token", duration(story.first_token_us), "TTFT"),
        ("tokens in", _number(story.input_tokens), None),
        ("tokens out", _number(story.output_tokens), None),
        ("ended by", story.finish_reason or UNKNOWN, None),
        ("route", story.route or UNKNOWN, None),
    ]
    facts(ended if story.one_shot is not None else [*ended, *generated])
    st.html(
        f'<div class="rl-quiet" style="margin-top:-0.8rem">{mono(story.request_ref)}, accepted '
        f"{moment(story.accepted_us)} UTC, tenant {mono(short_id(story.tenant_ref), title=story.tenant_ref)}, trace "
        f"{mono(short_digest(story.trace_id, 12), title=story.trace_id)}</div>"
    )
    if story.failure_class is not None:
        rule = rule_of(FailureClass(story.failure_class))
        where = f" in {stage_title(story.failed_stage)}" if story.failed_stage else ""
        callout(
            f"<b>{rule.title}</b>{escape(where)}. {escape(story.message or rule.signal)}"
            f'<br><span class="rl-quiet"><b>Retry rule.</b> {rule.retry_rule}</span>',
            DIVERGED,
        )
    for note in story.notes:
        callout(escape(note), WAITING)


def _replays(path: Path, story: RequestStory) -> None:
    """Show what replays of this request said; each leads to the comparison."""
    said = [one for one in ledger.verdicts(path) if one.request_ref == story.request_ref]
    if not said:
        st.caption(
            f"Never replayed. `{ledger.command(path, f'replay run {story.request_ref}')}` says whether it repeats."
        )
        return
    section("Replays", term="verdict")
    _verdicts(story, said[:VERDICTS_SHOWN])
    if len(said) > VERDICTS_SHOWN:
        with st.expander(f"{len(said) - VERDICTS_SHOWN} earlier replays", icon=":material/history:"):
            _verdicts(story, said[VERDICTS_SHOWN:])


def _verdicts(story: RequestStory, said: Sequence[VerdictRow]) -> None:
    """List verdicts; each but this run's own leads to the comparison."""
    rows: list[list[str]] = []
    for one in said:
        address = places.comparison_address((story.run_id, story.request_ref), (one.run_id, story.request_ref))
        link = f'<a style="white-space:nowrap" href="{escape(address, quote=True)}" target="_self">compare</a>'
        how = escape(", ".join([one.mode or "replay", *one.changed]))
        rows.append(
            [
                badge(one.verdict),
                f"<b>{how}</b>",
                f'<span title="{escape(one.detail, quote=True)}">{_where(one)}</span>',
                f'<span style="white-space:nowrap">{moment(one.at_us)}</span>',
                "this run" if one.run_id == story.run_id else link if one.kept else "",
            ]
        )
    table(["Verdict", "How it was run", "First difference", "When (UTC)", ""], rows)


def _where(one: VerdictRow) -> str:
    """Say where a replay first differed: layer, stage, token."""
    token = f"token {one.token_index}" if one.token_index is not None else None
    place = f"{one.layer} in {stage_label(one.stage)}" if one.layer and one.stage else one.layer
    said = ", ".join(escape(word) for word in (place, token) if word)
    return said or f'<span class="rl-quiet">{escape(one.detail[:80]) or UNKNOWN}</span>'


def _waterfall(story: RequestStory) -> None:
    """Show where the time went."""
    section("Where the time went", term="critical path")
    spans = span_rows(story.stages, total_us=story.total_us)
    if not spans:
        empty("No stage was recorded", "The request was turned away before its first stage began.")
        return
    figure(waterfall(spans, total_us=story.total_us), key="waterfall", alt="Waterfall with the critical path")
    inclusive, owned = sum(span.duration_us for span in spans), sum(span.critical_us for span in spans)
    st.html(
        '<div class="rl-legend"><b>Full colour</b> is the critical path, <b>tint</b> is time that a later stage '
        f"covered. Stages last {duration(inclusive)} when added up; the critical path is {duration(owned)}"
        + (f" of {duration(story.total_us)} end to end" if story.total_us is not None else "")
        + ("; no stage claims the rest" if story.total_us is not None and owned < story.total_us else "")
        + ".</div>"
    )


def _answer(path: Path, story: RequestStory, read: Callable[[str], bytes]) -> None:
    """Show the generated tokens and how sure each was."""
    results = generations(story.sequences, read)
    text_of = ledger.token_text(path, story.pins)
    if not results:
        empty("No tokens were generated", "The request ended before the model ran, or no language model serves it.")
        return
    every: list[TokenRow] = []
    for number, result in enumerate(results, start=1):
        rows = token_rows([result], text_of)
        every += token_rows([result], text_of, first=len(every))
        turn = f"Generation {number} of {len(results)}" if len(results) > 1 else "Generated text"
        section(turn, lead=f"{len(rows)} tokens, ended by {result.get('finish_reason', UNKNOWN)}")
        token_strip(rows)
    token_legend(compared=False)
    if any(row.margin is not None for row in every):
        section("How sure each token was", term="margin")
        figure(token_margins([("margin", every)]), key="margins", alt="Top-two margin of every token")
    with st.expander("All tokens with their numbers", icon=":material/table_rows:"):
        st.dataframe([_token_cells(row) for row in every], hide_index=True)


def _token_cells(row: TokenRow) -> dict[str, object]:
    return {
        "#": row.index,
        "Text": row.text,
        "Id": row.token,
        "Log-probability": row.logprob,
        "Margin": row.margin,
        "Engine step": row.step,
        "Emitted": duration(row.emitted_us),
        "Logits digest": row.logits_digest,
    }


def _pins(story: RequestStory) -> None:
    """Show the eight dimensions, their digests, and on request every field."""
    section("Eight pins", term="pins", lead=f"Together: {short_digest(story.manifest_digest, 16)}")
    if not story.pins:
        empty("No pins were recorded", "The request failed before a route was chosen, so nothing was pinned.")
        return
    views = dimension_views(story.pins)
    table(
        ["Dimension", "Says", "Digest", "In short"],
        [
            [
                f"<b>{view.name}</b>",
                f'<span class="rl-quiet">{view.question}</span>',
                mono(short_digest(view.digest, 12), title=view.digest),
                escape(view.summary) or UNKNOWN,
            ]
            for view in views
        ],
    )
    chosen = st.pills("Every field of", [view.name for view in views], key="dimension")
    for view in views:
        if view.name == chosen:
            key_values(view.document)


def _engine(path: Path, story: RequestStory, read: Callable[[str], bytes]) -> None:
    """Show the steps that ran this request among those that did not."""
    results = generations(story.sequences, read)
    own = own_steps(results)
    engine = next((event.engine_id for event in story.sequences if event.engine_id is not None), None)
    rows = step_rows(ledger.steps(path, story.run_id), own, engine_id=engine)
    if not any(row.own for row in rows):
        empty("No engine steps of this request", "Only requests that a language model answered have a schedule.")
        return
    shown = _around(rows)
    section(
        "The batch around this request",
        term="slice",
        lead="Full colour: steps that ran this request. Others are counted and never named.",
    )
    figure(batch_occupancy(shown), key="occupancy", alt="Batch occupancy around this request")
    mine = [row for row in rows if row.own]
    facts(
        [
            ("steps of this request", f"{len(mine):,}", None),
            ("shared with others", f"{sum(1 for row in mine if row.rows > 1):,}", None),
            ("most rows at once", f"{max(row.rows for row in mine)}", None),
            ("prompt tokens from the cache", _number(sum(int(one.get("cached_tokens", 0)) for one in results)), None),
            ("waited for a place", duration(sum(int(one.get("queue_us", 0)) for one in results)), "queue"),
            ("preemptions", _number(sum(int(one.get("preemptions", 0)) for one in results)), None),
        ]
    )
    parts = engine_time(results)
    if parts:
        section("Who had the time in the engine", lead="Adds up to submission until end, over all generations.")
        facts([(name, duration(us), None) for name, us in parts.items()])


def _around(rows: Sequence[StepRow]) -> Sequence[StepRow]:
    """Return the request's own steps with their neighbours."""
    first = next(index for index, row in enumerate(rows) if row.own)
    last = max(index for index, row in enumerate(rows) if row.own)
    return rows[max(0, first - STEPS_AROUND) : last + STEPS_AROUND + 1]


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"

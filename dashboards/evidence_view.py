"""What did a request read, do and leave?  Tools, effects, decisions and evidence of this request alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html import escape

import streamlit as st

from dashboards.parts import badge, empty, mono, section, table
from dashboards.story import RequestStory
from dashboards.theme import QUIET, SAME, WAITING
from dashboards.words import UNKNOWN, duration, short_digest, stage_label
from traces.failures import ClassifiedError

ReadBlob = Callable[[str], bytes]


def tools_table(story: RequestStory) -> None:
    """List proposed tool calls, what was decided about each, and what came of it."""
    section("Tool calls")
    if not story.tools:
        st.caption("The model proposed no tool call.")
        return
    table(
        ["What", "Tool", "Decision", "Side effect", "Status", "Took", "Arguments or result"],
        [
            [
                escape(event.event_type.replace(".", " ")),
                f"<b>{escape(event.tool_name or UNKNOWN)}</b> {escape(event.tool_version or '')}",
                _decision(event.policy_decision),
                escape(event.side_effect or UNKNOWN),
                badge(event.status) if event.status else UNKNOWN,
                duration(event.duration_us),
                mono(short_digest(event.result_ref or event.input_ref, 12), title=event.result_ref or event.input_ref),
            ]
            for event in story.tools
        ],
    )


def decisions_table(story: RequestStory) -> None:
    """List what the policies decided."""
    section("Policy decisions")
    if not story.decisions:
        st.caption("No policy was asked.")
        return
    table(
        ["Stage", "Rule", "Decision", "Policy version"],
        [
            [
                escape(stage_label(event.stage.value)) if event.stage else UNKNOWN,
                escape(str(event.payload.get("rule") or UNKNOWN)),
                _decision(event.policy_decision),
                escape(event.policy_version or UNKNOWN),
            ]
            for event in story.decisions
        ],
    )


def effects_table(story: RequestStory) -> None:
    """List everything that was not a function of the pins."""
    section(
        "Effects",
        lead="What was no function of the pins. A replay answers each from the record and performs no write.",
    )
    if not story.effects:
        st.caption("No effect was recorded.")
        return
    colours = {"executed": SAME, "replayed": QUIET, "simulated": WAITING}
    table(
        ["At", "Kind", "Side effect", "Origin", "Status", "Asked", "Answered"],
        [
            [
                duration(effect.at_us),
                f"<b>{escape(effect.kind)}</b>{_phase(effect.phase)}",
                escape(effect.side_effect or UNKNOWN),
                badge(effect.origin, colours.get(effect.origin)) if effect.origin else UNKNOWN,
                badge(effect.status) if effect.status else UNKNOWN,
                mono(short_digest(effect.input_ref, 12), title=effect.input_ref),
                mono(short_digest(effect.result_ref, 12), title=effect.result_ref),
            ]
            for effect in story.effects
        ],
        numeric=(0,),
    )


def evidence_list(story: RequestStory, read_blob: ReadBlob) -> None:
    """Let one piece of this request's evidence be read; nothing of another request can be named here."""
    section("Evidence", term="evidence")
    found = dict(evidence_references(story))
    if not found:
        empty("No evidence was kept", "The request recorded events only.")
        return
    names = {label: reference for reference, label in found.items()}
    chosen = st.selectbox(
        "Document", list(names), index=None, placeholder=f"{len(names)} documents, choose one to read"
    )
    if chosen is None:
        return
    reference = names[chosen]
    st.html(f'<div class="rl-quiet">{mono(reference)}</div>')
    try:
        data = read_blob(reference)
    except ClassifiedError as error:
        st.error(str(error))
        return
    st.html(f"{badge('digest verified', SAME)} <span class='rl-quiet'>{len(data):,} bytes</span>")
    try:
        st.json(json.loads(data), expanded=2)
    except ValueError:
        st.caption("These bytes are no JSON document.")


def evidence_references(story: RequestStory) -> Iterator[tuple[str, str]]:
    """Yield (reference, label) of every document that this request's events name, each label once."""
    seen: dict[str, int] = {}

    def named(reference: str | None, label: str) -> Iterator[tuple[str, str]]:
        if reference:
            seen[label] = seen.get(label, 0) + 1
            yield reference, label if seen[label] == 1 else f"{label}, {seen[label]}"

    yield from named(story.accepted_ref, "the request as it was accepted")
    for run in story.stages:
        yield from named(run.input_ref, f"{stage_label(run.stage.value)}: received")
        yield from named(run.result_ref, f"{stage_label(run.stage.value)}: emitted")
    for effect in story.effects:
        yield from named(effect.input_ref, f"effect {effect.kind}: asked")
        yield from named(effect.result_ref, f"effect {effect.kind}: answered")
    for event in story.sequences:
        yield from named(event.result_ref, "generation: tokens and their records")
    yield from named(story.response_ref, "the response")


def _decision(decision: str | None) -> str:
    if decision is None:
        return UNKNOWN
    return badge(decision, SAME if decision in ("allow", "accepted", "approved") else WAITING)


def _phase(phase: str | None) -> str:
    return f' <span class="rl-quiet">{escape(phase)}</span>' if phase and phase != "performed" else ""

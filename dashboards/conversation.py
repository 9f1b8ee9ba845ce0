"""What was asked and what was answered?  Read from the request's own envelope and response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import streamlit as st

from dashboards.parts import badge
from dashboards.story import ReadBlob, RequestStory, read_document
from dashboards.theme import ACCENT, QUIET
from traces.failures import ClassifiedError


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A request in words; what was not recorded, or is no text, is None."""

    question: str | None = None
    answer: str | None = None
    citations: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    """Names of the tools that were called."""


def conversation(story: RequestStory, read_blob: ReadBlob) -> Conversation:
    """Read question, answer, citations and tools of one request."""
    envelope, response = _mapping(story.accepted_ref, read_blob), _mapping(story.response_ref, read_blob)
    task, result = _inside(envelope, "task"), _inside(response, "result")
    return Conversation(
        question=_text(task, "question"),
        answer=_text(result, "answer"),
        citations=_names(response, "citations", "source"),
        tools=_names(response, "tools", "tool"),
    )


def show_conversation(told: Conversation) -> None:
    """Write question and answer as two lines; nothing where neither is text."""
    if told.question is None and told.answer is None:
        return
    lines: list[str] = []
    if told.question is not None:
        lines.append(f'<span class="rl-quiet">Asked</span> {escape(told.question)}')
    if told.answer is not None:
        cited = " ".join(badge(source, QUIET) for source in told.citations)
        lines.append(f'<span class="rl-quiet">Answered</span> <b>{escape(told.answer)}</b> {cited}')
    if told.tools:
        called = " ".join(badge(name.replace("_", " "), ACCENT) for name in told.tools)
        lines.append(f'<span class="rl-quiet">Tools</span> {called}')
    st.html(f'<div style="line-height:1.9;margin-bottom:0.4rem">{"<br>".join(lines)}</div>')


def _mapping(reference: str | None, read_blob: ReadBlob) -> Mapping[str, Any]:
    try:
        found = read_document(reference, read_blob)
    except ClassifiedError:
        return {}
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _inside(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _text(document: Mapping[str, Any], name: str) -> str | None:
    found = document.get(name)
    return found if isinstance(found, str) else None


def _names(document: Mapping[str, Any], name: str, field: str) -> tuple[str, ...]:
    found = document.get(name)
    if not isinstance(found, list):
        return ()
    entries = [cast("Mapping[str, Any]", entry) for entry in cast("list[Any]", found) if isinstance(entry, dict)]
    return tuple(str(entry[field]) for entry in entries if entry.get(field) is not None)

"""What did each stage record?  The list of stages that the pages of a run and of a request share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape

import streamlit as st

from dashboards.parts import badge, key_values, mono, value_html
from dashboards.story import StageRun
from dashboards.theme import DIVERGED
from dashboards.words import UNKNOWN, duration, short_digest
from traces.failures import ClassifiedError, FailureClass, rule_of
from traces.stages import PREPARATION_STAGES, REQUEST_STAGES

ICONS = {"ok": ":material/check:", "error": ":material/close:", "cancelled": ":material/block:"}
"""Status to the sign before a stage's title."""


def stage_details(stages: Sequence[StageRun], *, key: str, read_blob: Callable[[str], bytes] | None = None) -> None:
    """Write one folding line a stage; stages that never ran are named too."""
    track = stages[0].stage.track if stages else "B"
    descriptions = PREPARATION_STAGES if track == "A" else REQUEST_STAGES
    for description in descriptions:
        passes = [run for run in stages if run.stage is description.stage]
        if not passes:
            st.html(
                f'<div class="rl-quiet" style="padding:0.1rem 0 0.1rem 2.6rem">{description.stage.number}. '
                f"{escape(description.title)} {badge('did not run')}</div>"
            )
        for run in passes:
            _stage(run, several=len(passes) > 1, key=key, read_blob=read_blob)


def _stage(run: StageRun, *, several: bool, key: str, read_blob: Callable[[str], bytes] | None) -> None:
    """Write one pass of one stage."""
    again = f", pass {run.ordinal}" if several else ""
    label = f"{run.stage.number}. {run.title}{again}  ·  {duration(run.duration_us)}"
    with st.expander(label, icon=ICONS.get(run.status, ":material/hourglass_empty:"), expanded=run.status == "error"):
        if run.failure_class is not None:
            _failure(run)
        if run.status == "running":
            st.html(f"{badge('no end recorded', DIVERGED)} The stage began and its end was never written.")
        if run.record:
            key_values(run.record)
        elif run.status == "ok":
            st.caption("Nothing was recorded beyond its times.")
        _evidence(run, key=key, read_blob=read_blob)


def _failure(run: StageRun) -> None:
    """Say how it failed, and what the specification allows now."""
    rule = rule_of(FailureClass(run.failure_class))
    st.html(
        f"<p>{badge(rule.title, DIVERGED)} {escape(run.message or '')}</p>"
        f'<p class="rl-quiet"><b>Retry rule.</b> {escape(rule.retry_rule)}<br><b>Containment.</b> '
        f"{escape(rule.containment)}</p>"
    )


def _evidence(run: StageRun, *, key: str, read_blob: Callable[[str], bytes] | None) -> None:
    """Name what the stage received and emitted; a click reads it."""
    pairs = [("received", run.input_ref), ("emitted", run.result_ref)]
    said = "  ".join(
        f'<span class="rl-quiet">{name}</span> {mono(short_digest(ref, 16), title=ref) if ref else UNKNOWN}'
        for name, ref in pairs
    )
    st.html(f'<div style="margin-top:0.4rem">{said}</div>')
    if read_blob is None or not any(reference for _, reference in pairs):
        return
    slot = f"{key}-{run.stage.value}-{run.ordinal}"
    if st.toggle("Read both documents", key=slot, help="The digest of the bytes is checked before they are shown."):
        for (name, reference), column in zip(pairs, st.columns(2), strict=True):
            with column:
                st.caption(name)
                _document(reference, read_blob)


def _document(reference: str | None, read_blob: Callable[[str], bytes]) -> None:
    """Show one document, or say why not."""
    if reference is None:
        st.html(value_html(None))
        return
    try:
        data = read_blob(reference)
    except ClassifiedError as error:
        st.error(str(error))
        return
    try:
        st.json(json.loads(data), expanded=2)
    except ValueError:
        st.caption(f"{len(data):,} bytes that are no JSON document")

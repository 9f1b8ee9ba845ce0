"""How does a recorded request look?  Pure functions from rows to Plotly figures; they read no ledger and no page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import plotly.graph_objects as go

from dashboards.rows import LatencyRow, SpanRow, StepRow, TokenRow
from dashboards.theme import ACCENT, DIVERGED, GAP, INK, QUIET, STAGE_COLOURS, WAITING, stage_colour, tint
from dashboards.words import FAILED, duration, signed_duration, stage_label

BAR_HEIGHT = 26
"""Pixels for one row of a waterfall."""
STRIP = "critical path"
SMALLEST_MARGIN = 1e-4
"""Where a tie is drawn: a logarithmic axis has no zero."""


def waterfall(
    spans: Sequence[SpanRow], *, total_us: int | None = None, until_us: int | None = None, since: str = "acceptance"
) -> go.Figure:
    """Draw each span as a tinted bar, its part of the critical path in full colour, and the path itself on top.

    Args:
        spans: in the order in which they are shown, top to bottom.
        total_us: end-to-end time; the latest end when left out.
        until_us: how far the axis reaches, so that two requests can share a scale; as far as needed when left out.
        since: what the axis counts from.

    Raises:
        ValueError: there is no span to draw.
    """
    if not spans:
        raise ValueError("a waterfall needs at least one span")
    total = total_us if total_us is not None else max(span.end_us for span in spans)
    reach = max(total, until_us or 0, *(span.end_us for span in spans))
    scale, unit = _scale(reach)
    figure = go.Figure()
    names = _unique_labels(spans)
    for span, name in zip(spans, names, strict=True):
        _add_span(figure, span, name, scale)
    figure.add_bar(
        y=[STRIP],
        x=[total / scale],
        orientation="h",
        marker={"color": GAP, "line": {"width": 0}},
        hovertemplate="no stage claims this time<extra></extra>",
        width=0.72,
    )
    for span in spans:
        for start, end in span.critical:
            figure.add_bar(
                y=[STRIP],
                x=[(end - start) / scale],
                base=[start / scale],
                orientation="h",
                marker={"color": stage_colour(span.stage), "line": {"width": 0}},
                hovertemplate=f"<b>{escape(span.label)}</b> owns {duration(start)} to {duration(end)}<extra></extra>",
                width=0.72,
            )
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[*reversed(names), STRIP],
        tickmode="array",
        tickvals=[STRIP, *names],
        ticktext=[f"<b>{STRIP}</b>", *names],
    )
    figure.add_hline(y=len(names) - 0.5, line={"color": tint(QUIET, 0.35), "width": 1})
    figure.update_xaxes(title_text=f"since {since}, {unit}", range=[0, reach / scale * 1.11])
    return _finish(figure, height=BAR_HEIGHT * (len(names) + 1) + 64, left=128)


def stage_latency(rows: Sequence[LatencyRow]) -> go.Figure:
    """Draw each stage's median as a bar with a line to its 95th percentile.

    Raises:
        ValueError: there is no stage to draw.
    """
    if not rows:
        raise ValueError("stage latency needs at least one stage")
    scale, unit = _scale(max(row.p95_us for row in rows))
    names = [stage_label(row.stage) for row in rows]
    hover = [
        f"<b>{name}</b><br>median {duration(row.p50_us)}<br>95th percentile {duration(row.p95_us)}"
        f"<br>99th percentile {duration(row.p99_us)}<br>{row.count:,} times<extra></extra>"
        for name, row in zip(names, rows, strict=True)
    ]
    figure = go.Figure()
    for row, name in zip(rows, names, strict=True):
        figure.add_scatter(
            x=[row.p50_us / scale, row.p95_us / scale],
            y=[name, name],
            mode="lines",
            line={"color": tint(stage_colour(row.stage), 0.45), "width": 4},
            hoverinfo="skip",
        )
    figure.add_bar(
        y=names,
        x=[row.p50_us / scale for row in rows],
        orientation="h",
        marker={"color": [stage_colour(row.stage) for row in rows]},
        hovertemplate=hover,
        width=0.6,
    )
    figure.add_scatter(
        x=[row.p95_us / scale for row in rows],
        y=names,
        mode="markers+text",
        marker={"color": [stage_colour(row.stage) for row in rows], "size": 9, "symbol": "line-ns-open"},
        text=[f"  {duration(row.p50_us)} / {duration(row.p95_us)}" for row in rows],
        textposition="middle right",
        textfont={"size": 11, "color": QUIET},
        hovertemplate=hover,
    )
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    figure.update_xaxes(
        title_text=f"median (bar) and 95th percentile (tick), {unit}",
        range=[0, max(row.p95_us for row in rows) / scale * 1.3],
    )
    return _finish(figure, height=BAR_HEIGHT * len(rows) + 64, left=108)


def batch_occupancy(steps: Sequence[StepRow], *, capacity: int | None = None) -> go.Figure:
    """Draw each engine step as a block as wide as it lasted and as high as its rows, prompt rows below.

    Steps that ran the request that is looked at stand in full colour; when none did, all of them do.

    Raises:
        ValueError: there is no step to draw.
    """
    if not steps:
        raise ValueError("batch occupancy needs at least one step")
    scale, unit = _scale(max(step.start_us + step.duration_us for step in steps))
    focused = any(step.own for step in steps)
    figure = go.Figure()
    layers = (("prompt rows", "b05", False), ("generating rows", "b06", True))
    for name, stage, upper in layers:
        heights = [step.decode_rows if upper else step.prefill_rows for step in steps]
        figure.add_bar(
            x=[step.start_us / scale for step in steps],
            y=heights,
            base=[step.prefill_rows if upper else 0 for step in steps],
            width=[max(step.duration_us, 1) / scale for step in steps],
            offset=0,
            marker={
                "color": [tint(stage_colour(stage), 1.0 if step.own or not focused else 0.28) for step in steps],
                "line": {"color": "white", "width": 0.5 if len(steps) < 160 else 0},
            },
            hovertemplate=[_step_hover(step) for step in steps],
            showlegend=False,
        )
        figure.add_bar(x=[None], y=[None], name=name, marker={"color": stage_colour(stage)})  # the legend's own
    if capacity is not None:
        figure.add_hline(
            y=capacity,
            line={"color": QUIET, "width": 1, "dash": "dot"},
            annotation={"text": f"at most {capacity} at once", "font": {"size": 11, "color": QUIET}},
            annotation_position="top right",
        )
    top = max(capacity or 0, *(step.rows for step in steps))
    figure.update_yaxes(title_text="requests in the batch", range=[0, top + 0.8], dtick=1 if top <= 10 else None)
    figure.update_xaxes(title_text=f"engine time, {unit}")
    figure = _finish(figure, height=260, left=56, legend=True)
    figure.update_layout(barmode="overlay", bargap=0)
    return figure


def stage_deltas(left: Sequence[SpanRow], right: Sequence[SpanRow]) -> go.Figure:
    """Draw how much more or less of the critical path each stage took on the right.

    Raises:
        ValueError: neither side has a span.
    """
    before, after = owned_by_stage(left), owned_by_stage(right)
    stages = [code for code in STAGE_COLOURS if code in before or code in after]
    if not stages:
        raise ValueError("a comparison needs spans")
    deltas = [after.get(code, 0) - before.get(code, 0) for code in stages]
    scale, unit = _scale(max(abs(delta) for delta in deltas) or 1)
    names = [stage_label(code) for code in stages]
    figure = go.Figure()
    figure.add_bar(
        y=names,
        x=[delta / scale for delta in deltas],
        orientation="h",
        marker={"color": [stage_colour(code) for code in stages]},
        text=[signed_duration(delta) for delta in deltas],
        textposition="outside",
        textfont={"size": 11, "color": QUIET},
        cliponaxis=False,
        hovertemplate=[
            f"<b>{name}</b><br>left {duration(before.get(code, 0))}<br>right {duration(after.get(code, 0))}"
            "<extra></extra>"
            for name, code in zip(names, stages, strict=True)
        ],
        width=0.6,
    )
    reach = (max(abs(delta) for delta in deltas) or 1) / scale * 1.35
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    figure.update_xaxes(title_text=f"right minus left on the critical path, {unit}", range=[-reach, reach])
    figure.add_vline(x=0, line={"color": QUIET, "width": 1})
    return _finish(figure, height=BAR_HEIGHT * len(names) + 64, left=108)


def token_margins(sides: Sequence[tuple[str, Sequence[TokenRow]]], *, diverged_at: int | None = None) -> go.Figure:
    """Draw the top-two margin of every token, one line a side, and where the sides part.

    Raises:
        ValueError: no side has a token with a margin.
    """
    figure = go.Figure()
    colours = (ACCENT, WAITING)
    for position, (name, tokens) in enumerate(sides):
        known = [token for token in tokens if token.margin is not None]
        if not known:
            continue
        figure.add_scatter(
            x=[token.index for token in known],
            y=[max(token.margin or 0.0, SMALLEST_MARGIN) for token in known],
            mode="lines+markers",
            name=name,
            showlegend=len(sides) > 1,
            line={"color": colours[position % 2], "width": 2, "dash": "solid" if position == 0 else "dot"},
            marker={"size": 5},
            text=[_margin_hover(token) for token in known],
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
        )
    if not figure.data:
        raise ValueError("no token has a margin")
    if diverged_at is not None:
        mark_divergence(figure, diverged_at)
    ticks = [digit * 10.0**power for power in range(-8, 5) for digit in (1, 2, 3, 5, 7)]
    figure.update_yaxes(title_text="margin", type="log", tickvals=ticks, ticktext=[f"{value:g}" for value in ticks])
    figure.update_xaxes(title_text="generated token")
    return _finish(figure, height=240, left=64, legend=len(sides) > 1)


def mark_divergence(figure: go.Figure, x: float) -> None:
    """Draw the red line at which two runs part."""
    figure.add_vline(
        x=x,
        line={"color": DIVERGED, "width": 2},
        annotation={"text": "first difference", "font": {"color": DIVERGED, "size": 12}},
        annotation_position="top right",
    )


def owned_by_stage(spans: Iterable[SpanRow]) -> dict[str, int]:
    """Add up the critical path of each stage."""
    owned: dict[str, int] = {}
    for span in spans:
        owned[span.stage] = owned.get(span.stage, 0) + span.critical_us
    return owned


def _add_span(figure: go.Figure, span: SpanRow, name: str, scale: float) -> None:
    """Draw one span: the tint, then the critical parts, then its time at the right end."""
    colour = stage_colour(span.stage)
    failed = span.status == "error"
    hover = (
        f"<b>{span.label}</b><br>{duration(span.start_us)} to {duration(span.end_us)}"
        f"<br>lasting {duration(span.duration_us)}"
        f"<br>on the critical path {duration(span.critical_us)}"
        + (f"<br>{escape(span.detail)}" if span.detail else "")
        + "<extra></extra>"
    )
    figure.add_bar(
        y=[name],
        x=[span.duration_us / scale],
        base=[span.start_us / scale],
        orientation="h",
        marker={
            "color": tint(colour, 0.25),
            "line": {"color": DIVERGED if failed else colour, "width": 2 if failed else 0.6},
        },
        text=[(f"{FAILED} " if failed else "") + duration(span.duration_us)],
        textposition="outside",
        textfont={"size": 11, "color": DIVERGED if failed else QUIET},
        cliponaxis=False,
        hovertemplate=hover,
        width=0.72,
    )
    for start, end in span.critical:
        figure.add_bar(
            y=[name],
            x=[(end - start) / scale],
            base=[start / scale],
            orientation="h",
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=hover,
            width=0.72,
        )


def _margin_hover(token: TokenRow) -> str:
    """Say one token and its margin; two logits of equal size are a tie."""
    name = escape(token.text) if token.text is not None else f"token {token.token}"
    return f"<b>{name}</b><br>" + ("a tie: margin 0" if token.margin == 0 else f"margin {token.margin:.3g}")


def _unique_labels(spans: Sequence[SpanRow]) -> list[str]:
    """Give repeated labels a number, because a row of a chart is found by its name."""
    total: dict[str, int] = {}
    for span in spans:
        total[span.label] = total.get(span.label, 0) + 1
    seen: dict[str, int] = {}
    names: list[str] = []
    for span in spans:
        seen[span.label] = seen.get(span.label, 0) + 1
        names.append(span.label if total[span.label] == 1 else f"{span.label} #{seen[span.label]}")
    return names


def _step_hover(step: StepRow) -> str:
    """Say what one step did; other requests are a number and no more."""
    own = "<br>ran this request" if step.own else ""
    return (
        f"<b>step {step.step}</b><br>{duration(step.duration_us)}<br>{step.prefill_rows} prompt rows "
        f"({step.prefill_tokens} tokens), {step.decode_rows} generating<br>padded to {step.padded_rows} rows{own}"
        "<extra></extra>"
    )


def _scale(longest_us: float) -> tuple[float, str]:
    """Choose the unit of an axis: microseconds in one unit, and its name."""
    if longest_us >= 2_000_000:
        return 1_000_000.0, "seconds"
    if longest_us >= 2_000:
        return 1_000.0, "milliseconds"
    return 1.0, "microseconds"


def _finish(figure: go.Figure, *, height: int, left: int, legend: bool = False) -> go.Figure:
    """Give a figure the house's quiet frame."""
    figure.update_layout(
        height=height,
        margin={"l": left, "r": 24, "t": 30 if legend else 12, "b": 44},
        barmode="overlay",
        showlegend=legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right", "font": {"size": 12}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "Source Sans, Source Sans Pro, sans-serif", "size": 13, "color": INK},
        hoverlabel={"font": {"size": 13}},
        hovermode="closest",
    )
    figure.update_xaxes(gridcolor=tint(GAP, 0.5), zeroline=False, title_font={"size": 12, "color": QUIET})
    figure.update_yaxes(gridcolor="rgba(0,0,0,0)", zeroline=False, title_font={"size": 12, "color": QUIET})
    return figure

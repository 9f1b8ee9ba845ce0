"""Which visual pieces do the pages share?  Small pieces of HTML and widgets; every recorded text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, cast

import plotly.graph_objects as go
import streamlit as st

from dashboards.rows import TokenRow
from dashboards.theme import ACCENT, DIVERGED, GAP, QUIET, WAITING, stage_colour, status_colour, tint
from dashboards.words import GLOSSARY, UNKNOWN, duration, field_label, moment

EARLIEST_MOMENT_US = 1_000_000_000_000_000
"""A time in microseconds from here on is a moment of this century; one below lasted."""
HEX_DIGITS = frozenset("0123456789abcdef")

STYLE = f"""
<style>
.block-container {{ padding-top: 3.2rem; max-width: 1180px; }}
.stHeading h1 {{ font-size: 2.2rem; }}
.stHeading h3 {{ font-size: 1.3rem; }}
.rl-lead {{ color: {QUIET}; margin: -0.6rem 0 1rem 0; }}
.rl-facts {{ display: flex; flex-wrap: wrap; gap: 0.4rem 2.2rem; margin: 0.2rem 0 1rem 0; }}
.rl-fact {{ min-width: 5rem; }}
.rl-fact b {{ display: block; font-size: 1.28rem; font-weight: 600; line-height: 1.5; white-space: nowrap; }}
.rl-fact span {{ color: {QUIET}; font-size: 0.8rem; }}
.rl-fact .rl-help {{ border-bottom: 1px dotted {GAP}; cursor: help; }}
.rl-badge {{ display: inline-block; padding: 0.06rem 0.5rem; border-radius: 99px; font-size: 0.8rem; font-weight: 600;
  white-space: nowrap; }}
.rl-table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem; }}
.rl-table th {{ text-align: left; color: {QUIET}; font-weight: 500; font-size: 0.8rem; padding: 0.2rem 0.9rem 0.3rem 0;
  border-bottom: 1px solid {tint(GAP, 0.8)}; }}
.rl-table td {{ padding: 0.32rem 0.9rem 0.32rem 0; border-bottom: 1px solid {tint(GAP, 0.4)}; vertical-align: top;
  overflow-wrap: anywhere; }}
.rl-scroll {{ overflow-x: auto; }}
@media (max-width: 640px) {{ .rl-table td {{ overflow-wrap: break-word; }} }}
.rl-table td.rl-key {{ color: {QUIET}; width: 12rem; overflow-wrap: normal; }}
.rl-table td.rl-num {{ text-align: right; white-space: nowrap; }}
.rl-mono {{ font-family: "Source Code Pro", monospace; font-size: 0.84em; }}
.rl-dot {{ display: inline-block; width: 0.65rem; height: 0.65rem; border-radius: 2px; margin-right: 0.5rem; }}
.rl-quiet {{ color: {QUIET}; }}
.rl-tokens {{ font-family: "Source Code Pro", monospace; font-size: 0.86rem; line-height: 2.05; }}
.rl-tokens span {{ padding: 0.14rem 0.06rem; border-radius: 3px; white-space: pre-wrap; cursor: default; }}
.rl-empty {{ border: 1px dashed {GAP}; border-radius: 8px; padding: 1.6rem 1.8rem; margin: 0.6rem 0 1.2rem 0; }}
.rl-empty b {{ font-size: 1.1rem; }}
.rl-legend {{ color: {QUIET}; font-size: 0.8rem; }}
</style>
"""


def heading(title: str, lead: str) -> None:
    """Write the page's title and one sentence on what it answers."""
    st.html(STYLE)
    st.title(title)
    st.html(f'<div class="rl-lead">{escape(lead)}</div>')


def section(title: str, *, term: str | None = None, lead: str | None = None) -> None:
    """Write a section's title, with the explanation of a term behind the question mark."""
    st.subheader(title, help=GLOSSARY[term] if term else None, anchor=False)
    if lead:
        st.html(f'<div class="rl-quiet" style="margin-top:-0.7rem">{escape(lead)}</div>')


def empty(title: str, text: str, command: str | None = None) -> None:
    """Say why there is nothing here and which command changes that."""
    st.html(f'<div class="rl-empty"><b>{escape(title)}</b><br><span class="rl-quiet">{escape(text)}</span></div>')
    if command:
        st.code(command, language="bash")


def callout(html: str, colour: str) -> None:
    """Write a paragraph that must be seen; the HTML was escaped by whoever made it."""
    st.html(
        f'<div style="border-left:4px solid {colour};background:{tint(colour, 0.07)};padding:0.7rem 1rem;'
        f'border-radius:4px;margin-bottom:0.6rem">{html}</div>'
    )


def badge(text: str, colour: str | None = None) -> str:
    """Return a rounded label; the colour is the one of the status it says unless another is given."""
    chosen = colour or status_colour(text)
    shown = escape(text.replace("_", " "))
    return f'<span class="rl-badge" style="color:{chosen};background:{tint(chosen, 0.12)}">{shown}</span>'


def facts(items: Iterable[tuple[str, str, str | None]]) -> None:
    """Write label and value pairs in a line; the third of each is a glossary term, a badge colour being none."""
    cells: list[str] = []
    for label, value, term in items:
        help_text = f' class="rl-help" title="{escape(GLOSSARY[term], quote=True)}"' if term else ""
        shown = value if value.startswith("<span") else escape(value)
        cells.append(f'<div class="rl-fact"><span{help_text}>{escape(label)}</span><b>{shown}</b></div>')
    st.html(f'<div class="rl-facts">{"".join(cells)}</div>')


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = ()) -> None:
    """Write a plain table; cells are HTML and were escaped by whoever made them."""
    head = "".join(
        f"<th{' style=text-align:right' if index in numeric else ''}>{escape(name)}</th>"
        for index, name in enumerate(columns)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=rl-num' if index in numeric else ''}>{cell}</td>" for index, cell in enumerate(cells))
        + "</tr>"
        for cells in rows
    )
    _scrolling(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")


def key_values(document: Mapping[str, Any], *, labels: Callable[[str], str] = field_label) -> None:
    """Write a document as a table of its fields; what is deeper than two levels is shortened to its size."""
    rows = "".join(
        f'<tr><td class="rl-key">{escape(labels(name))}</td><td>{field_html(name, value)}</td></tr>'
        for name, value in document.items()
    )
    _scrolling(f"<tbody>{rows}</tbody>")


def field_html(name: str, value: Any) -> str:
    """Say one field of a document; a time, whose label loses its unit, with a unit of its own."""
    if not name.endswith("_us") or not isinstance(value, int) or isinstance(value, bool):
        return value_html(value)
    return duration(value) if value < EARLIEST_MOMENT_US else f"{moment(value)} UTC"


def value_html(value: Any, *, depth: int = 0) -> str:
    """Say one recorded value in words."""
    if value is None:
        return f'<span class="rl-quiet">{UNKNOWN}</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        if not fields:
            return '<span class="rl-quiet">none</span>'
        if depth >= 2:
            return f'<span class="rl-quiet">{len(fields)} fields</span>'
        return "<br>".join(
            f'<span class="rl-quiet">{escape(str(name))}</span> {value_html(item, depth=depth + 1)}'
            for name, item in fields.items()
        )
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if not items:
            return '<span class="rl-quiet">none</span>'
        shown = [value_html(item, depth=depth + 1) for item in items[:12]]
        more = f' <span class="rl-quiet">and {len(items) - 12} more</span>' if len(items) > 12 else ""
        return (", " if all(not isinstance(item, dict | list) for item in items) else "<br>").join(shown) + more
    text = str(value)
    bare = text.rsplit(":", 1)[-1].rsplit("/", 1)[-1]
    if len(bare) >= 32 and set(bare) <= HEX_DIGITS:
        return mono(bare[:16], title=text)
    return escape(f"{value:,}" if isinstance(value, int) else text[:400])


def mono(text: str, *, title: str | None = None) -> str:
    """Return text in the typewriter face, the whole of it under the pointer."""
    whole = f' title="{escape(title, quote=True)}"' if title else ""
    return f'<span class="rl-mono"{whole}>{escape(text)}</span>'


def stage_dot(code: str) -> str:
    """Return the small square in the stage's colour."""
    return f'<span class="rl-dot" style="background:{stage_colour(code)}"></span>'


def figure(chart: go.Figure, *, key: str, alt: str) -> None:
    """Show a chart without the tool bar."""
    st.plotly_chart(chart, width="stretch", key=key, config={"displayModeBar": False}, alt=alt)


def token_strip(
    tokens: Sequence[TokenRow], *, bits_differ_at: int | None = None, tokens_differ_at: int | None = None
) -> None:
    """Write the generated tokens as text: amber where the margin is small, red from the first difference on."""
    spans = [
        f'<span style="{_token_style(token, bits_differ_at, tokens_differ_at)}" title="{_token_title(token)}">'
        f"{_token_text(token)}</span>"
        for token in tokens
    ]
    st.html(f'<div class="rl-tokens">{"".join(spans)}</div>')


def token_legend(*, compared: bool) -> None:
    """Explain the colours of the token strip."""
    parts = [f"{badge('small margin', WAITING)} could have become another token"]
    if compared:
        parts.append(f'<span style="border-bottom:2px dotted {DIVERGED}">underlined</span> the bits differ, same token')
        parts.append(f"{badge('red', DIVERGED)} another token")
    st.html(f'<div class="rl-legend">{" &nbsp; ".join(parts)} &nbsp; point at a token for its numbers</div>')


def _scrolling(rows: str) -> None:
    """Write a table that scrolls by itself where the window is too narrow for it."""
    st.html(f'<div class="rl-scroll"><table class="rl-table">{rows}</table></div>')


def _token_style(token: TokenRow, bits_differ_at: int | None, tokens_differ_at: int | None) -> str:
    if tokens_differ_at is not None and token.index >= tokens_differ_at:
        strength = 0.32 if token.index == tokens_differ_at else 0.1
        outline = f";outline:2px solid {DIVERGED}" if token.index == tokens_differ_at else ""
        return f"background:{tint(DIVERGED, strength)}{outline}"
    strength = 0.0 if token.margin is None else max(0.0, 0.5 * (1 - token.margin / 2))
    colour = tint(WAITING, round(strength, 2)) if strength > 0.02 else tint(ACCENT, 0.05)
    under = (
        f";border-bottom:2px dotted {DIVERGED}" if bits_differ_at is not None and token.index >= bits_differ_at else ""
    )
    return f"background:{colour}{under}"


def _token_title(token: TokenRow) -> str:
    lines = [f"token {token.index}: id {token.token}"]
    if token.logprob is not None:
        lines.append(f"log-probability {token.logprob:.4f}")
    lines.append("only one token was allowed" if token.margin is None else f"margin {token.margin:.4g}")
    if token.step is not None:
        lines.append(f"engine step {token.step}")
    if token.logits_digest:
        lines.append(f"logits {token.logits_digest[:12]}")
    return escape("\n".join(lines), quote=True)


def _token_text(token: TokenRow) -> str:
    if token.text is None:
        return escape(f"[{token.token}]")
    return escape(token.text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") or "\N{MIDDLE DOT}"

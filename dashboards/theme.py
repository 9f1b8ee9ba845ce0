"""Which colour means what?  One language for every page and chart.

A stage keeps its colour everywhere.  Full colour is the critical path, a tint is time that something else covered.
Red is kept for one meaning: here something failed or parted from its recording.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

STAGE_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "a01": "#1E3A8A",
        "a02": "#1D4ED8",
        "a03": "#3B82F6",
        "a04": "#0891B2",
        "a05": "#0D9488",
        "a06": "#6D28D9",
        "a07": "#A16207",
        "a08": "#65A30D",
        "a09": "#EA580C",
        "b01": "#64748B",
        "b02": "#0284C7",
        "b03": "#0D9488",
        "b04": "#F59E0B",
        "b05": "#4F46E5",
        "b06": "#9333EA",
        "b07": "#16A34A",
        "b08": "#A3A30B",
        "b09": "#92705A",
        "b10": "#1E293B",
    }
)
"""Stage code to colour: control in slate and blue, waiting in amber, the model in indigo and violet, tools in green."""

GAP = "#CBD5E1"
"""Time that no stage claims."""
DIVERGED = "#DC2626"
SAME = "#059669"
WAITING = "#D97706"
QUIET = "#64748B"
ACCENT = "#4F46E5"
INK = "#0F172A"

STATUS_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "ok": SAME,
        "exact": SAME,
        "within_tolerance": SAME,
        "partial": WAITING,
        "degraded": WAITING,
        "review": WAITING,
        "unverified": WAITING,
        "running": WAITING,
        "cancelled": WAITING,
        "error": DIVERGED,
        "failed": DIVERGED,
        "rejected": DIVERGED,
        "diverged": DIVERGED,
        "refused": WAITING,
    }
)
"""Status or verdict to colour; what is not here is shown quietly."""

STREAMLIT_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "theme.base": "light",
        "theme.primaryColor": ACCENT,
        "theme.backgroundColor": "#FFFFFF",
        "theme.secondaryBackgroundColor": "#F5F6FA",
        "theme.textColor": INK,
        "theme.borderColor": "#E2E8F0",
        "theme.baseRadius": "6px",
        "theme.baseFontSize": "15",
    }
)
"""Options that give Streamlit's own widgets the same look."""


def stage_colour(code: str) -> str:
    """Return the colour of a stage code; a quiet grey for what is no stage."""
    return STAGE_COLOURS.get(code, GAP)


def status_colour(status: str | None) -> str:
    """Return the colour of a status or verdict."""
    return STATUS_COLOURS.get(status or "", QUIET)


def tint(colour: str, share: float) -> str:
    """Return a colour let through by `share` of its strength, as ``rgba(...)``.

    Args:
        colour: ``#RRGGBB``.
        share: from 0 (nothing) to 1 (the colour itself).
    """
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share:g})"

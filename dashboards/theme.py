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
        "queue": "#F59E0B",
        "batch": "#0D9488",
        "compute": "#4F46E5",
        "delivery": "#1E293B",
    }
)
"""Stage code, or part of a one-shot request, to colour.

Control in slate and blue, waiting in amber, the model in indigo and violet, tools in green.
"""

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

MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">'
    '<rect width="32" height="32" rx="7" fill="#4F46E5"/>'
    '<rect x="6" y="8" width="9" height="4" rx="1" fill="#F59E0B"/>'
    '<rect x="12" y="14" width="14" height="4" rx="1" fill="#FFFFFF"/>'
    '<rect x="18" y="20" width="8" height="4" rx="1" fill="#A7F3D0"/></svg>'
)
"""The product's mark: three bars of a waterfall; drawn here, because an icon by name would be fetched from afar."""

NAME = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 190 32" width="190" height="32">'
    '<rect width="32" height="32" rx="7" fill="#4F46E5"/>'
    '<rect x="6" y="8" width="9" height="4" rx="1" fill="#F59E0B"/>'
    '<rect x="12" y="14" width="14" height="4" rx="1" fill="#FFFFFF"/>'
    '<rect x="18" y="20" width="8" height="4" rx="1" fill="#A7F3D0"/>'
    '<text x="43" y="23" font-family="Source Sans, sans-serif" font-size="22" font-weight="700" fill="#0F172A">'
    "Replaylab</text></svg>"
)

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

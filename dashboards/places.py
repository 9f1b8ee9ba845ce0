"""Where does a page lead?  The pages by name, and how one of them opens another."""

from __future__ import annotations

from typing import Any, NoReturn
from urllib.parse import urlencode

import streamlit as st

PAGES = "pages"
"""Key of the session's pages, by name."""


def remember(pages: dict[str, Any]) -> None:
    """Keep this session's pages, so that a page can open another one without importing it."""
    st.session_state[PAGES] = pages


def open_request(run_id: str, request_ref: str) -> NoReturn:
    """Go to one request."""
    _open("request", {"run": run_id, "request": request_ref})


def open_comparison(left: tuple[str, str], right: tuple[str, str]) -> NoReturn:
    """Go to two requests side by side; each is (run, request)."""
    _open("compare", _sides(left, right))


def comparison_address(left: tuple[str, str], right: tuple[str, str]) -> str:
    """Return the address of two requests side by side, relative to any page."""
    return "compare?" + urlencode(_sides(left, right))


def open_run(run_id: str) -> NoReturn:
    """Go to one run."""
    _open("runs", {"run": run_id})


def chosen(name: str) -> str | None:
    """Return a query parameter, None when it is absent or empty."""
    return st.query_params.get(name) or None


def _sides(left: tuple[str, str], right: tuple[str, str]) -> dict[str, str]:
    return {"left_run": left[0], "left": left[1], "right_run": right[0], "right": right[1]}


def _open(name: str, parameters: dict[str, str]) -> NoReturn:
    st.switch_page(st.session_state[PAGES][name], query_params=parameters)

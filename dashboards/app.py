"""Which pages are there?  The entry that Streamlit runs."""

from __future__ import annotations

from html import escape

import streamlit as st

from dashboards import ledger, places
from dashboards.parts import callout
from dashboards.theme import DIVERGED, MARK, NAME
from dashboards.views import compare, request, runs
from dashboards.words import count
from traces.failures import ClassifiedError


def main() -> None:
    """Set up the frame, the navigation and the side bar, then run the chosen page."""
    st.set_page_config(page_title="Replaylab", page_icon=MARK, layout="wide")
    st.logo(NAME, size="large", icon_image=MARK)
    pages = {
        "runs": st.Page(runs.show, title="Runs", icon=":material/list:", default=True),
        "request": st.Page(request.show, title="Request", url_path="request", icon=":material/timeline:"),
        "compare": st.Page(compare.show, title="Compare", url_path="compare", icon=":material/compare_arrows:"),
    }
    places.remember(pages)
    chosen = st.navigation(list(pages.values()))
    try:
        with st.sidebar:
            _sidebar()
        chosen.run()
    except ClassifiedError as error:
        callout(f"<b>The ledger cannot be read.</b> {escape(str(error))}", DIVERGED)


def _sidebar() -> None:
    """Say which ledger is open and how much it holds."""
    path = ledger.ledger_path()
    st.caption("Ledger")
    st.code(path.name or str(path), language=None)
    if ledger.exists(path):
        found = ledger.runs(path)
        requests = sum(row.requests for row in found)
        st.caption(f"{count(len(found), 'run')}, {count(requests, 'request')}")
    waiting = ledger.pending(path)
    if waiting:
        st.caption(f"{count(waiting, 'event')} wait for a drain: `{ledger.command(path, 'replaylab ledger drain')}`")
    if st.button("Read again", icon=":material/refresh:", help="Pages read the ledger anew after every write to it."):
        st.cache_resource.clear()
        st.rerun()


if __name__ == "__main__":
    main()

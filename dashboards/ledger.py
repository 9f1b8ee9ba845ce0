"""What does the ledger say, for a page?  Cached, read-only access that never drains and never holds the writer up.

A drain keeps the database to itself for a moment; the ledger's own reading waits for it and tries again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards.one_shot import CALLED, ENDED, OneShot, read_one_shot, with_ends
from dashboards.overview import latency_rows, request_rows, run_rows, verdict_rows
from dashboards.rows import LatencyRow, RequestRow, RunRow, VerdictRow
from dashboards.story import ENDS, RequestStory, StageRun, stage_runs, tell
from traces.envelope import TraceEvent
from traces.ledger import queries
from traces.ledger.layout import LedgerLayout, default_ledger
from traces.ledger.ledger import Ledger

ONE_SHOT_ENDS = (ENDED, "replay.verdict")
"""What ends requests that pass no stages."""
Freshness = tuple[int, ...]
"""Changes whenever something was written: part of every cache key."""


def ledger_path() -> Path:
    """Return the ledger's folder as the command that started the pages named it."""
    return default_ledger()


def exists(path: Path) -> bool:
    """Say whether anything was ever recorded here and drained, so that it can be read."""
    return Ledger(path).layout.database.is_file()


def freshness(path: Path) -> Freshness:
    """Return times and sizes of what readers read."""
    layout = LedgerLayout(path)
    files = [layout.database, *sorted(layout.outbox.glob("*"))]
    stamps: list[int] = []
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        stamps += [status.st_mtime_ns, status.st_size]
    return tuple(stamps)


def runs(path: Path) -> list[RunRow]:
    """Return all runs, newest first."""
    return _runs(str(path), freshness(path))


def requests(path: Path, run_id: str) -> list[RequestRow]:
    """Return the requests of a run in order of arrival."""
    return _requests(str(path), freshness(path), run_id)


def story(path: Path, run_id: str, request_ref: str) -> RequestStory | None:
    """Return one request of one run; None when the ledger has no event of it."""
    return _story(str(path), freshness(path), run_id, request_ref)


def steps(path: Path, run_id: str) -> list[TraceEvent]:
    """Return the engine steps of a run in recorded order."""
    return _steps(str(path), freshness(path), run_id)


def one_shots(path: Path, run_id: str) -> list[OneShot]:
    """Return the one-shot requests of a run; none where a language model answered."""
    return _one_shots(str(path), freshness(path), run_id)


def calls(path: Path, run_id: str) -> list[TraceEvent]:
    """Return the calls in which a one-shot model answered a run's requests."""
    return _calls(str(path), freshness(path), run_id)


def stage_latency(path: Path, run_id: str) -> list[LatencyRow]:
    """Return how long each stage took over all requests of a run."""
    return _stage_latency(str(path), freshness(path), run_id)


def preparation(path: Path, run_id: str) -> tuple[StageRun, ...]:
    """Return the preparation stages that a run went through; none for a run that prepared nothing."""
    return _preparation(str(path), freshness(path), run_id)


def verdicts(path: Path) -> list[VerdictRow]:
    """Return every replay verdict of the ledger."""
    return _verdicts(str(path), freshness(path))


def pending(path: Path) -> int:
    """Return how many recorded events wait for a drain, and so are on no page yet."""
    return Ledger(path).pending()


def reader(path: Path) -> Callable[[str], bytes]:
    """Return the function that reads evidence by reference, digest verified."""
    return Ledger(path).read_blob


def token_text(path: Path, pins: Mapping[str, Mapping[str, Any]] | None) -> Callable[[int], str | None]:
    """Return token id to text by the tokenizer of the package that the pins name, where its digest still fits."""
    artifact = (pins or {}).get("artifact", {})
    table = _token_table(str(path), str(artifact.get("package_digest")), str(artifact.get("tokenizer_digest")))
    return table.get


@st.cache_resource(max_entries=8, show_spinner=False)
def _runs(path: str, fresh: Freshness) -> list[RunRow]:
    ledger = Ledger(path)
    told = ledger.events(event_type=("run.started", "run.completed"))
    return run_rows(ledger.runs(), told, with_ends(ledger.requests(), ledger.events(event_type=ONE_SHOT_ENDS)))


@st.cache_resource(max_entries=64, show_spinner=False)
def _requests(path: str, fresh: Freshness, run_id: str) -> list[RequestRow]:
    ledger = Ledger(path)
    rows = with_ends(ledger.requests(run_id), ledger.events(run_id=run_id, event_type=ONE_SHOT_ENDS))
    return request_rows(rows, ledger.events(run_id=run_id, event_type="stage.completed"))


@st.cache_resource(max_entries=64, show_spinner=False)
def _story(path: str, fresh: Freshness, run_id: str, request_ref: str) -> RequestStory | None:
    ledger = Ledger(path)
    events = ledger.events(run_id=run_id, request_ref=request_ref)
    return tell(events, ledger.read_blob) if events else None


@st.cache_resource(max_entries=32, show_spinner=False)
def _steps(path: str, fresh: Freshness, run_id: str) -> list[TraceEvent]:
    return Ledger(path).events(run_id=run_id, event_type="engine.step")


@st.cache_resource(max_entries=32, show_spinner=False)
def _one_shots(path: str, fresh: Freshness, run_id: str) -> list[OneShot]:
    return [read_one_shot(event) for event in Ledger(path).events(run_id=run_id, event_type=ENDED)]


@st.cache_resource(max_entries=32, show_spinner=False)
def _calls(path: str, fresh: Freshness, run_id: str) -> list[TraceEvent]:
    return Ledger(path).events(run_id=run_id, event_type=CALLED)


@st.cache_resource(max_entries=32, show_spinner=False)
def _stage_latency(path: str, fresh: Freshness, run_id: str) -> list[LatencyRow]:
    return latency_rows(Ledger(path).rows(queries.STAGE_LATENCY, {"run_id": run_id}))


@st.cache_resource(max_entries=32, show_spinner=False)
def _preparation(path: str, fresh: Freshness, run_id: str) -> tuple[StageRun, ...]:
    events = Ledger(path).events(run_id=run_id, event_type=("stage.started", *ENDS))
    found = sorted(
        (event for event in events if event.stage is not None and event.stage.track == "A"),
        key=lambda event: (event.ts_us, event.outbox_seq),
    )
    return stage_runs(found, origin=found[0]) if found else ()


@st.cache_resource(max_entries=8, show_spinner=False)
def _verdicts(path: str, fresh: Freshness) -> list[VerdictRow]:
    ledger = Ledger(path)
    return verdict_rows(ledger.events(event_type="replay.verdict"), ledger.events(event_type="run.started"))


@st.cache_resource(max_entries=16, show_spinner=False)
def _token_table(path: str, package_digest: str, tokenizer_digest: str) -> Mapping[int, str]:
    """Read a package's tokenizer; nothing when it is not there or is not the one that was pinned."""
    from manifests.canonical import digest

    file = Path(path) / "packages" / package_digest.replace(":", "-") / "tokenizer.json"
    if not package_digest.startswith("sha256:") or not file.is_file():
        return {}
    data = file.read_bytes()
    if digest(data) != tokenizer_digest:
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    return {number: tokenizer.decode([number], skip_special_tokens=False) for number in tokenizer.get_vocab().values()}


def command(path: Path, words: str) -> str:
    """Say a command with this ledger, as a person would type it."""
    return words if path == default_ledger() and "REPLAYLAB_LEDGER" not in os.environ else f"{words} --ledger {path}"

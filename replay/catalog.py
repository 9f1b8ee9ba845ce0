"""What ran, and which recording does a short id mean?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from replay.errors import UnknownRecording

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run of any kind.

    kind        live, replay or preparation
    started_us  UTC epoch microseconds
    ended_us    None while it runs, or when it died
    requests    requests that were accepted
    outcomes    terminal status to how often
    verdicts    of a replay: verdict to how often
    parent      of a replay: the run whose requests were run again
    subject     of a preparation: model, backend and precision
    """

    run_id: str
    kind: str
    started_us: int
    ended_us: int | None = None
    requests: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict[str, int])
    verdicts: Mapping[str, int] = field(default_factory=dict[str, int])
    parent: str | None = None
    mode: str | None = None
    workload: str | None = None
    subject: str | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay list --json` prints."""
        return {
            "run": self.run_id,
            "kind": self.kind,
            "started_us": self.started_us,
            "ended_us": self.ended_us,
            "requests": self.requests,
            "outcomes": dict(self.outcomes),
            "verdicts": dict(self.verdicts),
            "parent": self.parent,
            "mode": self.mode,
            "workload": self.workload,
            "subject": self.subject,
        }


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """One request of one run; status None when it never ended."""

    run_id: str
    request_ref: str
    accepted_us: int
    status: str | None = None
    failure_class: str | None = None
    duration_us: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    route: str | None = None
    verdict: str | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form that `replay list RUN --json` prints."""
        return {
            "run": self.run_id,
            "request": self.request_ref,
            "accepted_us": self.accepted_us,
            "status": self.status,
            "failure_class": self.failure_class,
            "duration_us": self.duration_us,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "route": self.route,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an id on the command line stands for: a whole run, or one request of a run."""

    run_id: str
    request_ref: str | None = None


RUN_EVENTS = (
    "run.started",
    "run.completed",
    "request.accepted",
    "request.terminal",
    "replay.verdict",
    "oneshot.request",
)
"""A one-shot request is one event, written when it ends."""


def list_runs(ledger: Ledger) -> list[RunSummary]:
    """Return every run in the ledger, newest first."""
    by_type = _by_type(ledger.events(event_type=RUN_EVENTS))
    accepted, terminal = (
        _by_run([*by_type[name], *by_type["oneshot.request"]]) for name in ("request.accepted", "request.terminal")
    )
    verdicts, completed = _by_run(by_type["replay.verdict"]), _by_run(by_type["run.completed"])
    runs: list[RunSummary] = []
    for event in by_type["run.started"]:
        run_id = event.run_id
        ends = completed.get(run_id, [])
        runs.append(
            RunSummary(
                run_id=run_id,
                kind=kind_of(event),
                started_us=event.ts_us,
                ended_us=ends[-1].ts_us if ends else None,
                requests=len(accepted.get(run_id, [])),
                outcomes=_outcomes(event, terminal.get(run_id, []), ends),
                verdicts=Counter(str(one.payload.get("verdict")) for one in verdicts.get(run_id, [])),
                parent=event.payload.get("parent_run"),
                mode=event.payload.get("mode"),
                workload=event.payload.get("workload"),
                subject=_subject(event),
            )
        )
    return sorted(runs, key=lambda run: run.started_us, reverse=True)


def _outcomes(started: TraceEvent, terminal: list[TraceEvent], ends: list[TraceEvent]) -> Counter[str]:
    """Count how requests ended, or say how a preparation did."""
    counted = terminal if kind_of(started) != "preparation" else ends[-1:]
    return Counter(str(end.status or "unknown") for end in counted)


def _subject(started: TraceEvent) -> str | None:
    """Say what a preparation prepared."""
    if kind_of(started) != "preparation" and started.payload.get("of") != "preparation":
        return None
    return " ".join(str(started.payload[name]) for name in ("model", "backend", "precision") if name in started.payload)


def list_requests(ledger: Ledger, run_id: str) -> list[RequestSummary]:
    """Return the requests of a run in order of arrival."""
    by_type = _by_type(ledger.events(run_id=run_id, event_type=RUN_EVENTS))
    ends = {event.request_ref: event for event in by_type["request.terminal"]}
    verdicts = {event.request_ref: event for event in by_type["replay.verdict"]}
    found: list[RequestSummary] = []
    for event in by_type["request.accepted"]:
        if event.request_ref is None:
            continue
        end, verdict = ends.get(event.request_ref), verdicts.get(event.request_ref)
        found.append(
            RequestSummary(
                run_id=run_id,
                request_ref=event.request_ref,
                accepted_us=event.ts_us,
                status=end.status if end else None,
                failure_class=end.failure_class.value if end and end.failure_class else None,
                duration_us=(end.duration_us if end.duration_us is not None else end.ts_us - event.ts_us)
                if end
                else None,
                input_tokens=end.input_tokens if end else None,
                output_tokens=end.output_tokens if end else None,
                route=end.model_route if end else None,
                verdict=verdict.payload.get("verdict") if verdict else None,
            )
        )
    one_shot = sorted(by_type["oneshot.request"], key=lambda event: int(event.payload["index"]))
    return [*sorted(found, key=lambda request: request.accepted_us), *map(_one_shot, one_shot)]


def _one_shot(event: TraceEvent) -> RequestSummary:
    """Summarize a one-shot request, which arrived as long ago as it took."""
    return RequestSummary(
        run_id=event.run_id,
        request_ref=str(event.request_ref),
        accepted_us=event.ts_us - (event.duration_us or 0),
        status=event.status,
        failure_class=event.failure_class.value if event.failure_class else None,
        duration_us=event.duration_us,
    )


def last_incident(ledger: Ledger) -> Target | None:
    """Return the newest incident, or None when all is well.

    An incident is a live or one-shot request that did not end well, or a faithful replay under unchanged pins that
    diverged: what was changed on purpose, or run alone, may well differ.  A replay of a one-shot request keeps no
    more than a verdict, so its incident is the request that it replayed.
    """
    wanted = ("run.started", "request.terminal", "oneshot.request", "replay.verdict")
    by_type = _by_type(ledger.events(event_type=wanted))
    ended = [*by_type["request.terminal"], *by_type["oneshot.request"]]
    replays = {event.run_id: event for event in by_type["run.started"] if kind_of(event) == "replay"}
    bad = [event for event in ended if event.status != "ok" and event.run_id not in replays]
    for event in by_type["replay.verdict"]:
        started = replays.get(event.run_id)
        on_purpose = started is not None and (started.payload.get("set") or started.payload.get("mode") != "faithful")
        if event.payload.get("verdict") == "diverged" and not on_purpose:
            bad.append(event)
    newest = max((event for event in bad if event.request_ref), key=lambda event: event.ts_us, default=None)
    if newest is None:
        return None
    started = replays.get(newest.run_id)
    verdict_only = started is not None and started.payload.get("of") == "inference"
    home = str(started.payload["parent_run"]) if started is not None and verdict_only else newest.run_id
    return Target(run_id=home, request_ref=newest.request_ref)


def resolve(ledger: Ledger, text: str) -> Target:
    """Return what a whole id or its beginning means; a request's id means its live run, not a replay of it.

    `RUN/REQUEST` names a request of one particular run, such as a replay.
    """
    run_text, slash, request_text = text.partition("/")
    by_type = _by_type(
        ledger.events(event_type=("run.started", "request.accepted", "request.terminal", "oneshot.request"))
    )
    runs = {event.run_id: event for event in by_type["run.started"]}
    known = [*by_type["request.accepted"], *by_type["request.terminal"], *by_type["oneshot.request"]]
    if slash:
        run_id = _one(run_text, runs, what="run")
        inside = [event.request_ref for event in known if event.run_id == run_id]
        return Target(run_id=run_id, request_ref=_one(request_text, filter(None, inside), what="request of this run"))
    homes: dict[str, str] = {}
    for event in known:
        if event.request_ref is None:
            continue
        replayed = event.run_id in runs and kind_of(runs[event.run_id]) == "replay"
        if not replayed or event.request_ref not in homes:
            homes[event.request_ref] = event.run_id
    found = _one(text, [*runs, *homes], what="run or request")
    if found in homes:
        return Target(run_id=homes[found], request_ref=found)
    return Target(run_id=found)


def kind_of(started: TraceEvent) -> str:
    """Return live, replay or preparation from a run's first event."""
    if started.payload.get("parent_run"):
        return "replay"
    return str(started.payload.get("kind") or ("preparation" if started.track == "A" else "live"))


def short(identity: str, length: int = 16) -> str:
    """Return the beginning of an id as shown in tables: the time part of a UUIDv7 and some of its randomness."""
    prefix, _, rest = identity.partition("_")
    return f"{prefix}_{rest[:length]}" if rest else identity[:length]


def _one(text: str, known: Iterable[str], *, what: str) -> str:
    """Return the one known id that equals or begins with `text`; UnknownRecording when none or several do."""
    candidates = sorted(set(known))
    if text in candidates:
        return text
    begins = [name for name in candidates if text and name.startswith(text)]
    begins = begins or [name for name in candidates if text and name.partition("_")[2].startswith(text)]
    if len(begins) == 1:
        return begins[0]
    if not begins:
        raise UnknownRecording(f"no {what} has an id that begins with {text!r}", fix="List what there is: replay list")
    shown = ", ".join(begins[:4]) + (", ..." if len(begins) > 4 else "")
    raise UnknownRecording(f"{text!r} means {len(begins)} recordings: {shown}", fix="Give more of the id.")


def _by_type(events: Iterable[TraceEvent]) -> dict[str, list[TraceEvent]]:
    """Group events by their type; every type that a run's summary needs is there."""
    grouped: dict[str, list[TraceEvent]] = {name: [] for name in RUN_EVENTS}
    for event in events:
        grouped[event.event_type].append(event)
    return grouped


def _by_run(events: Iterable[TraceEvent]) -> dict[str, list[TraceEvent]]:
    """Group events by their run, order kept."""
    grouped: dict[str, list[TraceEvent]] = {}
    for event in events:
        grouped.setdefault(event.run_id, []).append(event)
    return grouped

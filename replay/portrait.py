"""What is there to see of one recorded request?  One document for the terminal, for JSON and for comparing two."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from eval.latency import Decomposition, decompose
from replay.generations import RecordedSequence, load_plans, load_sequences
from replay.preparation_comparison import portray_package
from replay.records import RecordedRequest, span_records, stage_records
from traces.failures import EvidenceError
from traces.stages import Stage

if TYPE_CHECKING:
    from runtime.engine.plan import StepPlan
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger


def portrait(ledger: Ledger, request: RecordedRequest) -> dict[str, Any]:
    """Return everything worth showing of a request as JSON values; times are microseconds from its first stage."""
    terminal = request.terminal
    read = _reader(ledger)
    response = read(terminal.result_ref) if terminal is not None else None
    return {
        "run": request.run_id,
        "request": request.request_ref,
        "status": terminal.status if terminal else None,
        "failure": _failure(terminal),
        "duration_us": terminal.duration_us if terminal else None,
        "route": (response or {}).get("route"),
        "question": _question(request),
        "answer": (response or {}).get("result"),
        "citations": (response or {}).get("citations", []),
        "tools": (response or {}).get("tools", []),
        "waterfall": waterfall(request),
        "pins": None if request.pins is None else request.pins.to_documents(),
        "manifest": request.manifest_digest,
        "preparation": portray_package(ledger, None if request.pins is None else request.pins.artifact.package_digest),
        "generations": _generations(ledger, request),
        "effects": _effects(request.events),
        "verdict": _verdict(request, read),
    }


def waterfall(request: RecordedRequest) -> list[dict[str, Any]]:
    """Return the request's stages in order of start, with the part of each that lay on the critical path."""
    spans = span_records(request.events)
    if not spans:
        return []
    taken: Decomposition = decompose(spans)
    status = {(stage.stage, stage.end_us): stage for stage in stage_records(request.events)}
    rows: list[dict[str, Any]] = []
    for item in taken.spans:
        span = item.span
        stage = status.get((span.stage or "", span.end_us))
        rows.append(
            {
                "stage": span.stage,
                "name": span.name,
                "attempt": stage.attempt if stage else 1,
                "start_us": span.start_us - taken.start_us,
                "duration_us": item.inclusive_us,
                "critical_us": item.critical_us,
                "status": stage.status if stage else None,
                "decision": stage.decision if stage else None,
            }
        )
    if taken.uncovered_us:
        rows.append({"stage": None, "name": "between stages", "attempt": 1, "start_us": None, "duration_us": None,
                     "critical_us": taken.uncovered_us, "status": None, "decision": None})  # fmt: skip
    return rows


def critical_by_stage(request: RecordedRequest) -> dict[str, int]:
    """Return critical microseconds by stage word; they sum to the request's end-to-end time."""
    spans = span_records(request.events)
    if not spans:
        return {}
    words = {stage.value: stage.word for stage in Stage}
    return {words.get(name, name): us for name, us in decompose(spans).by_stage().items()}


def _generations(ledger: Ledger, request: RecordedRequest) -> list[dict[str, Any]]:
    sequences = load_sequences(ledger, request.events)
    read_cached = any(one.result is not None and one.result.cached_tokens for one in sequences)
    steps = ledger.events(run_id=request.run_id, event_type="engine.step") if read_cached else []
    plans = load_plans(steps)
    return [
        _generation(sequence) | {"cached_from": cached_from(plans.get(sequence.engine_id, ()), sequence.index)}
        for sequence in sequences
    ]


def cached_from(plans: Iterable[StepPlan], index: int) -> list[dict[str, Any]]:
    """Return the blocks that a sequence read from the cache when it first ran, and the steps that computed them.

    `own` says whether it had computed the block itself; None where that step was not recorded.
    """
    by_step = {plan.step: plan for plan in plans}
    admissions = (one for plan in by_step.values() for one in plan.admissions if one.sequence == index)
    first = next(admissions, None)
    found: list[dict[str, Any]] = []
    for hit in () if first is None else first.hits:
        plan = by_step.get(hit.step)
        own = None if plan is None else plan.calls[hit.call].sequences[hit.row] == index
        found.append({"block": hit.block, "step": hit.step, "own": own})
    return found


def _generation(sequence: RecordedSequence) -> dict[str, Any]:
    result, request = sequence.result, sequence.request
    records = () if result is None else result.records
    margins = [record.margin for record in records if record.margin is not None]
    smallest = min(margins, default=None)
    count = len(records)
    return {
        "sequence": sequence.sequence_id,
        "engine": sequence.engine_id,
        "prompt_tokens": None if request is None else len(request.prompt),
        "cached_tokens": None if result is None else result.cached_tokens,
        "output_tokens": None if result is None else len(result.tokens),
        "finish_reason": None if result is None else result.finish_reason,
        "queue_us": None if result is None else result.queue_us,
        "first_token_us": None if result is None else result.first_token_us,
        "per_token_us": None if result is None or count < 2 else result.decode_us // (count - 1),
        "steps": 0 if result is None else len(result.steps),
        "first_step": result.steps[0] if result is not None and result.steps else None,
        "preemptions": 0 if result is None else result.preemptions,
        "latency": None if result is None or result.latency is None else msgspec.structs.asdict(result.latency),
        "smallest_margin": smallest,
        "smallest_margin_at": next((at for at, one in enumerate(records) if margins and one.margin == smallest), None),
        "tokens": [] if result is None else list(result.tokens),
    }


def _effects(events: tuple[TraceEvent, ...]) -> dict[str, int]:
    """Count the effects by kind."""
    counted: dict[str, int] = {}
    for event in events:
        if event.event_type == "effect.performed" and event.payload.get("phase") == "performed":
            kind = str(event.payload["kind"])
            counted[kind] = counted.get(kind, 0) + 1
    return counted


def _failure(terminal: TraceEvent | None) -> dict[str, Any] | None:
    if terminal is None or terminal.failure_class is None:
        return None
    payload = terminal.payload
    return {
        "failure_class": terminal.failure_class.value,
        "error_type": terminal.error_type,
        "stage": payload.get("stage"),
        "message": payload.get("message"),
        "fix": payload.get("fix"),
        "retry_decision": terminal.retry_decision,
        "evidence": payload.get("evidence"),
    }


def _question(request: RecordedRequest) -> str | None:
    """Return what was asked, from the request's own envelope."""
    if request.envelope is None:
        return None
    task: Mapping[str, Any] = json.loads(request.envelope)["task"]
    if task["kind"] == "support":
        return str(task["question"])
    return f"({len(task['prompt_tokens'])} prompt tokens)"


def _verdict(request: RecordedRequest, read: Callable[[str | None], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the verdict when this is a replay."""
    found = request.of_type("replay.verdict")
    if not found:
        return None
    return read(found[-1].result_ref) or dict(found[-1].payload)


def _reader(ledger: Ledger) -> Callable[[str | None], dict[str, Any] | None]:
    """Return a function that reads a JSON document, or None where it was erased."""

    def read(reference: str | None) -> dict[str, Any] | None:
        if reference is None:
            return None
        try:
            return json.loads(ledger.read_blob(reference))
        except EvidenceError:
            return None

    return read

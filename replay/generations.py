"""What did the engine record of a request's generations: prompts, tokens, evidence, and the shapes they ran in?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.records import GenerationRecord, TokenRecord
from manifests.canonical import digest
from runtime.engine.errors import SequenceRefused
from runtime.engine.generation import GenerationRequest, GenerationResult, decode_request, decode_result
from runtime.engine.plan import SequenceEntry, StepPlan, decode_plan

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger

Shape = list[Any]
"""Of one row in one call: graph, padded batch, padded tokens, padded context, place, start, count."""


@dataclass(frozen=True, kw_only=True)
class RecordedSequence:
    """One generation as an engine recorded it.

    engine_id  the engine that ran it; plans count sequences per engine
    index      its index in that engine's plans
    request    what was asked of the engine; None when its evidence is gone
    result     how it ended; None when the end was never recorded
    """

    sequence_id: str
    engine_id: str
    index: int
    request: GenerationRequest | None
    result: GenerationResult | None


def load_sequences(ledger: Ledger, events: Iterable[TraceEvent]) -> tuple[RecordedSequence, ...]:
    """Read the generations of one request from its `engine.sequence` events, in the order of admission."""
    admitted: dict[tuple[str, int], TraceEvent] = {}
    finished: dict[tuple[str, int], TraceEvent] = {}
    for event in events:
        if event.event_type != "engine.sequence":
            continue
        key = (event.engine_id or "", int(event.payload["index"]))
        (admitted if event.payload["phase"] == "admitted" else finished)[key] = event
    found: list[RecordedSequence] = []
    for key in dict.fromkeys([*admitted, *finished]):
        begin, end = admitted.get(key), finished.get(key)
        request = ledger.read_blob(begin.input_ref) if begin is not None and begin.input_ref else None
        result = ledger.read_blob(end.result_ref) if end is not None and end.result_ref else None
        known = begin or end
        if known is None:
            continue
        found.append(
            RecordedSequence(
                sequence_id=str(known.payload["sequence_id"]),
                engine_id=key[0],
                index=key[1],
                request=None if request is None else decode_request(request),
                result=None if result is None else decode_result(result),
            )
        )
    return tuple(found)


def load_refusals(events: Iterable[TraceEvent]) -> dict[str, SequenceRefused]:
    """Return the refusals of a request's generations that no engine took, by sequence id, as they were raised."""
    return {
        str(event.payload["sequence_id"]): SequenceRefused(
            str(event.payload["message"]),
            reason=str(event.payload["error_type"]),
            evidence=dict(event.payload["evidence"]),
            fix=event.payload["fix"],
        )
        for event in events
        if event.event_type == "engine.refused"
    }


def load_plans(events: Iterable[TraceEvent]) -> dict[str, tuple[StepPlan, ...]]:
    """Return the step plans of each engine of a run, ascending by step."""
    plans: dict[str, list[StepPlan]] = {}
    for event in events:
        if event.event_type == "engine.step":
            plans.setdefault(event.engine_id or "", []).append(decode_plan(event.payload["plan"]))
    return {engine: tuple(sorted(found, key=lambda plan: plan.step)) for engine, found in plans.items()}


def load_sequence_tables(events: Iterable[TraceEvent]) -> dict[str, tuple[SequenceEntry, ...]]:
    """Return each engine's sequence table: which request a sequence index of its plans stands for."""
    tables: dict[str, dict[int, SequenceEntry]] = {}
    for event in events:
        if event.event_type == "engine.sequence":
            index = int(event.payload["index"])
            entry = SequenceEntry(index, str(event.payload["sequence_id"]), event.request_ref)
            tables.setdefault(event.engine_id or "", {})[index] = entry
    return {engine: tuple(entries[index] for index in sorted(entries)) for engine, entries in tables.items()}


def shapes_by_token(plans: Iterable[StepPlan], index: int, steps: Sequence[int]) -> list[list[Shape]]:
    """Return for each output token of a sequence the shapes that it went through since its previous token.

    Args:
        plans: the plans of its engine.
        index: its index in them.
        steps: engine steps that it was a row of, ascending.
    """
    wanted = frozenset(steps)
    since: list[Shape] = []
    tokens: list[list[Shape]] = []
    for plan in plans:
        if plan.step not in wanted:
            continue
        for call in plan.calls:
            for place, row in enumerate(call.rows):
                if row.sequence != index:
                    continue
                since.append([call.graph, call.batch, call.tokens, call.context, place, row.start, row.count])
                if row.sample:
                    tokens.append(since)
                    since = []
    return tokens


def generation_record(
    request: GenerationRequest | None, result: GenerationResult | None, shapes: Sequence[Sequence[Shape]] = ()
) -> GenerationRecord:
    """Return what eval judges of one generation; tokens without a known shape carry no schedule digest."""
    prompt = None if request is None else digest(list(request.prompt))
    if result is None:
        return GenerationRecord(prompt_digest=prompt)
    tokens = tuple(
        TokenRecord(
            token=record.token,
            logits_digest=record.logits_digest,
            logprob=record.logprob,
            margin=record.margin,
            step=record.step,
            position=record.position,
            schedule_digest=digest(list(shapes[place])) if place < len(shapes) else None,
            emitted_us=record.emitted_us,
        )
        for place, record in enumerate(result.records)
    )
    return GenerationRecord(
        prompt_digest=prompt,
        tokens=tokens,
        finish_reason=result.finish_reason,
        sequence_id=result.sequence_id,
        queue_us=result.queue_us,
        prefill_us=result.prefill_us,
        decode_us=result.decode_us,
    )


def recorded_generations(
    sequences: Iterable[RecordedSequence], plans: Mapping[str, Sequence[StepPlan]]
) -> tuple[GenerationRecord, ...]:
    """Return what eval judges of the recorded generations of one request, in order."""
    records: list[GenerationRecord] = []
    for sequence in sequences:
        steps = () if sequence.result is None else sequence.result.steps
        shapes = shapes_by_token(plans.get(sequence.engine_id, ()), sequence.index, steps)
        records.append(generation_record(sequence.request, sequence.result, shapes))
    return tuple(records)

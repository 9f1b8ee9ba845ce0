"""When did an engine's sequences arrive, and how long were they?  What a simulation of other arrivals needs to know.

Of other tenants' sequences only lengths are read, and whose cached blocks they read: their tokens are stand-ins that
are equal where the plans show that blocks were shared.  Sequences of the request's own tenant keep their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from replay.errors import IncompleteRecord
from runtime.engine.generation import GenerationRequest, GenerationResult, decode_request, decode_result
from runtime.engine.plan import StepPlan, decode_plan
from runtime.engine.simulation import Arrival

if TYPE_CHECKING:
    from traces.envelope import TraceEvent
    from traces.ledger.ledger import Ledger

LEFT = ("cancelled", "deadline", "error")
"""Ends that come from outside and not from the model's tokens."""
MANY = 1_000_000
"""More tokens than any sequence has."""
LONG = 4_096
"""Tokens that a sequence might have had which left before its end."""


@dataclass(kw_only=True)
class EngineHistory:
    """An engine's arrivals and plans, as far as a simulation repeats them.

    arrivals  in order of index
    outputs   stand-ins for each sequence's output, as long as it was
    plans     by step
    ticks     when each step ran: steps, and the time between them where the engine was idle
    tick_us   what a step usually takes
    """

    arrivals: list[Arrival] = field(default_factory=list[Arrival])
    outputs: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    plans: dict[int, StepPlan] = field(default_factory=dict[int, StepPlan])
    ticks: dict[int, int] = field(default_factory=dict[int, int])
    tick_us: int = 1


@dataclass(kw_only=True)
class _Line:
    """One line of the sequence table while it is read."""

    index: int
    step: int
    """The first step after its arrival."""
    tenant: str
    prompt_tokens: int
    output_tokens: int = 0
    finish_reason: str | None = None
    request: GenerationRequest | None = None
    result: GenerationResult | None = None
    priority: int = 0
    submitted_us: int = 0
    deadline_us: int | None = None
    """After its submission."""


def load_history(ledger: Ledger, run_id: str, engine_id: str, *, own: str | None, block_size: int) -> EngineHistory:
    """Read an engine's sequences and steps in recorded order.

    own: the tenant whose tokens may be read.  block_size: tokens in a cache block.
    Raises IncompleteRecord when a sequence has no recorded end, or none is recorded at all.
    """
    events = [
        event
        for event in ledger.events(run_id=run_id, event_type=("engine.step", "engine.sequence"))
        if event.engine_id == engine_id
    ]
    history = EngineHistory()
    lines: dict[int, _Line] = {}
    step = 0
    for event in events:
        if event.event_type == "engine.step":
            plan = decode_plan(event.payload["plan"])
            history.plans[plan.step] = plan
            step = plan.step + 1
        else:
            _read_line(ledger, lines, event, step=step, own=own)
    unfinished = [line.index for line in lines.values() if line.finish_reason is None]
    if unfinished or not lines:
        raise IncompleteRecord(
            f"{len(unfinished)} of {len(lines)} sequences of the engine have no recorded end",
            missing="engine.sequence",
            fix="Their lengths are needed to simulate other arrivals: blame without --samples.",
        )
    durations = sorted(event.duration_us or 1 for event in events if event.event_type == "engine.step")
    history.tick_us = max(1, durations[len(durations) // 2]) if durations else 1
    history.ticks = _ticks(events, history.tick_us)
    plans = history.plans.values()
    left = {one.sequence: plan.step for plan in plans for one in plan.releases if one.reason in LEFT}
    left |= {one.sequence: plan.step for plan in plans for one in plan.refusals if one.now_us is not None}
    given_up = {one.sequence for plan in plans for one in plan.refusals if one.now_us is None}
    texts = _stand_ins(lines, history.plans, block_size=block_size)
    for index in sorted(lines):
        step = None if index in given_up else left.get(index)  # who was given up for want of blocks will be again
        history.arrivals.append(_arrival(lines[index], texts[index], history.ticks, step))
        prompt = lines[index].prompt_tokens
        output = texts[index][prompt : prompt + max(1, lines[index].output_tokens)]
        if history.arrivals[-1].leaves is not None:  # it would have gone on
            output += range(-(index + 1) * MANY, LONG - (index + 1) * MANY)
        history.outputs[index] = tuple(output)
    return history


def _read_line(ledger: Ledger, lines: dict[int, _Line], event: TraceEvent, *, step: int, own: str | None) -> None:
    index = int(event.payload["index"])
    mine = own is not None and event.tenant_ref == own
    if event.payload["phase"] == "admitted":
        request = decode_request(ledger.read_blob(event.input_ref)) if mine and event.input_ref else None
        lines[index] = _Line(
            index=index,
            step=step,
            tenant=event.tenant_ref or f"sequence-{index}",
            prompt_tokens=event.input_tokens or 0,
            request=request,
            priority=int(event.payload.get("priority") or 0),
            submitted_us=int(event.payload.get("submitted_us") or 0),
            deadline_us=event.payload.get("deadline_us"),
        )
    elif index in lines:
        line = lines[index]
        line.finish_reason = event.finish_reason
        line.output_tokens = event.output_tokens or 0
        line.result = decode_result(ledger.read_blob(event.result_ref)) if mine and event.result_ref else None


def _ticks(events: Sequence[TraceEvent], usual: int) -> dict[int, int]:
    """Count steps as ticks; where the engine had nothing to do, as many more as usual steps would have fitted.

    It has nothing to do after a step that leaves nobody, not even an end that the next plan has to report.
    """
    ticks: dict[int, int] = {}
    tick, ended, busy, idle = -1, 0, 0, False
    for event in events:
        if event.event_type == "engine.sequence":
            busy += 1 if event.payload["phase"] == "admitted" else -1
        elif event.step is not None:
            tick += 1 + (max(0, event.mono_us - ended) // usual if idle and ticks else 0)
            ticks[event.step] = tick
            ended, idle = event.mono_us + (event.duration_us or 0), busy == 0
    return ticks


def _stand_ins(lines: Mapping[int, _Line], plans: Mapping[int, StepPlan], *, block_size: int) -> dict[int, list[int]]:
    """Return each sequence's tokens: its own where they may be known, else numbers that are equal where blocks were.

    A sequence that read another's blocks, at any of its admissions, has the same tokens there.
    """
    texts: dict[int, list[int]] = {}
    for line in lines.values():
        if line.request is not None and line.result is not None:
            texts[line.index] = [*line.request.prompt, *line.result.tokens, 0]
        else:
            first = -1 - line.index * MANY
            texts[line.index] = [first - place for place in range(line.prompt_tokens + line.output_tokens + 1)]
    for alike in _equal_blocks(plans):
        members = sorted(
            (one for one in alike if one[0] in lines), key=lambda one: (lines[one[0]].request is None, one)
        )
        for index, place in members[1:]:
            if lines[index].request is None:
                block = slice(place * block_size, (place + 1) * block_size)
                texts[index][block] = texts[members[0][0]][block]
    return texts


def _equal_blocks(plans: Mapping[int, StepPlan]) -> list[set[tuple[int, int]]]:
    """Return groups of (sequence, number of its block) that held the same tokens, as the recorded hits show it."""
    group_of: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for plan in plans.values():
        for admission in plan.admissions:
            for place, hit in enumerate(admission.hits):
                source = plans.get(hit.step)
                if source is None or hit.call >= len(source.calls):
                    continue
                one = (admission.sequence, place)
                two = (source.calls[hit.call].sequences[hit.row], place)
                joined = group_of.get(one, {one}) | group_of.get(two, {two})
                group_of |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in group_of.values()}.values())


def _arrival(line: _Line, text: list[int], ticks: Mapping[int, int], left: int | None) -> Arrival:
    """Return when a sequence came, and when it left if it did.  left: the step whose plan says so."""
    last = max(ticks.values(), default=-1)
    reason = line.finish_reason if line.finish_reason in LEFT and left is not None else None
    return Arrival(
        index=line.index,
        tick=ticks.get(line.step, last + 1),
        prompt=tuple(text[: line.prompt_tokens]),
        max_tokens=max(1, line.output_tokens),
        tenant=line.tenant,
        salt="" if line.request is None else line.request.cache_salt,
        leaves=None if reason is None or left is None else ticks.get(left, last + 1),
        reason=reason or "cancelled",
        priority=line.priority,
        deadline_us=None if line.deadline_us is None else line.submitted_us + line.deadline_us,
        now_us=line.submitted_us,
    )

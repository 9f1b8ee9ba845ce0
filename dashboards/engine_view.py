"""What did the engine do for this request, token by token and step by step?

Plans are read as the plain arrays that were recorded, so that no model or engine code is needed to look at them.
Rows of other requests are counted and nothing else about them is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

from dashboards.rows import StepRow, TokenRow
from dashboards.story import ReadBlob, read_document
from traces.envelope import TraceEvent
from traces.failures import ClassifiedError

TokenText = Callable[[int], str | None]
"""Returns the text of a token id, or None when it is not known."""


def generations(sequences: Sequence[TraceEvent], read_blob: ReadBlob) -> list[dict[str, Any]]:
    """Return the recorded generation results of a request, in order; unreadable ones are left out."""
    found: list[dict[str, Any]] = []
    for event in sequences:
        result = event.payload.get("result")
        if not isinstance(result, dict):
            try:
                result = read_document(event.result_ref, read_blob)
            except ClassifiedError:
                result = None
        if isinstance(result, dict) and "records" in result:
            found.append(cast("dict[str, Any]", result))
    return found


def token_rows(results: Sequence[dict[str, Any]], text_of: TokenText, *, first: int = 0) -> list[TokenRow]:
    """Return one row for each generated token of all generations together, numbered from `first`."""
    rows: list[TokenRow] = []
    for result in results:
        for record in result["records"]:
            token, digest, logprob, margin, step, _position, emitted_us = _record_fields(record)
            rows.append(
                TokenRow(
                    index=first + len(rows),
                    token=token,
                    text=text_of(token),
                    logprob=_number(logprob),
                    margin=_number(margin),
                    logits_digest=digest,
                    step=step,
                    emitted_us=emitted_us,
                )
            )
    return rows


def step_rows(
    events: Sequence[TraceEvent], own: frozenset[int] = frozenset(), *, engine_id: str | None = None
) -> list[StepRow]:
    """Return one engine's steps in order of time, counted from the first of them.

    Args:
        events: engine.step events; each was stamped with the monotonic time at which the step began.
        own: numbers of the steps that ran the request that is looked at.
        engine_id: which engine; None takes the events as they are, of one engine.
    """
    steps = [event for event in events if engine_id is None or event.engine_id == engine_id]
    steps.sort(key=lambda event: event.mono_us)
    rows: list[StepRow] = []
    for event in steps:
        prefill, decode, padded, tokens = _shape(event)
        number = _step_number(event)
        rows.append(
            StepRow(
                step=number,
                start_us=event.mono_us - steps[0].mono_us,
                duration_us=event.duration_us or 0,
                prefill_rows=prefill,
                decode_rows=decode,
                padded_rows=padded,
                prefill_tokens=tokens,
                own=number in own,
            )
        )
    return rows


def engines(events: Sequence[TraceEvent]) -> list[str]:
    """Return the engines that made steps, in order of their first one."""
    ordered = sorted(events, key=lambda event: event.ts_us)
    return list(dict.fromkeys(event.engine_id for event in ordered if event.engine_id is not None))


def own_steps(results: Sequence[dict[str, Any]]) -> frozenset[int]:
    """Return the engine steps that a request was a row of."""
    return frozenset(int(step) for result in results for step in result.get("steps", ()))


def engine_time(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return owner to microseconds over all generations; empty unless every one of them was accounted for."""
    accounts = [result.get("latency") for result in results]
    if not accounts or not all(isinstance(one, dict) for one in accounts):
        return {}
    total: dict[str, int] = {}
    for account in cast("list[dict[str, int]]", accounts):
        for name, us in account.items():
            total[name.removesuffix("_us")] = total.get(name.removesuffix("_us"), 0) + us
    return total


def first_difference(left: Sequence[TokenRow], right: Sequence[TokenRow]) -> tuple[int | None, int | None]:
    """Return the first token whose logits bits differ, and the first that is another token; None for no difference.

    A missing token counts as different; a missing digest on either side counts as unknown and is passed over.
    """
    bits = tokens = None
    for index in range(max(len(left), len(right))):
        one = left[index] if index < len(left) else None
        two = right[index] if index < len(right) else None
        if one is None or two is None:
            tokens = index if tokens is None else tokens
            break
        if bits is None and one.logits_digest and two.logits_digest and one.logits_digest != two.logits_digest:
            bits = index
        if one.token != two.token:
            tokens = index
            break
    return bits, tokens


def _record_fields(record: Any) -> tuple[Any, ...]:
    """Read a token record, which is written as an array in the order of its fields."""
    if isinstance(record, dict):
        names = ("token", "logits_digest", "logprob", "margin", "step", "position", "emitted_us")
        fields = cast("dict[str, Any]", record)
        return tuple(fields.get(name) for name in names)
    return tuple(record)


def _step_number(event: TraceEvent) -> int:
    return event.step if event.step is not None else int(_plan(event)[0])


def _shape(event: TraceEvent) -> tuple[int, int, int, int]:
    """Return prompt rows, generating rows, padded rows and prompt tokens of a step.

    A call is recorded as [graph, padded batch, padded tokens, padded context, sequences, starts, counts, silent].
    """
    prefill = decode = padded = tokens = 0
    for call in _plan(event)[1]:
        fields = cast("list[Any]", call)
        rows = len(fields[4])
        counts = cast("list[int]", fields[6]) if len(fields) > 6 else []
        padded += int(fields[1])
        if fields[0] == "prefill":
            prefill += rows
            tokens += sum(counts) or rows
        else:
            decode += rows
    return prefill, decode, padded, tokens


def _plan(event: TraceEvent) -> list[Any]:
    """Return the plan's arrays: step number, calls, and what the charts do not need."""
    plan = event.payload.get("plan")
    if isinstance(plan, str):
        plan = json.loads(plan)
    return cast("list[Any]", plan) if isinstance(plan, list) and len(cast("list[Any]", plan)) > 1 else [0, []]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

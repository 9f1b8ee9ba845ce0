"""How do two recorded requests differ: in pins, in what they did, in tokens, in time?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eval.attribution import attribute
from eval.divergence import Divergence, compare, compare_twins
from eval.records import RequestRecord
from manifests.diff import PinDifference, diff
from replay.catalog import Target
from replay.generations import load_sequences, recorded_generations
from replay.judge import sentence
from replay.portrait import critical_by_stage
from replay.preparation_comparison import compare_package_stages
from replay.records import RecordedRequest, load_run, to_request_record
from replay.slices import plans_of
from replay.text_models import text_model
from traces.failures import ClassifiedError, EvidenceError

if TYPE_CHECKING:
    from traces.ledger.ledger import Ledger

AROUND = 3
"""Tokens shown on each side of the first difference."""


def compare_requests(ledger: Ledger, left: Target, right: Target) -> dict[str, Any]:
    """Return the differences of two requests as JSON values.

    A request and its replay are compared in every layer.  Two requests of their own are compared in what they share:
    context, prompt, bits, tokens, tools, decisions and failures, but not arrival, ids and schedule.
    """
    one, first = _load(ledger, left)
    other, second = _load(ledger, right)
    related = one.request_ref == other.request_ref
    found = compare(first, second) if related else compare_twins(first, second)
    pins = diff(one.pins, other.pins) if one.pins is not None and other.pins is not None else ()
    return {
        "left": {"run": one.run_id, "request": one.request_ref},
        "right": {"run": other.run_id, "request": other.request_ref},
        "related": related,
        "verdict": found.verdict,
        "layer": found.layer,
        "stage": found.stage,
        "step": found.step,
        "token_index": found.request_token_index,
        "detail": sentence(found, mode="faithful"),
        "pins": _pins(pins, found),
        "preparation": compare_package_stages(ledger, _package(one), _package(other)),
        "stages_different": list(found.stages_different),
        "tokens_different": found.tokens_different,
        "tokens": _with_texts(_tokens(first, second, found), ledger, one, other),
        "texts": [_texts(ledger, one), _texts(ledger, other)],
        "latency": _latency(one, other),
    }


def _package(request: RecordedRequest) -> str | None:
    return None if request.pins is None else request.pins.artifact.package_digest


def _load(ledger: Ledger, target: Target) -> tuple[RecordedRequest, RequestRecord]:
    reference = target.request_ref or ""
    run = load_run(ledger, target.run_id, only=[reference])
    request = run.requests[reference]
    sequences = load_sequences(ledger, request.events)
    return request, to_request_record(request, recorded_generations(sequences, plans_of(ledger, run)))


def _pins(pins: tuple[PinDifference, ...], found: Divergence) -> list[dict[str, Any]]:
    """Return the differing pins, those that can explain the first difference before the others."""
    roles = {one.pin.path: one.role for one in attribute(pins, found).suspects}
    order = ("direct", "upstream", "downstream", "observed", "inert")
    rows = [{"pin": one.path, "left": one.left, "right": one.right, "role": roles.get(one.path)} for one in pins]
    return sorted(rows, key=lambda row: order.index(row["role"]) if row["role"] in order else len(order))


def _tokens(left: RequestRecord, right: RequestRecord, found: Divergence) -> list[dict[str, Any]]:
    """Return both sides' tokens around the first different token, or around the first different bits."""
    for number, (one, other) in enumerate(zip(left.generations, right.generations, strict=False)):
        counts = found.counts[number]
        first = counts.first_token_index if counts.first_token_index is not None else counts.first_bit_index
        if first is None:
            continue
        longest = max(len(one.tokens), len(other.tokens))
        rows: list[dict[str, Any]] = []
        for index in range(max(0, first - AROUND), min(longest, first + AROUND + 1)):
            row: dict[str, Any] = {"generation": number, "index": index, "first": index == first}
            for side, generation in (("left", one), ("right", other)):
                token = generation.tokens[index] if index < len(generation.tokens) else None
                row[side] = None if token is None else token.token
                row[f"{side}_margin"] = None if token is None else token.margin
                row[f"{side}_bits"] = None if token is None or token.logits_digest is None else token.logits_digest[:12]
            rows.append(row)
        return rows
    return []


def _with_texts(
    rows: list[dict[str, Any]], ledger: Ledger, one: RecordedRequest, other: RecordedRequest
) -> list[dict[str, Any]]:
    """Add each token's text where a package with the tokenizer is at hand."""
    for side, request in (("left", one), ("right", other)):
        decode = _decoder(ledger, request) if rows else None
        for row in rows:
            row[f"{side}_text"] = None if decode is None or row[side] is None else decode(row[side])
    return rows


def _decoder(ledger: Ledger, request: RecordedRequest) -> Callable[[int], str] | None:
    if request.pins is None:
        return None
    try:
        model = text_model(ledger.path, request.pins.artifact.package_digest or "", request.pins)
    except ClassifiedError:
        return None
    return lambda token: str(model.tokenizer.decode([token], skip_special_tokens=False))


def _texts(ledger: Ledger, request: RecordedRequest) -> list[str]:
    """Return what each generation said, from the decode stages."""
    texts: list[str] = []
    for event in request.of_type("stage.completed"):
        if event.stage is not None and event.stage.word == "decode" and event.result_ref:
            try:
                texts.append(str(json.loads(ledger.read_blob(event.result_ref))["text"]))
            except EvidenceError:
                texts.append("(erased)")
    return texts


def _latency(left: RecordedRequest, right: RecordedRequest) -> list[dict[str, Any]]:
    """Return critical time by stage of both; each column sums to its end-to-end time."""
    one, other = critical_by_stage(left), critical_by_stage(right)
    rows: list[dict[str, Any]] = []
    for stage in dict.fromkeys([*one, *other]):
        rows.append({"stage": stage, "left_us": one.get(stage), "right_us": other.get(stage)})
    rows.append({"stage": "end to end", "left_us": sum(one.values()), "right_us": sum(other.values())})
    return rows

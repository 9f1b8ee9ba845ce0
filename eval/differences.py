"""In which ways do two recorded requests differ?  All of them, the causes before their consequences.

Two records are walked moment by moment; at one token the layers are asked in the order schedule, bits, margin, token,
so that a flip of bits is not reported many tokens late.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, cast

from eval.align import Checkpoint, timeline
from eval.layers import ENGINE_STAGES, PROMPT_STAGES, STAGE_LAYERS, TOKEN_LAYERS, Layer
from eval.records import GenerationRecord, RequestRecord, StageRecord, Tolerance, ToolCallRecord
from eval.tokens import token_differences


@dataclass(frozen=True)
class Difference:
    """One way in which a replay differs from its original."""

    layer: Layer
    stage: str | None
    detail: Mapping[str, Any]
    """what, expected, actual, and what else helps to see it."""
    step: int | None = None
    generation: int | None = None
    token_index: int | None = None
    forgiven: bool = False
    """Within the tolerance."""


def differences(
    original: RequestRecord,
    replay: RequestRecord,
    *,
    layers: Collection[str],
    tolerance: Tolerance | None = None,
    stages: Collection[str] | None = None,
) -> Iterator[Difference]:
    """Yield the differences in the given layers and stages, in causal order, the forgiven ones too."""
    late: list[Difference] = []
    tokens_known = bool(original.generations and replay.generations)
    sides = [[moment for moment in timeline(side) if _judged(moment, layers, stages)] for side in (original, replay)]
    for left, right in zip_longest(*sides):
        if left is None or right is None or left.key != right.key:
            yield from _within(layers, [_flow(left, right, original, replay)])
            break  # past a fork there is nothing to compare with
        for found in _within(layers, _moment(left, right, tolerance, layers)):
            if found.detail["what"] == "output_digest" and left.stage not in PROMPT_STAGES:
                # where tokens were compared, an engine stage's document adds only how they were scheduled
                scheduled = tokens_known and left.stage in ENGINE_STAGES
                late.append(replace(found, layer="schedule") if scheduled else found)
            else:
                yield found
    yield from late
    yield from _within(layers, _endings(original, replay))


def _within(layers: Collection[str], found: Iterable[Difference]) -> Iterator[Difference]:
    return (difference for difference in found if difference.layer in layers)


def _judged(moment: Checkpoint, layers: Collection[str], stages: Collection[str] | None) -> bool:
    if stages is not None and moment.stage not in stages:
        return False
    if moment.kind == "tool":
        return bool({"tool", "decision"} & set(layers))
    if moment.kind == "generation":
        return bool((TOKEN_LAYERS | {"input"}) & set(layers))
    if moment.stage in ENGINE_STAGES:
        return bool(TOKEN_LAYERS & set(layers))
    return moment.stage not in ("b01", "b02") or "input" in layers


def _moment(
    left: Checkpoint, right: Checkpoint, tolerance: Tolerance | None, layers: Collection[str]
) -> Iterator[Difference]:
    if left.kind == "generation":
        one, other = cast(GenerationRecord, left.value), cast(GenerationRecord, right.value)
        return _generation(one, other, left.ordinal, tolerance, layers)
    if left.kind == "tool":
        return _tool(cast(ToolCallRecord, left.value), cast(ToolCallRecord, right.value), left.ordinal)
    return _stage(cast(StageRecord, left.value), cast(StageRecord, right.value), layers)


def _generation(
    left: GenerationRecord, right: GenerationRecord, ordinal: int, tolerance: Tolerance | None, layers: Collection[str]
) -> Iterator[Difference]:
    if parted(left.prompt_digest, right.prompt_digest):
        yield _found("input", "b05", "prompt_digest", left.prompt_digest, right.prompt_digest, generation=ordinal)
    found = list(token_differences(left, right, layers=(*layers, "token"), tolerance=tolerance))
    # other tokens make another schedule, so a schedule known only as a whole is no cause then
    if parted(left.schedule_digest, right.schedule_digest) and not any(item.layer == "token" for item in found):
        whole = ("schedule_digest", left.schedule_digest, right.schedule_digest)
        yield _found("schedule", "b04", *whole, generation=ordinal)
    for item in found:
        early = item.index == 0 and item.layer in ("schedule", "bits", "margin")
        detail = {"what": item.what, "expected": item.expected, "actual": item.actual}
        yield Difference(
            cast(Layer, item.layer),
            "b05" if early else "b06",
            detail | _around(left, right, item.index),
            item.step,
            ordinal,
            item.index,
            item.forgiven,
        )


def _around(left: GenerationRecord, right: GenerationRecord, index: int) -> dict[str, Any]:
    """Show both sides of one position."""
    shown: dict[str, Any] = {}
    for side, generation in (("original", left), ("replay", right)):
        if index < len(generation.tokens):
            token = generation.tokens[index]
            shown[side] = {"token": token.token, "logprob": token.logprob, "margin": token.margin, "step": token.step}
    return shown


def _tool(left: ToolCallRecord, right: ToolCallRecord, ordinal: int) -> Iterator[Difference]:
    # a tool may be read before the decision on it is made: then another result is the cause and the decision follows
    for what in ("name", "arguments_digest", "result_digest", "decision", "side_effect"):
        expected, actual = getattr(left, what), getattr(right, what)
        if what in ("name", "side_effect", "decision") and expected == actual:
            continue
        if what.endswith("digest") and not parted(expected, actual):
            continue
        layer: Layer = "decision" if what == "decision" else "tool"
        yield _found(layer, "b07", what, expected, actual, call=ordinal, tool=left.name)


def _stage(left: StageRecord, right: StageRecord, layers: Collection[str]) -> Iterator[Difference]:
    if left.status != right.status:
        yield _found("failure", left.stage, "status", left.status, right.status)
    if left.decision != right.decision:
        layer = STAGE_LAYERS.get(left.stage, "decision")
        layer = layer if layer in ("input", "tool") else "decision"
        yield _found(layer, left.stage, "decision", left.decision, right.decision)
    # the engine stages' documents tell of the schedule too, so they are not asked when it is another on purpose
    silent = left.stage in ENGINE_STAGES and "schedule" not in layers
    if parted(left.output_digest, right.output_digest) and not silent:
        layer = STAGE_LAYERS.get(left.stage, "input")
        yield _found(layer, left.stage, "output_digest", left.output_digest, right.output_digest)


def _flow(
    left: Checkpoint | None, right: Checkpoint | None, original: RequestRecord, replay: RequestRecord
) -> Difference:
    """Name the moment at which the two requests took different ways."""
    kinds = {moment.kind for moment in (left, right) if moment is not None}
    moment = left or right
    stage = None if moment is None else moment.stage
    layer: Layer = "tool" if "tool" in kinds else "decision"
    if _failure(original) != _failure(replay):
        failure = original.failure or replay.failure
        layer, stage = "failure", stage if failure is None or failure.stage is None else failure.stage
    return _found(layer, stage, "next", _named(left), _named(right))


def _endings(original: RequestRecord, replay: RequestRecord) -> Iterator[Difference]:
    for left, right in zip_longest(original.policy_decisions, replay.policy_decisions):
        if left != right:
            decided = left or right
            expected = None if left is None else asdict(left)
            stage = None if decided is None else decided.stage
            yield _found("decision", stage, "policy", expected, None if right is None else asdict(right))
    if parted(original.response_digest, replay.response_digest):
        yield _found("decision", "b10", "response_digest", original.response_digest, replay.response_digest)
    if _failure(original) != _failure(replay):
        failure = original.failure or replay.failure
        stage = None if failure is None else failure.stage
        yield _found("failure", stage, "failure", _failure(original), _failure(replay))
    if original.terminal_status != replay.terminal_status:
        yield _found("failure", "b10", "terminal_status", original.terminal_status, replay.terminal_status)


def _failure(record: RequestRecord) -> dict[str, Any] | None:
    """Return what must be equal for two failures to be the same: class, stage and retry decision."""
    failure = record.failure
    if failure is None:
        return None
    return {"class": failure.failure_class, "stage": failure.stage, "retry_decision": failure.retry_decision}


def parted(left: str | None, right: str | None) -> bool:
    """Say whether two digests are both known and differ."""
    return left is not None and right is not None and left != right


def _named(moment: Checkpoint | None) -> str | None:
    return None if moment is None else f"{moment.kind} {moment.stage} attempt {moment.attempt} no. {moment.ordinal}"


def _found(
    layer: Layer,
    stage: str | None,
    what: str,
    expected: Any,
    actual: Any,
    *,
    generation: int | None = None,
    **more: Any,
) -> Difference:
    detail = {"what": what, "expected": expected, "actual": actual, **more}
    return Difference(layer, stage, detail, generation=generation)

"""Divergence: the first difference in causal order, exact only where equality is proven."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eval.divergence import compare, compare_runs, compare_twins
from eval.layers import LAYERS, STAGE_LAYERS
from eval.records import (
    DecisionRecord,
    FailureRecord,
    GenerationRecord,
    RequestRecord,
    RunRecord,
    StageRecord,
    TokenRecord,
    Tolerance,
    ToolCallRecord,
)
from tests.strategies import request_records


def _generation(prompt: str, tokens: list[int]) -> GenerationRecord:
    records = tuple(
        TokenRecord(token, f"bits-{prompt}-{index}", -0.5, 2.0, step=10 + index, schedule_digest=f"shape-{index}")
        for index, token in enumerate(tokens)
    )
    return GenerationRecord(prompt, records, "stop", f"plan-{prompt}")


def _stage(code: str, decision: str | None = None) -> StageRecord:
    return StageRecord(code, "ok", f"in-{code}", f"out-{code}", decision)


ORIGINAL = RequestRecord(
    "req_1",
    stages=(
        _stage("b01"),
        _stage("b02"),
        _stage("b03", "primary"),
        _stage("b04"),
        _stage("b05"),
        _stage("b06"),
        _stage("b07", "allow"),
        _stage("b04"),
        _stage("b05"),
        _stage("b06"),
        _stage("b08", "accepted"),
        _stage("b09"),
        _stage("b10"),
    ),
    generations=(_generation("first", [5, 6, 7]), _generation("second", [8, 9, 10, 11])),
    tool_calls=(ToolCallRecord("lookup", "arguments", "result", "allow", "read"),),
    policy_decisions=(DecisionRecord("cited", "pass", "1", "b08"),),
    terminal_status="ok",
    response_digest="response",
)


def _with_stage(number: int, **changes: Any) -> RequestRecord:
    stages = list(ORIGINAL.stages)
    stages[number] = replace(stages[number], **changes)
    return replace(ORIGINAL, stages=tuple(stages))


def _with_token(generation: int, index: int, **changes: Any) -> RequestRecord:
    generations = list(ORIGINAL.generations)
    tokens = list(generations[generation].tokens)
    tokens[index] = replace(tokens[index], **changes)
    generations[generation] = replace(generations[generation], tokens=tuple(tokens))
    return replace(ORIGINAL, generations=tuple(generations))


def _with_generation(number: int, **changes: Any) -> RequestRecord:
    generations = list(ORIGINAL.generations)
    generations[number] = replace(generations[number], **changes)
    return replace(ORIGINAL, generations=tuple(generations))


def _with_call(**changes: Any) -> RequestRecord:
    return replace(ORIGINAL, tool_calls=(replace(ORIGINAL.tool_calls[0], **changes),))


FAILURE = FailureRecord("timeout_cancellation", "b06", "none")

CHANGES: list[tuple[str, RequestRecord, str, str | None, int | None, int | None]] = [
    ("the question", _with_stage(0, output_digest="x"), "input", "b01", None, None),
    ("the context", _with_stage(1, output_digest="x"), "input", "b02", None, None),
    ("the route", _with_stage(2, decision="fallback"), "decision", "b03", None, None),
    ("only the route's document", _with_stage(2, output_digest="x"), "decision", "b03", None, None),
    ("the prompt of a turn", _with_generation(1, prompt_digest="x"), "input", "b05", 1, None),
    ("a step's shapes", _with_token(1, 2, schedule_digest="x", logits_digest="y"), "schedule", "b06", 1, 2),
    ("the plan as a whole", _with_generation(0, schedule_digest="x"), "schedule", "b04", 0, None),
    ("the first logits", _with_token(0, 0, logits_digest="x"), "bits", "b05", 0, 0),
    ("logits, then the token", _with_token(0, 1, logits_digest="x", token=1), "bits", "b06", 0, 1),
    ("a token drawn from equal logits", _with_token(1, 3, token=1), "token", "b06", 1, 3),
    ("the reason to end", _with_generation(1, finish_reason="length"), "token", "b06", 1, 4),
    ("an interrupted generation", _with_generation(1, finish_reason="deadline"), "failure", "b06", 1, 4),
    ("the tool's arguments", _with_call(arguments_digest="x"), "tool", "b07", None, None),
    ("the tool's result", _with_call(result_digest="x"), "tool", "b07", None, None),
    ("the tool's authorization", _with_call(decision="deny", result_digest=None), "decision", "b07", None, None),
    ("a reading that decided", _with_call(decision="deny", result_digest="x"), "tool", "b07", None, None),
    ("the validation", _with_stage(10, decision="rejected"), "decision", "b08", None, None),
    ("the policy version", _with_stage(10, output_digest="x"), "decision", "b08", None, None),
    ("queueing's document alone", _with_stage(3, output_digest="x"), "schedule", "b04", None, None),
    ("prefill's document alone", _with_stage(4, output_digest="x"), "schedule", "b05", None, None),
    (
        "a policy decision",
        replace(ORIGINAL, policy_decisions=(DecisionRecord("cited", "fail", "1", "b08"),)),
        "decision",
        "b08",
        None,
        None,
    ),
    ("the response", replace(ORIGINAL, response_digest="x"), "decision", "b10", None, None),
    ("a failure", replace(ORIGINAL, failure=FAILURE), "failure", "b06", None, None),
    ("a stage's status", _with_stage(5, status="error"), "failure", "b06", None, None),
    ("the terminal status", replace(ORIGINAL, terminal_status="partial"), "failure", "b10", None, None),
    ("a request that ended early", replace(ORIGINAL, stages=ORIGINAL.stages[:-1]), "decision", "b10", None, None),
    (
        "a request that failed early",
        replace(
            ORIGINAL,
            stages=ORIGINAL.stages[:6],
            generations=ORIGINAL.generations[:1],
            tool_calls=(),
            failure=FAILURE,
        ),
        "failure",
        "b06",
        None,
        None,
    ),
    ("a call that was not made", replace(ORIGINAL, tool_calls=()), "tool", "b07", None, None),
]


@pytest.mark.parametrize(
    ("name", "replay", "layer", "stage", "generation", "index"), CHANGES, ids=[c[0] for c in CHANGES]
)
def test_one_change_is_never_exact_and_names_its_layer(
    name: str, replay: RequestRecord, layer: str, stage: str | None, generation: int | None, index: int | None
) -> None:
    found = compare(ORIGINAL, replay)
    assert (found.verdict, found.layer, found.stage) == ("diverged", layer, stage), found.detail
    assert (found.generation, found.token_index) == (generation, index)
    json.dumps(found.to_document(), allow_nan=False)


def test_an_equal_record_is_exact() -> None:
    found = compare(ORIGINAL, ORIGINAL)
    assert found.verdict == "exact" and found.same
    assert found.layer is found.stage is found.token_index is found.first_bit_index is found.first_token_index is None
    assert [item.compared for item in found.counts] == [3, 4]
    assert found.max_logprob_difference == 0.0
    assert found.stages_different == () and found.origin is None


def test_counts_go_past_the_first_difference() -> None:
    changed = _with_token(0, 1, logits_digest="x", logprob=-0.75)
    generation = changed.generations[0]
    tokens = (*generation.tokens[:2], replace(generation.tokens[2], logits_digest="y", token=1), TokenRecord(3, "z"))
    replay = replace(changed, generations=(replace(generation, tokens=tokens), changed.generations[1]))
    found = compare(ORIGINAL, replay)
    assert (found.layer, found.token_index, found.step) == ("bits", 1, 11)
    assert (found.first_bit_index, found.first_token_index, found.tokens_different) == (1, 2, 1)
    assert found.counts[0].bits_different == 2
    assert found.max_logprob_difference == 0.25
    assert found.detail["original"]["token"] == found.detail["replay"]["token"] == 6


def test_a_generation_that_goes_on_longer_parts_where_the_other_ended() -> None:
    shorter = _with_generation(1, tokens=ORIGINAL.generations[1].tokens[:2])
    found = compare(ORIGINAL, shorter)
    assert (found.layer, found.token_index, found.first_token_index, found.first_bit_index) == ("token", 2, 2, None)
    assert (found.detail["expected"], found.detail["actual"]) == (10, None)


def test_a_schedule_known_only_as_a_whole_explains_bits_but_not_other_tokens() -> None:
    bits = replace(_with_token(0, 1, logits_digest="x"))
    bits = replace(bits, generations=(replace(bits.generations[0], schedule_digest="x"), bits.generations[1]))
    assert compare(ORIGINAL, bits).layer == "schedule"
    tokens = _with_token(0, 1, logits_digest="x", token=1)
    tokens = replace(tokens, generations=(replace(tokens.generations[0], schedule_digest="x"), tokens.generations[1]))
    assert compare(ORIGINAL, tokens).layer == "bits"


def test_layers_that_a_replay_changes_on_purpose_are_not_judged() -> None:
    alone = _with_token(1, 0, schedule_digest="x")
    stages = tuple(
        replace(stage, output_digest="x") if stage.stage in ("b04", "b05") else stage for stage in alone.stages
    )
    alone = replace(alone, stages=stages)
    assert compare(ORIGINAL, alone).layer == "schedule"
    without = [layer for layer in LAYERS if layer != "schedule"]
    assert compare(ORIGINAL, alone, layers=without).verdict == "exact"
    audit = replace(
        ORIGINAL,
        generations=(),
        stages=tuple(s for s in ORIGINAL.stages if s.stage in ("b03", "b07", "b08", "b09", "b10")),
    )
    assert compare(ORIGINAL, audit, layers=("tool", "decision", "failure")).verdict == "exact"
    only = replace(audit, stages=tuple(stage for stage in audit.stages if stage.stage == "b08"))
    assert compare(ORIGINAL, only, layers=("decision", "failure"), stages={"b08"}).verdict == "exact"
    with pytest.raises(ValueError, match="unknown layers: colour"):
        compare(ORIGINAL, ORIGINAL, layers=["colour"])
    with pytest.raises(ValueError, match="no layer"):
        compare(ORIGINAL, ORIGINAL, layers=[])


def test_a_tolerance_forgives_bits_but_no_token() -> None:
    near = _with_token(0, 1, logits_digest="x", logprob=-0.5001, margin=2.0001)
    tolerance = Tolerance(logprob=0.001, margin=0.001, source="A/A")
    found = compare(ORIGINAL, near, tolerance=tolerance)
    assert (found.verdict, found.layer, found.token_index) == ("within_tolerance", "bits", 1)
    assert found.same
    far = _with_token(0, 1, logits_digest="x", logprob=-0.5, margin=2.1)
    found = compare(ORIGINAL, far, tolerance=tolerance)
    assert (found.verdict, found.layer, found.detail["what"]) == ("diverged", "margin", "margin")
    flipped = _with_token(0, 1, logits_digest="x", token=1)
    assert compare(ORIGINAL, flipped, tolerance=tolerance).layer == "token"
    unmeasured = _with_token(0, 1, logits_digest="x", margin=None)
    assert compare(ORIGINAL, unmeasured, tolerance=tolerance).verdict == "diverged"
    broken = _with_token(0, 1, logits_digest="x", logprob=math.nan)
    assert compare(ORIGINAL, broken, tolerance=tolerance).layer == "margin"


@pytest.mark.parametrize(
    ("replay", "said"),
    [
        (_with_token(1, 2, logits_digest=None), "replay has no digest of the logits at token 2"),
        (_with_generation(0, prompt_digest=None), "no digest of the prompt"),
        (_with_stage(7, output_digest=None), "only one side"),
        (replace(ORIGINAL, terminal_status=None), "terminal status"),
    ],
)
def test_what_was_not_recorded_is_not_exact(replay: RequestRecord, said: str) -> None:
    left = replay if replay.terminal_status is None else ORIGINAL
    found = compare(left, replay)
    assert found.verdict == "unverified" and not found.same
    assert any(said in reason for reason in found.unverified)


def test_without_digests_margins_are_asked() -> None:
    left, right = _with_token(0, 1, logits_digest=None), _with_token(0, 1, logits_digest=None, margin=1.0)
    assert compare(left, right).layer == "margin"


def test_nothing_recorded_proves_nothing() -> None:
    assert compare(RequestRecord("a"), RequestRecord("a")).verdict == "unverified"


def test_the_origin_is_the_stage_that_emitted_another_thing_from_the_same() -> None:
    replay = _with_stage(4, output_digest="x")
    stages = list(replay.stages)
    stages[5] = replace(stages[5], input_digest="x", output_digest="y")
    found = compare(ORIGINAL, replace(replay, stages=tuple(stages)))
    assert found.origin == "b05"
    assert found.stages_different == ("b05", "b06")


def test_a_token_is_also_counted_over_the_whole_request() -> None:
    assert compare(ORIGINAL, _with_token(1, 2, logits_digest="x")).request_token_index == 5
    assert compare(ORIGINAL, _with_token(0, 2, logits_digest="x")).request_token_index == 2
    assert compare(ORIGINAL, ORIGINAL).request_token_index is None


def test_twins_are_not_blamed_for_what_each_has_of_its_own() -> None:
    own = [
        replace(stage, output_digest="x", input_digest="y") if stage.stage in ("b01", "b04", "b09", "b10") else stage
        for stage in ORIGINAL.stages
    ]
    twin = replace(_with_token(0, 0, schedule_digest="x"), stages=tuple(own), response_digest="x", request_ref="req_2")
    assert compare(ORIGINAL, twin).layer == "input"
    assert compare_twins(ORIGINAL, twin).verdict == "exact"
    other = replace(twin, generations=_with_token(1, 1, logits_digest="x").generations)
    found = compare_twins(ORIGINAL, other)
    assert (found.layer, found.generation, found.token_index) == ("bits", 1, 1)


def test_runs_are_paired_by_the_request_that_was_replayed() -> None:
    original = RunRecord(
        "run_1", (ORIGINAL, replace(ORIGINAL, request_ref="req_2"), replace(ORIGINAL, request_ref="req_3"))
    )
    replay = RunRecord(
        "run_2",
        (replace(ORIGINAL, request_ref="new", parent_ref="req_2"), ORIGINAL, replace(ORIGINAL, request_ref="req_9")),
    )
    found = compare_runs(original, replay)
    assert [(left.request_ref, right.request_ref) for left, right, _ in found.compared] == [
        ("req_1", "req_1"),
        ("req_2", "new"),
    ]
    assert all(divergence.verdict == "exact" for _, _, divergence in found.compared)
    assert [request.request_ref for request in found.only_original] == ["req_3"]
    assert [request.request_ref for request in found.only_replay] == ["req_9"]


@given(request_records)
def test_a_record_never_diverges_from_itself(record: RequestRecord) -> None:
    found = compare(record, record)
    assert found.verdict in ("exact", "unverified")
    assert found.layer is None and found.tokens_different == 0
    if record.stages or record.generations or record.tool_calls:
        assert found.verdict == "exact"


@given(request_records, request_records)
def test_comparison_is_symmetric(left: RequestRecord, right: RequestRecord) -> None:
    there, back = compare(left, right), compare(right, left)
    assert (there.verdict, there.layer, there.generation, there.token_index) == (
        back.verdict,
        back.layer,
        back.generation,
        back.token_index,
    )
    assert (there.first_bit_index, there.first_token_index) == (back.first_bit_index, back.first_token_index)
    assert there.detail.get("expected") == back.detail.get("actual")


@given(request_records, st.data())
def test_the_reported_token_is_the_first_that_differs(record: RequestRecord, data: st.DataObject) -> None:
    places = [(g, i) for g, generation in enumerate(record.generations) for i in range(len(generation.tokens))]
    assume(places)
    changed = sorted(data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True)))
    layer = data.draw(st.sampled_from(["bits", "token", "schedule"]))
    generations = [list(generation.tokens) for generation in record.generations]
    for generation, index in changed:
        old = generations[generation][index]
        new = {"bits": {"logits_digest": "x"}, "token": {"token": 99}, "schedule": {"schedule_digest": "x"}}[layer]
        assume(layer != "schedule" or old.schedule_digest is not None)
        generations[generation][index] = replace(old, **new)  # type: ignore[arg-type]
    replay = replace(
        record,
        generations=tuple(
            replace(generation, tokens=tuple(tokens))
            for generation, tokens in zip(record.generations, generations, strict=True)
        ),
    )
    found = compare(record, replay)
    assert (found.verdict, found.layer, (found.generation, found.token_index)) == ("diverged", layer, changed[0])


@given(request_records, request_records, st.sets(st.sampled_from(LAYERS), min_size=1))
def test_only_judged_layers_are_reported(left: RequestRecord, right: RequestRecord, layers: set[str]) -> None:
    found = compare(left, right, layers=layers)
    assert found.layer is None or found.layer in layers


def test_every_request_stage_speaks_in_a_known_layer() -> None:
    assert list(STAGE_LAYERS) == [f"b{number:02d}" for number in range(1, 11)]
    assert set(STAGE_LAYERS.values()) <= set(LAYERS)

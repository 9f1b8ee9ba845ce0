"""Where do two recorded requests part?  The dashboards' records, handed to the same judge that replays use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dashboards.engine_view import token_rows
from dashboards.story import RequestStory, StageRun
from eval.divergence import Divergence, compare, compare_twins
from eval.layers import LAYERS
from eval.records import (
    DecisionRecord,
    FailureRecord,
    GenerationRecord,
    RequestRecord,
    StageRecord,
    TokenRecord,
    ToolCallRecord,
)
from traces.evidence import hex_digest


def first_divergence(
    left: RequestStory,
    right: RequestStory,
    left_results: Sequence[dict[str, Any]],
    right_results: Sequence[dict[str, Any]],
) -> Divergence:
    """Find the first difference in causal order.

    A request and its replay carry the same reference and are judged as such, but for the schedule, whose effects show
    in the bits.  Two requests of their own differ in what names them (arrival, identifiers) and are judged as twins.
    """
    one, two = request_record(left, left_results), request_record(right, right_results)
    if left.request_ref != right.request_ref:
        return compare_twins(one, two)
    return compare(one, two, layers=[layer for layer in LAYERS if layer != "schedule"])


def request_record(story: RequestStory, results: Sequence[dict[str, Any]]) -> RequestRecord:
    """Return what the judge sees of a request."""
    failure = None
    if story.failure_class is not None:
        failure = FailureRecord(
            failure_class=story.failure_class,
            stage=story.failed_stage,
            retry_decision=story.retry_decision,
            error_type=story.error_type,
        )
    return RequestRecord(
        request_ref=story.request_ref,
        run_id=story.run_id,
        stages=tuple(_stage(run) for run in story.stages),
        generations=tuple(_generation(result) for result in results),
        tool_calls=_tool_calls(story),
        policy_decisions=tuple(
            DecisionRecord(
                name=str(event.payload.get("rule") or event.payload.get("name") or event.component),
                decision=event.policy_decision or str(event.payload.get("decision", "unknown")),
                version=event.policy_version,
                stage=event.stage.value if event.stage else None,
            )
            for event in story.decisions
        ),
        failure=failure,
        terminal_status=None if story.status == "running" else story.status,
        response_digest=_name(story.response_ref),
        manifest_digest=story.manifest_digest,
    )


def _stage(run: StageRun) -> StageRecord:
    decision = run.record.get("disposition") or run.record.get("admission") or run.record.get("status")
    return StageRecord(
        stage=run.stage.value,
        status=None if run.status == "running" else run.status,
        input_digest=_name(run.input_ref),
        output_digest=_name(run.result_ref),
        decision=None if decision is None else str(decision),
        attempt=run.ordinal,
        start_us=run.start_us,
        end_us=run.end_us,
    )


def _generation(result: dict[str, Any]) -> GenerationRecord:
    return GenerationRecord(
        prompt_digest=result.get("prompt_digest"),
        tokens=tuple(
            TokenRecord(
                token=row.token,
                logits_digest=row.logits_digest,
                logprob=row.logprob,
                margin=row.margin,
                step=row.step,
                emitted_us=row.emitted_us,
            )
            for row in token_rows([result], lambda token: None)
        ),
        finish_reason=result.get("finish_reason"),
        sequence_id=result.get("sequence_id"),
    )


def _tool_calls(story: RequestStory) -> tuple[ToolCallRecord, ...]:
    """Pair each authorized call with the completion of the same tool that follows it."""
    waiting = [event for event in story.tools if event.event_type == "tool.completed"]
    calls: list[ToolCallRecord] = []
    for event in story.tools:
        if event.event_type != "tool.authorized":
            continue
        end = next((one for one in waiting if one.tool_name == event.tool_name), None)
        if end is not None:
            waiting.remove(end)
        calls.append(
            ToolCallRecord(
                name=event.tool_name or "unknown",
                arguments_digest=_name(event.input_ref),
                result_digest=_name(end.result_ref) if end else None,
                decision=event.policy_decision,
                side_effect=(end.side_effect if end else event.side_effect) or "none",
                attempt=event.attempt or 1,
            )
        )
    return tuple(calls)


def _name(reference: str | None) -> str | None:
    return None if reference is None else f"sha256:{hex_digest(reference)}"

"""Under which names do other tools know our columns?

One versioned table, applied at export and nowhere else, because the GenAI conventions are renamed every quarter.
Target: open-telemetry/semantic-conventions-genai v1.42.0.  Nothing there covers queue, batch, prefill, decode, cache or
preparation: those are ``replaylab.*``, with the names of vLLM's spans as aliases where they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from traces.envelope import TraceEvent
from traces.stages import Stage

MAPPING_VERSION = "genai-1.42.0+replaylab-1"
SCHEMA_URL = "https://opentelemetry.io/schemas/gen-ai/1.42.0"

AttributeValue = str | int | float | bool | list[str]


class Mapping(NamedTuple):
    """One column under its exported name."""

    column: str
    attribute: str
    convert: Callable[[str | int], AttributeValue]


def _same(value: str | int) -> AttributeValue:
    return str(value) if isinstance(value, str) else value  # an enumeration is exported as its plain text


def _number(value: str | int) -> AttributeValue:
    try:
        return float(value)
    except ValueError:
        return value  # the column holds any text; what is no number stays readable


def _seconds(value: str | int) -> AttributeValue:
    return int(value) / 1_000_000


def _listed(value: str | int) -> AttributeValue:
    return [str(value)]


MAPPINGS: tuple[Mapping, ...] = (
    Mapping("operation", "gen_ai.operation.name", _same),
    Mapping("provider", "gen_ai.provider.name", _same),
    Mapping("conversation_ref", "gen_ai.conversation.id", _same),
    Mapping("request_model", "gen_ai.request.model", _same),
    Mapping("response_model", "gen_ai.response.model", _same),
    Mapping("seed", "gen_ai.request.seed", _same),
    Mapping("temperature", "gen_ai.request.temperature", _number),
    Mapping("top_p", "gen_ai.request.top_p", _number),
    Mapping("top_k", "gen_ai.request.top_k", _same),
    Mapping("max_tokens", "gen_ai.request.max_tokens", _same),
    Mapping("input_tokens", "gen_ai.usage.input_tokens", _same),
    Mapping("output_tokens", "gen_ai.usage.output_tokens", _same),
    Mapping("cache_read_tokens", "gen_ai.usage.cache_read.input_tokens", _same),
    Mapping("cache_write_tokens", "gen_ai.usage.cache_write.input_tokens", _same),
    Mapping("reasoning_tokens", "gen_ai.usage.reasoning.output_tokens", _same),
    Mapping("first_token_us", "gen_ai.response.time_to_first_chunk", _seconds),
    Mapping("finish_reason", "gen_ai.response.finish_reasons", _listed),
    Mapping("tool_name", "gen_ai.tool.name", _same),
    Mapping("tool_call_id", "gen_ai.tool.call.id", _same),
    Mapping("error_type", "error.type", _same),
    Mapping("run_id", "replaylab.run.id", _same),
    Mapping("request_ref", "replaylab.request.ref", _same),
    Mapping("actor_ref", "replaylab.actor.ref", _same),
    Mapping("tenant_ref", "replaylab.tenant.ref", _same),
    Mapping("component", "replaylab.component", _same),
    Mapping("component_version", "replaylab.component.version", _same),
    Mapping("track", "replaylab.track", _same),
    Mapping("attempt", "replaylab.attempt", _same),
    Mapping("manifest_digest", "replaylab.manifest.digest", _same),
    Mapping("model_route", "replaylab.route", _same),
    Mapping("gen_policy_digest", "replaylab.generation.digest", _same),
    Mapping("engine_id", "replaylab.engine.id", _same),
    Mapping("step", "replaylab.engine.step", _same),
    Mapping("batch_id", "replaylab.sched.batch_id", _same),
    Mapping("batch_size", "replaylab.sched.batch_size", _same),
    Mapping("batch_position", "replaylab.sched.batch_position", _same),
    Mapping("queue_depth", "replaylab.sched.queue_depth", _same),
    Mapping("kv_blocks", "replaylab.sched.kv_blocks", _same),
    Mapping("kv_hit_tokens", "replaylab.sched.kv_hit_tokens", _same),
    Mapping("deadline_us", "replaylab.deadline_us", _same),
    Mapping("status", "replaylab.status", _same),
    Mapping("failure_class", "replaylab.failure.class", _same),
    Mapping("retry_decision", "replaylab.retry.decision", _same),
    Mapping("tool_version", "replaylab.tool.version", _same),
    Mapping("side_effect", "replaylab.side_effect", _same),
    Mapping("effect_origin", "replaylab.effect.origin", _same),
    Mapping("policy_decision", "replaylab.policy.decision", _same),
    Mapping("policy_version", "replaylab.policy.version", _same),
    Mapping("redaction_status", "replaylab.redaction.status", _same),
    Mapping("redaction_policy", "replaylab.redaction.policy", _same),
    Mapping("cost_microusd", "replaylab.cost_microusd", _same),
    Mapping("input_ref", "replaylab.input.ref", _same),
    Mapping("result_ref", "replaylab.result.ref", _same),
)

# vLLM's span attributes, in seconds: written beside ours so that existing boards keep working.
STAGE_ALIASES: tuple[tuple[Stage, str], ...] = (
    (Stage.QUEUEING, "gen_ai.latency.time_in_queue"),
    (Stage.PREFILL, "gen_ai.latency.time_in_model_prefill"),
    (Stage.DECODE, "gen_ai.latency.time_in_model_decode"),
)
END_TO_END_ALIAS = "gen_ai.latency.e2e"
FIRST_TOKEN_ALIAS = "gen_ai.latency.time_to_first_token"
PROMPT_TOKENS_ALIAS = "gen_ai.usage.prompt_tokens"


def attributes_of(event: TraceEvent) -> dict[str, AttributeValue]:
    """Return an event's columns under their exported names; content and the idempotency key are never among them."""
    attributes: dict[str, AttributeValue] = {}
    for mapping in MAPPINGS:
        value: str | int | None = getattr(event, mapping.column)
        if value is not None:
            attributes[mapping.attribute] = mapping.convert(value)
    if event.stage is not None:
        attributes["replaylab.stage"] = event.stage.word
        if event.duration_us is not None:
            seconds = event.duration_us / 1_000_000
            attributes.update({alias: seconds for stage, alias in STAGE_ALIASES if stage is event.stage})
    if event.event_type == "request.terminal" and event.duration_us is not None:
        attributes[END_TO_END_ALIAS] = event.duration_us / 1_000_000
    if event.first_token_us is not None:
        attributes[FIRST_TOKEN_ALIAS] = event.first_token_us / 1_000_000
    if event.input_tokens is not None:
        attributes[PROMPT_TOKENS_ALIAS] = event.input_tokens
    return attributes

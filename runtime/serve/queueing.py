"""Stage 4. When does the work run, with whom, and on which reserved resources?

The engine schedules. One call to the generation service covers this stage, prefill and decode; its result says when the
sequence was first run, when its first token came and when it ended, and the three stages are recorded from these times,
each with what belongs to it. A failure is told by the stage that it happened in.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from manifests.canonical import digest
from manifests.generation import GenerationManifest
from manifests.run import Pins
from runtime.effects import read_clock
from runtime.engine.flow import MeteredReceiver
from runtime.engine.generation import GenerationRequest, GenerationResult, OnToken, Sampling, TokenRecord
from runtime.errors import CapacityRefused, DeadlineExceeded, ProviderFailed, RequestCancelled
from runtime.serve.boundary import Accepted
from runtime.serve.routing import RouteDecision, check_fit
from runtime.serve.services import Services
from runtime.serve.stage import Emitted, OpenStage, RequestTrace, Span, cancelled_by_caller, unexpected_fault
from runtime.serve.turns import Grammar
from traces.failures import ClassifiedError, FailureClass
from traces.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One generation as it went: a result, or a failure that belongs to a later stage."""

    request: GenerationRequest
    result: GenerationResult | None
    failure: ClassifiedError | asyncio.CancelledError | None
    tokens_seen: int
    queued: Span
    elapsed_us: int
    """From submission until the end."""

    @property
    def prefilled(self) -> Span:
        """When the prompt was computed."""
        known = self.result.prefill_us if self.result is not None else max(self.elapsed_us, 0)
        return self.queued.after(known)

    @property
    def decoded(self) -> Span:
        """When output tokens followed."""
        return self.prefilled.after(self.result.decode_us if self.result is not None else 0)


async def schedule(
    trace: RequestTrace,
    services: Services,
    accepted: Accepted,
    decision: RouteDecision,
    *,
    prompt: tuple[int, ...],
    pins: Pins,
    grammar: Grammar | None,
    ordinal: int,
) -> Execution:
    """Submit one generation and wait for its end; raises what belongs to the queue."""
    generation = pins.generation
    received = {
        "prompt": digest(list(prompt)),
        "prompt_tokens": len(prompt),
        "generation": generation.to_document(),
        "grammar": None if grammar is None else grammar.digest,
        "route": decision.route.name,
        "ordinal": ordinal,
    }
    opened = trace.open(Stage.QUEUEING, received)
    try:
        check_fit(accepted, decision.binding, len(prompt))
        remaining = accepted.deadline_us - await read_clock(services.effects, "queueing", services.world.now_us)
        if remaining <= 0:
            raise _late(accepted, "before it was queued")
        await trace.settled()
        request = _request(services, accepted, prompt, generation, grammar, remaining, ordinal)
        execution = await _run(services, decision, request, opened)
        _raise_if_queued_failure(accepted, execution)
    except asyncio.CancelledError:
        trace.fail(opened, cancelled_by_caller(Stage.QUEUEING))
        raise
    except ClassifiedError as error:
        trace.fail(opened, error)
        raise
    trace.close(opened, _emitted(accepted, decision, execution), span=execution.queued)
    return execution


def _request(
    services: Services,
    accepted: Accepted,
    prompt: tuple[int, ...],
    generation: GenerationManifest,
    grammar: Grammar | None,
    remaining_us: int,
    ordinal: int,
) -> GenerationRequest:
    return GenerationRequest(
        sequence_id=f"{services.identity.request_ref}.{ordinal}",
        tenant=accepted.tenant,
        prompt=prompt,
        sampling=Sampling(
            seed=generation.seed,
            temperature=float(generation.temperature),
            top_k=generation.top_k,
            top_p=float(generation.top_p),
            max_tokens=generation.max_tokens,
            stop_token_ids=generation.stop_token_ids,
            stream=f"turn-{ordinal}",
        ),
        grammar=None if grammar is None else grammar.text,
        deadline_us=remaining_us,
        request_ref=services.identity.request_ref,
        priority=accepted.envelope.priority,
    )


async def _run(services: Services, decision: RouteDecision, request: GenerationRequest, opened: OpenStage) -> Execution:
    seen = 0

    def watch(record: TokenRecord) -> None:
        nonlocal seen
        seen += 1
        if services.on_token is not None:
            services.on_token(record)

    _, submitted = services.stamp()
    result: GenerationResult | None = None
    failure: ClassifiedError | asyncio.CancelledError | None = None
    try:
        result = await decision.binding.service.generate(request, _metered(watch, services.on_token))
    except asyncio.CancelledError as error:
        failure = error
    except ClassifiedError as error:
        failure = error
    except Exception as error:  # a fault of the service: contained, classified, told
        failure = unexpected_fault(Stage.PREFILL if seen == 0 else Stage.DECODE, error)
    _, ended = services.stamp()
    waited = submitted - opened.mono_us + (0 if result is None else result.queue_us)
    return Execution(
        request=request,
        result=result,
        failure=failure,
        tokens_seen=seen if result is None else len(result.tokens),
        queued=Span(ts_us=opened.ts_us, mono_us=opened.mono_us, duration_us=waited),
        elapsed_us=ended - submitted,
    )


def _metered(watch: OnToken, asked: OnToken | None) -> OnToken:
    """Return the watching receiver, telling of the same reader as the one that was asked for."""
    return MeteredReceiver(watch, asked.flow) if isinstance(asked, MeteredReceiver) else watch


def _raise_if_queued_failure(accepted: Accepted, execution: Execution) -> None:
    failure, result = execution.failure, execution.result
    if isinstance(failure, ClassifiedError) and execution.tokens_seen == 0:
        if failure.failure_class in (FailureClass.CAPACITY_ADMISSION, FailureClass.VALIDATION_POLICY):
            raise failure
    elif result is not None and not result.steps:
        raise_for(accepted, result, "while it was queued")


def raise_for(accepted: Accepted, result: GenerationResult, when: str) -> None:
    """Raise the failure that a result's finish reason means; nothing for `stop` and `length`."""
    evidence = {
        "deadline_us": accepted.deadline_us,
        "cancellation_origin": result.cancel_origin,
        "emitted_output_count": len(result.tokens),
        "released_resources": "kv_blocks",
    }
    if result.finish_reason == "deadline":
        raise _late(accepted, when, evidence)
    if result.finish_reason == "cancelled":
        raise RequestCancelled(f"The request was cancelled {when}.", reason="cancelled", evidence=evidence)
    if result.finish_reason == "error" and result.error == FailureClass.CAPACITY_ADMISSION:
        raise CapacityRefused(
            f"The engine gave the request up {when}.",
            reason=result.error_type or "given_up",
            evidence={"deadline_us": accepted.deadline_us, "reservation_failure": result.error_type},
            fix="See the engine's events of this request.",
        )
    if result.finish_reason == "error":
        raise ProviderFailed(
            f"The model failed {when}.",
            reason="generation_failed",
            evidence={"error_class": result.error, "output_completeness": f"{len(result.tokens)} tokens"},
            fix="See the engine's events of this request.",
        )


def _late(accepted: Accepted, when: str, evidence: dict[str, Any] | None = None) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The deadline passed {when}.",
        reason="deadline_exceeded",
        evidence=evidence or {"deadline_us": accepted.deadline_us, "emitted_output_count": 0},
        fix="Allow more time in `timeout_us`, or ask for fewer tokens.",
    )


def _emitted(accepted: Accepted, decision: RouteDecision, execution: Execution) -> Emitted:
    request, result = execution.request, execution.result
    scheduling = decision.binding.scheduling
    tokens = len(request.prompt) + request.sampling.max_tokens
    blocks = -(-tokens // scheduling.block_size)
    document = {
        "sequence": request.sequence_id,
        "prompt": digest(list(request.prompt)),
        "priority": accepted.envelope.priority,
        "reserved_blocks": blocks,
        "engine_deadline_us": request.deadline_us,
    }
    steps = () if result is None else result.steps
    record = {
        "batch_membership": {
            "engine": decision.binding.engine_id,
            "first_step": steps[0] if steps else None,
            "last_step": steps[-1] if steps else None,
            "steps": len(steps),
        },
        "reserved_resources": {"kv_blocks": blocks},
        "queue_us": None if result is None else result.queue_us,
        "queue_depth": decision.load,
    }
    columns = {"engine_id": decision.binding.engine_id, "kv_blocks": blocks, "step": steps[0] if steps else None}
    return Emitted(document=document, record=record, columns=columns)

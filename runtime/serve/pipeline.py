"""How does one request go from envelope to response?  The ten stages, in the specification's order, once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from manifests.run import Pins
from runtime.errors import RequestCancelled
from runtime.serve import (
    boundary,
    commitment,
    context,
    decode,
    prefill,
    queueing,
    response,
    routing,
    tooling,
    validation,
)
from runtime.serve.boundary import Accepted
from runtime.serve.commitment import Usage
from runtime.serve.context import ContextPackage
from runtime.serve.decode import Generated
from runtime.serve.envelope import RequestEnvelope, ResponseEnvelope
from runtime.serve.routing import RouteDecision
from runtime.serve.services import Outcome, Services
from runtime.serve.stage import RequestTrace, cancelled_by_caller, unexpected_fault
from runtime.serve.turns import Turn, grammar_of, prompt_of
from traces.failures import ClassifiedError, FailureClass, RetryDecision, TelemetryPersistenceError, decide_retry
from traces.stages import Stage

__all__ = ["Outcome", "Services", "run_request"]

MOST_ROUTES = 2
"""Routes that one generation may be tried on."""


async def run_request(envelope: RequestEnvelope | bytes, services: Services, *, api_key: str | None = None) -> Outcome:
    """Run one request through all stages; a request's own failure is part of the outcome and never raised.

    Args:
        envelope: the request, or its body as it arrived.
        services: everything impure or replaceable.
        api_key: the caller's key; a replay has none, because authentication is answered from the record.

    Raises:
        CancelledError: the caller cancelled; the end is recorded before.
    """
    journey = _Journey(services)
    try:
        packaged = await journey.travel(envelope, api_key)
        failure = None
    except asyncio.CancelledError:
        await asyncio.shield(journey.conclude(None, journey.cancellation()))
        raise
    except ClassifiedError as error:
        packaged, failure = None, error
    except Exception as error:  # a fault between two stages: contained, classified, told
        packaged, failure = None, unexpected_fault(Stage.RESPONSE, error)
    return await journey.conclude(packaged, failure)


@dataclass(slots=True)
class _Progress:
    """What is known of a request so far; kept, so that a failure can tell it."""

    accepted: Accepted | None = None
    context: ContextPackage | None = None
    decision: RouteDecision | None = None
    turns: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    usage: Usage = field(default_factory=Usage)
    repairs: int = 0
    generations: int = 0
    repair_sources: tuple[str, ...] | None = None
    failed_routes: frozenset[str] = frozenset()

    @property
    def pins(self) -> Pins | None:
        """The pins it ran under, as far as they are known."""
        if self.decision is not None:
            return self.decision.pins
        if self.context is not None:
            return self.context.pins
        return None if self.accepted is None else self.accepted.pins


class _Journey:
    """One request on its way."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._trace = RequestTrace(services)
        self._progress = _Progress()

    async def travel(self, envelope: RequestEnvelope | bytes, api_key: str | None) -> ResponseEnvelope:
        """Go through the ten stages; raises the classified failure of the stage that failed."""
        trace, services, so_far = self._trace, self._services, self._progress
        accepted = so_far.accepted = await boundary.receive(trace, services, envelope, api_key)
        known = so_far.context = await context.assemble(trace, services, accepted)
        so_far.decision = await routing.admit(trace, services, accepted, known, without=frozenset())
        while True:
            generated = await self._generate(accepted, known)
            proposal = tooling.proposal_of(generated) if self._may_use_tools(accepted) else None
            if proposal is not None:
                outcome = await tooling.act(
                    trace, services, accepted, known, generated, proposal, ordinal=len(so_far.turns)
                )
                so_far.turns += (outcome.turn,)
                so_far.tools += (outcome.summary,)
                continue
            judgement = await validation.judge(
                trace, services, accepted, known, generated, turns=so_far.turns, repairs=so_far.repairs
            )
            if judgement.repair_sources is None:
                break
            so_far.repairs += 1
            so_far.repair_sources = judgement.repair_sources
        committed = await commitment.commit(trace, services, accepted, known, judgement, so_far.usage)
        return await response.package(
            trace, services, accepted, known, so_far.decision, judgement, committed,
            tools=so_far.tools, repairs=so_far.repairs,
        )  # fmt: skip

    def cancellation(self) -> RequestCancelled:
        """Build the failure of a caller who went away, told by the stage that was running."""
        documents = self._trace.documents
        return cancelled_by_caller(Stage(documents[-1].stage) if documents else Stage.BOUNDARY)

    async def _generate(self, accepted: Accepted, known: ContextPackage) -> Generated:
        """Queue, prefill and decode once; on a failure the retry rules decide whether another route may try."""
        try:
            return await self._generate_once(accepted, known)
        except ClassifiedError as error:
            so_far, decision = self._progress, self._progress.decision
            if decision is None or error.failure_class not in (
                FailureClass.MODEL_PROVIDER, FailureClass.CAPACITY_ADMISSION
            ):  # fmt: skip
                raise
            attempt = len(so_far.failed_routes) + 1
            retry = decide_retry(
                error.failure_class,
                attempt=attempt,
                max_attempts=MOST_ROUTES,
                fallback=bool(decision.fallback_plan) and attempt < MOST_ROUTES,
            )
            error.evidence |= {"attempt": attempt, "fallback": retry.action}
            if retry.action != "fallback":
                raise
            so_far.failed_routes |= {decision.route.name}
        so_far.decision = await routing.admit(
            self._trace, self._services, accepted, known, without=so_far.failed_routes
        )
        return await self._generate(accepted, known)

    async def _generate_once(self, accepted: Accepted, known: ContextPackage) -> Generated:
        trace, so_far, decision = self._trace, self._progress, self._progress.decision
        if decision is None:
            raise RuntimeError("a request is routed before it generates")
        ordinal = so_far.generations
        so_far.generations += 1
        execution = await queueing.schedule(
            trace, self._services, accepted, decision,
            prompt=prompt_of(accepted, known, so_far.turns, decision.binding),
            pins=decision.pins,
            grammar=grammar_of(accepted, known, so_far.turns, sources=so_far.repair_sources),
            ordinal=ordinal,
        )  # fmt: skip
        prefill.observe(trace, accepted, execution)
        generated = decode.observe(trace, accepted, decision.binding, execution)
        cost = routing.cost_of(decision.route, generated.prompt_tokens, len(generated.tokens))
        so_far.usage = so_far.usage.plus(generated.prompt_tokens, len(generated.tokens), cost)
        return generated

    def _may_use_tools(self, accepted: Accepted) -> bool:
        left = accepted.envelope.budget.max_tool_rounds - len(self._progress.turns)
        return accepted.is_support and left > 0 and self._progress.repairs == 0

    async def conclude(self, packaged: ResponseEnvelope | None, failure: ClassifiedError | None) -> Outcome:
        """Record the end, durably, and only then give the outcome out; if it cannot be recorded, fail closed."""
        retry = self._retry_after(failure)
        envelope = packaged if packaged is not None and failure is None else self._failed(failure, retry)
        try:
            await self._trace.settled()
            await self._record_end(envelope, failure, retry)
        except ClassifiedError as unrecorded:
            failure = unrecorded
            unrecorded.stage = unrecorded.stage or Stage.RESPONSE.value
            retry = self._retry_after(unrecorded)
            envelope = self._failed(unrecorded, retry)
        shown = envelope.model_copy(update={"timing": self._timing()})
        return Outcome(
            response=shown.model_dump(mode="json"),
            status=envelope.status,
            failure=None if failure is None else _failure_document(failure, retry),
            documents=tuple(self._trace.documents),
            pins=self._progress.pins,
        )

    def _failed(self, failure: ClassifiedError | None, retry: RetryDecision) -> ResponseEnvelope:
        so_far = self._progress
        error = failure or _nothing_packaged()
        return response.package_failure(
            self._trace, self._services, error, retry, decision=so_far.decision, tools=so_far.tools,
            usage=so_far.usage.to_document(),
        )  # fmt: skip

    def _retry_after(self, failure: ClassifiedError | None) -> RetryDecision:
        if failure is None:
            return RetryDecision("none", "nothing failed")
        if failure.stage == Stage.BOUNDARY.value and failure.failure_class is FailureClass.VALIDATION_POLICY:
            return RetryDecision("none", "refused at the boundary: unchanged input fails again")
        acted = any(tool["side_effect"] != "read" for tool in self._progress.tools)
        accepted = self._progress.accepted
        return decide_retry(
            failure.failure_class,
            attempt=MOST_ROUTES,
            max_attempts=MOST_ROUTES,
            idempotent=accepted is not None and accepted.envelope.idempotency_key is not None and not acted,
            side_effect="ambiguous"
            if failure.evidence.get("side_effect_status") == "ambiguous"
            else "reversible"
            if acted
            else "none",
            cancelled=failure.error_type == "cancelled",
        )

    async def _record_end(
        self, envelope: ResponseEnvelope, failure: ClassifiedError | None, retry: RetryDecision
    ) -> None:
        reference, name = self._trace.put(envelope.to_document())
        _, mono_us = self._services.stamp()
        usage = self._progress.usage
        payload: dict[str, Any] = {"response_digest": name, "status": envelope.status, "retry_reason": retry.reason}
        if failure is not None:
            payload |= failure.to_payload() | {"stage": failure.stage}
        statuses = {"ok": "ok", "cancelled": "cancelled", "review": "review"}
        await self._trace.commit(
            "request.terminal",
            payload=payload,
            parent_span_id=None,
            span_id=self._trace.root_span,
            span_kind="server",
            duration_us=mono_us - self._trace.started[1],
            result_ref=reference,
            status=statuses.get(envelope.status, "error"),
            failure_class=None if failure is None else failure.failure_class,
            error_type=None if failure is None else failure.error_type,
            retry_decision=retry.action,
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
            cost_microusd=usage.cost_microusd,
        )

    def _timing(self) -> dict[str, int]:
        _, mono_us = self._services.stamp()
        return {**self._trace.times_us, "total": mono_us - self._trace.started[1]}


def _failure_document(failure: ClassifiedError, retry: RetryDecision) -> dict[str, Any]:
    return failure.to_payload() | {"stage": failure.stage, "retry": retry.action, "retry_reason": retry.reason}


def _nothing_packaged() -> TelemetryPersistenceError:
    return TelemetryPersistenceError("The request ended without a response.", stage=Stage.RESPONSE.value)

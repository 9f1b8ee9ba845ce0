"""Stage 10. What does the caller get to see?

The versioned response envelope: result, warnings, citations, tool outcomes, route summary, policy and memory, trace id,
usage and times. Prompts, other sources, scores and secrets stay inside. A failed request gets the same envelope with
its class, its reason and what to do.
"""

from __future__ import annotations

import contextlib
from typing import Any

from runtime.errors import OutputRejected
from runtime.serve.boundary import Accepted
from runtime.serve.commitment import Committed
from runtime.serve.context import ContextPackage
from runtime.serve.envelope import RESPONSE_VERSION, FailureReport, ResponseEnvelope
from runtime.serve.routing import RouteDecision
from runtime.serve.services import Services, Status
from runtime.serve.stage import Emitted, RequestTrace
from runtime.serve.validation import Judgement
from traces.failures import ClassifiedError, RetryDecision, TelemetryPersistenceError
from traces.stages import Stage


async def package(
    trace: RequestTrace,
    services: Services,
    accepted: Accepted,
    context: ContextPackage,
    decision: RouteDecision,
    judgement: Judgement,
    committed: Committed,
    *,
    tools: tuple[dict[str, Any], ...],
    repairs: int,
) -> ResponseEnvelope:
    """Package an accepted result; raises OutputRejected when the authority no longer stands."""
    packaged: list[ResponseEnvelope] = []
    received = {"result": judgement.result, "memory": list(committed.memory), "usage": committed.usage.to_document()}

    async def work() -> Emitted:
        _authorize_again(services, accepted)
        envelope = ResponseEnvelope(
            request=services.identity.request_ref,
            status="ok",
            result=judgement.result,
            warnings=judgement.warnings,
            citations=judgement.citations,
            tools=tools,
            route=route_summary(decision),
            policy={
                "version": context.pins.policy.policy_version,
                "decision": "allow",
                "risk": accepted.risk,
                "repairs": repairs,
                "review": None,
            },
            memory=committed.memory,
            trace_id=services.identity.trace_id,
            usage=committed.usage.to_document(),
        )
        packaged.append(envelope)
        return Emitted(document=envelope.to_document(), record=_record(envelope, None))

    await trace.stage(Stage.RESPONSE, received, work)
    return packaged[0]


def route_summary(decision: RouteDecision) -> dict[str, Any]:
    """Return what a caller may know of the route."""
    return {
        "route": decision.route.name,
        "model": decision.binding.artifact.model,
        "package": decision.binding.artifact.package_digest,
        "backend": decision.binding.compiler.backend,
        "precision": decision.binding.compiler.precision,
    }


def package_failure(
    trace: RequestTrace,
    services: Services,
    error: ClassifiedError,
    retry: RetryDecision,
    *,
    decision: RouteDecision | None,
    tools: tuple[dict[str, Any], ...],
    usage: dict[str, int],
) -> ResponseEnvelope:
    """Package a request that did not succeed; rejected output is never part of it."""
    status = status_of(error, retry)
    review = f"review_{services.identity.request_ref.removeprefix('req_')}" if status == "review" else None
    envelope = ResponseEnvelope(
        request=services.identity.request_ref,
        status=status,
        result=None,
        warnings=("Tools acted before the request failed; see `tools`.",) if tools else (),
        tools=tools,
        route=None if decision is None else route_summary(decision),
        policy={"decision": "deny" if status in ("refused", "review") else "none", "review": review},
        trace_id=services.identity.trace_id,
        usage=usage,
        failure=FailureReport(
            failure_class=error.failure_class.value,
            reason=error.error_type,
            stage=None if error.stage is None else Stage(error.stage).word,
            message=error.message,
            fix=error.fix,
            retry=retry.action,
        ),
    )
    received = {"failure": error.error_type, "stage": error.stage, "retry": retry.action}
    with contextlib.suppress(TelemetryPersistenceError):  # the caller is told even when nothing can be recorded
        opened = trace.open(Stage.RESPONSE, received)
        trace.close(opened, Emitted(document=envelope.to_document(), record=_record(envelope, review)))
    return envelope


def status_of(error: ClassifiedError, retry: RetryDecision) -> Status:
    """Return the final status that a failure means."""
    if error.failure_class == "timeout_cancellation":
        return "cancelled"
    if error.stage == Stage.BOUNDARY.value or error.failure_class == "capacity_admission":
        return "refused"
    if retry.action == "escalate":
        return "review"
    return "failed"


def _record(envelope: ResponseEnvelope, review: str | None) -> dict[str, Any]:
    return {
        "response_version": RESPONSE_VERSION,
        "status": envelope.status,
        "warnings": len(envelope.warnings),
        "citations": len(envelope.citations),
        "continuation_ref": None,
        "review_ref": review,
    }


def _authorize_again(services: Services, accepted: Accepted) -> None:
    if services.deployment.tenant(accepted.tenant) is None:
        raise OutputRejected(
            "The tenant is no longer part of the deployment.",
            reason="authority_withdrawn",
            evidence={"failed_rule": "final_authorization", "disposition": "rejected"},
            fix="Ask the operator.",
        )

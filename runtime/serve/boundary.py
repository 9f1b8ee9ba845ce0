"""Stage 1. Who is asking, with what authority, and may the request enter at all?

Refuses malformed, unauthorized, repeated or too frequent work before anything costly. The key is compared with every
known hash in constant time; a replay has no key, because authentication is an effect and answered from the record.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any

from manifests.canonical import digest
from manifests.run import Pins
from runtime.errors import CapacityRefused, RequestRefused, RouteUnavailable
from runtime.serve import masking
from runtime.serve.deployment import DeploymentDocument, hash_key
from runtime.serve.envelope import RequestEnvelope, SupportTask, parse_envelope
from runtime.serve.pinning import candidate_route, derive_pins, permitted_tools, record_pins
from runtime.serve.services import Services
from runtime.serve.stage import Emitted, RequestTrace
from traces.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A request with explicit authority and service objectives."""

    envelope: RequestEnvelope
    tenant: str
    permissions: frozenset[str]
    tools: frozenset[str]
    risk: str
    arrived_us: int
    deadline_us: int
    """UTC microseconds."""
    pins: Pins

    @property
    def is_support(self) -> bool:
        """Whether retrieval, tools and structure apply."""
        return isinstance(self.envelope.task, SupportTask)


async def receive(
    trace: RequestTrace, services: Services, request: RequestEnvelope | bytes, api_key: str | None
) -> Accepted:
    """Parse, authenticate, authorize, rate and accept one request; raises RequestRefused or CapacityRefused."""
    accepted: list[Accepted] = []
    parsed = _parse(request)

    async def work() -> Emitted:
        if isinstance(parsed, RequestRefused):
            raise parsed
        envelope = parsed
        arrived_us = await _arrive(trace, services, envelope)
        pins = _pin(trace, services, envelope)
        identity = await services.effects.perform(
            "identity",
            {"tenant": envelope.tenant, "request": envelope.digest},
            lambda: services.world.authenticate(api_key),
        )
        permissions = authorize(envelope, identity)
        await _take_quota(services, envelope, arrived_us)
        accepted.append(
            Accepted(
                envelope=envelope,
                tenant=envelope.tenant,
                permissions=permissions,
                tools=permitted_tools(envelope, permissions) if isinstance(envelope.task, SupportTask) else frozenset(),
                risk=risk_class(envelope, permissions),
                arrived_us=arrived_us,
                deadline_us=arrived_us + envelope.timeout_us,
                pins=pins,
            )
        )
        return _emitted(trace, accepted[0], identity)

    if isinstance(parsed, RequestEnvelope):
        received = {"request": parsed.digest}
    else:
        received = {"body": request.digest if isinstance(request, RequestEnvelope) else digest(request)}
    await trace.stage(Stage.BOUNDARY, received, work)
    return accepted[0]


def normalized(envelope: RequestEnvelope) -> RequestEnvelope:
    """Return the envelope with its question normalized and secrets masked; doing it twice is doing it once."""
    if not isinstance(envelope.task, SupportTask):
        return envelope
    question, _ = masking.mask(masking.normalize(envelope.task.question))
    if not question:
        raise RequestRefused(
            "The question is empty.", reason="malformed_request", evidence={"fields": ["task.question"]},
            fix="Ask something.",
        )  # fmt: skip
    return envelope.model_copy(update={"task": SupportTask(question=question[:2_000])})


def authenticate(deployment: DeploymentDocument, api_key: str | None) -> dict[str, Any]:
    """Compare a key with every known hash in constant time; the answer never says which part was wrong."""
    presented = hash_key(api_key or "")
    answer: dict[str, Any] = {"known": False}
    for tenant in deployment.tenants:
        for key in tenant.keys:
            if hmac.compare_digest(presented, key.sha256):
                answer = {
                    "known": True,
                    "key_id": key.key_id,
                    "tenant": tenant.name,
                    "delegate": key.actor,
                    "permissions": list(key.permissions),
                }
    return answer


def authorize(envelope: RequestEnvelope, identity: dict[str, Any]) -> frozenset[str]:
    """Return the authority delegated to the request; raises RequestRefused."""
    if not identity["known"]:
        raise RequestRefused(
            "The API key is missing or unknown.",
            reason="unauthenticated",
            evidence={"failed_rule": "api_key"},
            fix="Send `Authorization: Bearer KEY` with a key of this deployment.",
        )
    if identity["tenant"] != envelope.tenant:
        raise RequestRefused(
            "The API key does not belong to the tenant that the request names.",
            reason="forbidden_tenant",
            evidence={"failed_rule": "tenant_of_key"},
            fix="Name the key's own tenant.",
        )
    granted = frozenset[str](identity["permissions"])
    wanted = granted if envelope.permissions is None else frozenset[str](envelope.permissions)
    needed = "answer" if isinstance(envelope.task, SupportTask) else "complete"
    missing = sorted((wanted - granted) | ({needed} - wanted))
    if missing:
        raise RequestRefused(
            f"The request lacks the permission {', '.join(missing)}.",
            reason="forbidden",
            evidence={"failed_rule": "permissions", "missing": missing},
            fix="Delegate it in `permissions`, or use a key that has it.",
        )
    return wanted


def risk_class(envelope: RequestEnvelope, permissions: frozenset[str]) -> str:
    """Classify what the request could change: `read`, `write` or `memory`."""
    if not isinstance(envelope.task, SupportTask):
        return "read"
    if envelope.memory.write and "write_memory" in permissions:
        return "memory"
    return "write" if "create_ticket" in permitted_tools(envelope, permissions) else "read"


async def _arrive(trace: RequestTrace, services: Services, envelope: RequestEnvelope) -> int:
    identity = services.identity
    arrival = await services.effects.perform(
        "arrival",
        {"request": envelope.digest},
        lambda: {
            "request_ref": identity.request_ref, "trace_id": identity.trace_id, "arrived_us": identity.arrived_us
        },
    )  # fmt: skip
    reference, _ = trace.put(envelope.to_document())
    trace.bind(
        actor_ref=envelope.actor,
        tenant_ref=envelope.tenant,
        conversation_ref=envelope.conversation,
        deadline_us=arrival["arrived_us"] + envelope.timeout_us,
    )
    trace.commit_later(
        "request.accepted",
        payload={"version": envelope.version, "task": envelope.task.kind, "label": envelope.trace.label,
                 "arrived_us": arrival["arrived_us"], "envelope_digest": envelope.digest},
        input_ref=reference,
        idempotency_ref=envelope.idempotency_key,
    )  # fmt: skip
    return int(arrival["arrived_us"])


def _pin(trace: RequestTrace, services: Services, envelope: RequestEnvelope) -> Pins:
    binding = candidate_route(envelope, services)
    if binding is None:
        raise RouteUnavailable(
            "No prepared package is loaded.",
            reason="no_package_loaded",
            fix="Prepare a package and activate it on a route.",
        )
    pins = services.repin(derive_pins(envelope, services.deployment, binding, services.tool_facts))
    record_pins(trace, pins, services)
    return pins


async def _take_quota(services: Services, envelope: RequestEnvelope, arrived_us: int) -> None:
    key = envelope.idempotency_key
    reference = None if key is None else digest([envelope.tenant, key])
    without_key = digest(envelope.to_document() | {"idempotency_key": None})
    quota = await services.effects.perform(
        "quota",
        {"tenant": envelope.tenant, "at_us": arrived_us, "idempotency": reference, "request": without_key},
        lambda: services.world.take_quota(envelope.tenant, arrived_us, reference, without_key),
    )
    reason = quota["refused"]
    if reason is None:
        return
    if reason in ("duplicate_request", "idempotency_conflict"):
        raise RequestRefused(
            "This idempotency key was used before"
            + (" with another request." if reason == "idempotency_conflict" else "; the earlier request stands."),
            reason=reason,
            evidence={"failed_rule": "idempotency_key", "earlier_request": quota["earlier_request"]},
            fix="Use a fresh idempotency key for new work; look the earlier request up by its reference.",
        )
    raise CapacityRefused(
        f"The tenant's limit is reached ({reason}).",
        reason=reason,
        evidence={"reservation_failure": reason, "retry_after_us": quota["retry_after_us"], "deadline_us": None},
        fix="Send fewer requests at once, or wait.",
    )


def _emitted(trace: RequestTrace, accepted: Accepted, identity: dict[str, Any]) -> Emitted:
    envelope = accepted.envelope
    authority = {
        "tenant": accepted.tenant,
        "actor": envelope.actor,
        "delegate": identity["delegate"],
        "key_id": identity["key_id"],
        "permissions": sorted(accepted.permissions),
    }
    trace.commit_later(
        "policy.decided",
        payload={"decision": "allow", "rule": "boundary", "risk": accepted.risk,
                 "permissions": sorted(accepted.permissions), "key_id": identity["key_id"]},
        stage=Stage.BOUNDARY,
        policy_decision="allow",
        policy_version=accepted.pins.policy.policy_version,
    )  # fmt: skip
    document = {
        "envelope": envelope.to_document(),
        "authority": authority,
        "tools": sorted(accepted.tools),
        "risk": accepted.risk,
        "arrived_us": accepted.arrived_us,
        "deadline_us": accepted.deadline_us,
    }
    record = {
        "envelope_version": envelope.version,
        "authority": {"key_id": identity["key_id"], "permissions": sorted(accepted.permissions)},
        "risk_class": accepted.risk,
        "deadline_us": accepted.deadline_us,
        "budget": envelope.budget.model_dump(mode="json"),
        "checks": ["size", "schema", "authentication", "tenant", "permissions", "quota", "idempotency"],
    }
    return Emitted(document=document, record=record, columns={"policy_decision": "allow"})


def _parse(request: RequestEnvelope | bytes) -> RequestEnvelope | RequestRefused:
    """Read and normalize the request; a refusal is returned, to be raised inside the stage."""
    try:
        return normalized(request if isinstance(request, RequestEnvelope) else parse_envelope(request))
    except RequestRefused as refusal:
        return refusal

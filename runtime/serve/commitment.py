"""Stage 9. What is kept of this request: evaluation, cost, and memory, each only as far as policy allows?

Memory is written only when the request asks for it, its authority covers it and the deployment's policy allows it; each
memory says where it came from and how long it stays. All mandatory evidence so far is durable before the stage ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manifests.canonical import digest
from runtime.errors import OutputRejected
from runtime.serve import masking
from runtime.serve.boundary import Accepted
from runtime.serve.context import ContextPackage
from runtime.serve.services import Services
from runtime.serve.stage import Emitted, RequestTrace
from runtime.serve.validation import Judgement
from traces.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the request used, over all generations."""

    generations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0

    def plus(self, prompt_tokens: int, output_tokens: int, cost_microusd: int) -> Usage:
        """Return the sum with one more generation."""
        return Usage(
            generations=self.generations + 1,
            prompt_tokens=self.prompt_tokens + prompt_tokens,
            output_tokens=self.output_tokens + output_tokens,
            cost_microusd=self.cost_microusd + cost_microusd,
        )

    def to_document(self) -> dict[str, int]:
        """Return the sums as JSON."""
        return {
            "generations": self.generations,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "cost_microusd": self.cost_microusd,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What was kept."""

    memory: tuple[dict[str, Any], ...]
    usage: Usage


async def commit(
    trace: RequestTrace,
    services: Services,
    accepted: Accepted,
    context: ContextPackage,
    judgement: Judgement,
    usage: Usage,
) -> Committed:
    """Store what may be stored; raises TelemetryPersistenceError when mandatory evidence cannot be."""
    kept: list[Committed] = []
    received = {"result": judgement.result, "evaluation": judgement.evaluation, "usage": usage.to_document()}

    async def work() -> Emitted:
        await trace.settled()
        memory = await _remember(trace, services, accepted, context, judgement)
        await trace.settled()
        kept.append(Committed(memory=memory, usage=usage))
        document = {
            "evaluation": judgement.evaluation, "usage": usage.to_document(), "memory": list(memory)
        }  # fmt: skip
        record = {
            "evaluation": judgement.evaluation,
            "cost_microusd": usage.cost_microusd,
            "memory_mutations": list(memory),
            "redaction_policy": masking.VERSION,
            "retention": {"days": services.deployment.policy.retention_days},
        }
        return Emitted(document=document, record=record, columns={"cost_microusd": usage.cost_microusd})

    await trace.stage(Stage.COMMITMENT, received, work)
    return kept[0]


async def _remember(
    trace: RequestTrace, services: Services, accepted: Accepted, context: ContextPackage, judgement: Judgement
) -> tuple[dict[str, Any], ...]:
    """Write the one memory that a support request may leave: which sources answered this conversation."""
    envelope = accepted.envelope
    if not envelope.memory.write or not accepted.is_support or judgement.result is None:
        return ()
    if "write_memory" not in accepted.permissions or not services.deployment.policy.memory_writes:
        raise OutputRejected(
            "The request asks to write memory, and may not.",
            reason="memory_forbidden",
            evidence={"failed_rule": "memory_policy", "policy_version": context.pins.policy.policy_version},
            fix="Leave `memory.write` out, or use a key with the permission.",
        )
    document = {
        "conversation": envelope.conversation,
        "sources": [citation["source"] for citation in judgement.citations],
        "provenance": services.identity.request_ref,
        "retention_days": services.deployment.policy.retention_days,
    }
    memory_id = digest([accepted.tenant, services.identity.request_ref, document])[7:39]
    trace.commit_later(
        "policy.decided",
        payload={"decision": "allow", "rule": "memory", "memory_id": memory_id},
        stage=Stage.COMMITMENT,
        policy_decision="allow",
        policy_version=context.pins.policy.policy_version,
    )
    await trace.settled()
    stored = await services.effects.perform(
        "memory",
        {"tenant": accepted.tenant, "memory_id": memory_id, "document": document},
        lambda: services.world.remember(accepted.tenant, memory_id, document),
        side_effect="reversible",
    )
    await trace.commit(
        "memory.committed",
        payload={"memory_id": memory_id, "action": stored["action"]},
        stage=Stage.COMMITMENT,
        side_effect="reversible",
    )
    return ({"memory_id": memory_id, "action": stored["action"], "sources": document["sources"]},)

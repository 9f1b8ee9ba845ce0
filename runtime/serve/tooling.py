"""Stage 7. May the tool call that the model proposes be carried out, and what came of it?

The proposal is untrusted. Schema, permission and ownership are checked outside the model; the decision is durable
before the adapter acts; the tenant travels outside the model's arguments; a write carries an idempotency key. A failed
attempt is followed by what the retry rules decide, never by a loop.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, cast

from manifests.canonical import canonical_bytes, digest
from runtime.effects import read_clock
from runtime.errors import DeadlineExceeded, OutputRejected, ToolFailed
from runtime.serve import masking
from runtime.serve.boundary import Accepted
from runtime.serve.context import ContextPackage
from runtime.serve.contracts import TOOL_CONTRACTS, ToolContract
from runtime.serve.decode import Generated
from runtime.serve.schemas import violations
from runtime.serve.services import Services
from runtime.serve.stage import Emitted, RequestTrace
from runtime.serve.turns import Turn, compact
from traces.failures import ClassifiedError, decide_retry
from traces.stages import Stage

MOST_ATTEMPTS = 2
LARGEST_RESULT = 2_000
"""Characters of a tool result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A tool call as the model wrote it."""

    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutcome:
    """A tool call that was carried out."""

    turn: Turn
    summary: dict[str, Any]
    """What the response shows of it."""


def proposal_of(generated: Generated) -> Proposal | None:
    """Return the tool call that an output proposes, or None when it proposes none."""
    try:
        output = json.loads(generated.text)
    except ValueError:
        return None
    if not isinstance(output, dict):
        return None
    fields = cast("dict[str, Any]", output)
    tool, arguments = fields.get("tool"), fields.get("arguments")
    if not isinstance(tool, str) or not isinstance(arguments, dict):
        return None
    return Proposal(tool=tool, arguments=cast("dict[str, Any]", arguments))


async def act(
    trace: RequestTrace,
    services: Services,
    accepted: Accepted,
    context: ContextPackage,
    generated: Generated,
    proposal: Proposal,
    *,
    ordinal: int,
) -> ToolOutcome:
    """Authorize and carry out one proposal; raises OutputRejected when it is denied, tool errors when it fails."""
    done: list[ToolOutcome] = []
    received = {
        "tool": proposal.tool,
        "arguments": proposal.arguments,
        "permitted": sorted(accepted.tools),
        "authorization": context.pins.tools.authorization_version,
    }

    async def work() -> Emitted:
        call = _Call(trace, services, accepted, context, proposal, ordinal)
        contract = await call.authorize()
        result, attempts = await call.carry_out(contract)
        outcome = _outcome(contract, proposal, generated, result)
        done.append(outcome)
        return call.emitted(contract, result, attempts)

    await trace.stage(Stage.TOOLING, received, work)
    return done[0]


class _Call:
    """One proposal on its way through authorization and execution."""

    def __init__(
        self,
        trace: RequestTrace,
        services: Services,
        accepted: Accepted,
        context: ContextPackage,
        proposal: Proposal,
        ordinal: int,
    ) -> None:
        self._trace = trace
        self._services = services
        self._accepted = accepted
        self._pins = context.pins
        self._proposal = proposal
        self._arguments_ref, self._arguments_digest = trace.put(proposal.arguments)
        request_ref = services.identity.request_ref
        # one key for one proposal of one request: every attempt, and every resumption, carries the same
        self.idempotency_key = digest([request_ref, ordinal, proposal.tool, proposal.arguments])[7:39]

    async def authorize(self) -> ToolContract:
        """Decide, deterministically, and make the decision durable; raises OutputRejected on denial."""
        proposal, accepted = self._proposal, self._accepted
        contract = TOOL_CONTRACTS.get(proposal.tool)
        if contract is None or proposal.tool not in accepted.tools:
            raise await self._deny("tool_not_permitted", "The request may not use this tool.")
        if self._pins.tools.tools.get(contract.name) != contract.schema_digest:
            raise await self._deny("tool_not_pinned", "The tool's contract is another one than the pinned one.")
        problems = violations(contract.input_schema, proposal.arguments)
        if problems:
            raise await self._deny("arguments_invalid", f"The arguments break the tool's schema: {problems[0]}.")
        if contract.side_effect != "read" and not await self._owns_account():
            raise await self._deny("account_not_owned", "The account is not one of the tenant's.")
        await self._trace.settled()
        await self._trace.commit("tool.authorized", payload=self._decision("allow", None), **self._columns("allow"))
        return contract

    async def carry_out(self, contract: ToolContract, attempt: int = 1) -> tuple[dict[str, Any], int]:
        """Call the tool; follow a failure by what the retry rules decide. Returns the result and the attempts used."""
        now_us = await read_clock(self._services.effects, "tool", self._services.world.now_us)
        remaining = self._accepted.deadline_us - now_us
        if remaining <= 0:
            raise DeadlineExceeded(
                "The deadline passed before the tool was called.",
                reason="deadline_before_tool",
                evidence={"deadline_us": self._accepted.deadline_us, "emitted_output_count": 0},
                fix="Allow more time in `timeout_us`.",
            )
        try:
            result = self._checked(contract, await self._perform(contract, self._proposal.arguments, remaining))
        except ClassifiedError as error:
            decision = decide_retry(
                error.failure_class,
                attempt=attempt,
                max_attempts=MOST_ATTEMPTS,
                now_us=now_us,
                deadline_us=self._accepted.deadline_us,
                idempotent=contract.side_effect == "reversible",
                side_effect="ambiguous" if error.evidence.get("side_effect_status") == "ambiguous" else "none",
            )
            self._complete(contract, attempt, error=error, retry=decision.action)
            error.evidence |= self._evidence(contract, attempt)
            if decision.action != "retry":
                raise
            if self._services.mode == "live":
                await asyncio.sleep(decision.delay_us / 1_000_000)
            return await self.carry_out(contract, attempt + 1)
        self._complete(contract, attempt, result=result)
        if "error" in result:
            raise await self._deny("account_not_owned", "The account is not one of the tenant's.")
        return result, attempt

    def emitted(self, contract: ToolContract, result: dict[str, Any], attempts: int) -> Emitted:
        """Return the stage's document and record."""
        status = "none" if contract.side_effect == "read" else "committed"
        document = {
            "tool": contract.name,
            "version": contract.version,
            "arguments": self._proposal.arguments,
            "result": result,
            "side_effect": contract.side_effect,
            "side_effect_status": status,
            "idempotency_key": self.idempotency_key,
            "authorization": self._pins.tools.authorization_version,
        }
        record = {
            "tool": {"name": contract.name, "version": contract.version},
            "authorization": True,
            "arguments_ref": self._arguments_ref,
            "side_effect_status": status,
            "attempts": attempts,
            "approval_state": "not_required",
        }
        columns = {"tool_name": contract.name, "tool_version": contract.version, "side_effect": contract.side_effect}
        return Emitted(document=document, record=record, columns=columns)

    async def _owns_account(self) -> bool:
        """Read before the write: whether the tenant has the account that the proposal names."""
        contract = TOOL_CONTRACTS["lookup_account"]
        now_us = await read_clock(self._services.effects, "tool", self._services.world.now_us)
        account = {"account": self._proposal.arguments["account"]}
        found = await self._perform(contract, account, self._accepted.deadline_us - now_us)
        return "error" not in found

    async def _perform(self, contract: ToolContract, arguments: dict[str, Any], remaining_us: int) -> dict[str, Any]:
        timeout_us = max(1, min(self._services.deployment.tools.timeout_us, remaining_us))
        tenant, key = self._accepted.tenant, self.idempotency_key
        return await self._services.effects.perform(
            "tool",
            {
                "tool": contract.name,
                "version": contract.version,
                "arguments": arguments,
                "tenant": tenant,
                "idempotency_key": key,
            },
            lambda: self._services.world.call_tool(
                contract.name, arguments, tenant=tenant, idempotency_key=key, timeout_us=timeout_us
            ),
            side_effect=contract.side_effect,
        )

    def _checked(self, contract: ToolContract, result: dict[str, Any]) -> dict[str, Any]:
        """Hold a result to its contract; an `error` result is a definite refusal and passes."""
        if set(result) == {"error"}:
            return result
        wanted = contract.result_fields
        valid = set(result) == set(wanted) and all(isinstance(result[name], str) for name in wanted)
        if not valid or len(canonical_bytes(result)) > LARGEST_RESULT:
            raise ToolFailed(
                f"The tool {contract.name!r} answered outside its contract.",
                reason="invalid_tool_result",
                evidence={"side_effect_status": "none" if contract.side_effect == "read" else "committed"},
                fix="Check the tool server's version against the contract.",
            )
        return {name: masking.mask(result[name])[0] for name in wanted}

    async def _deny(self, reason: str, message: str) -> OutputRejected:
        await self._trace.commit("tool.authorized", payload=self._decision("deny", reason), **self._columns("deny"))
        return OutputRejected(
            message,
            reason=reason,
            evidence={
                "failed_rule": reason,
                "policy_version": self._pins.policy.policy_version,
                "validator_version": self._pins.tools.authorization_version,
                "redacted_sample": {"tool": self._proposal.tool, "arguments_digest": self._arguments_digest},
                "disposition": "rejected",
            },
            fix="Ask about the tenant's own accounts, with permitted tools.",
        )

    def _decision(self, decision: str, reason: str | None) -> dict[str, Any]:
        return {
            "decision": decision,
            "rule": reason or "tool",
            "tool": self._proposal.tool,
            "arguments_ref": self._arguments_ref,
            "authorization_version": self._pins.tools.authorization_version,
        }

    def _columns(self, decision: str) -> dict[str, Any]:
        contract = TOOL_CONTRACTS.get(self._proposal.tool)
        return {
            "stage": Stage.TOOLING,
            "tool_name": self._proposal.tool[:64],
            "tool_version": None if contract is None else contract.version,
            "tool_call_id": self.idempotency_key,
            "side_effect": None if contract is None else contract.side_effect,
            "policy_decision": decision,
            "policy_version": self._pins.policy.policy_version,
        }

    def _complete(
        self,
        contract: ToolContract,
        attempt: int,
        *,
        result: dict[str, Any] | None = None,
        error: ClassifiedError | None = None,
        retry: str | None = None,
    ) -> None:
        self._trace.emit(
            "tool.completed",
            payload={} if error is None else error.to_payload(),
            **self._columns("allow"),
            attempt=attempt,
            idempotency_ref=self.idempotency_key,
            status="ok" if error is None else "error",
            failure_class=None if error is None else error.failure_class,
            error_type=None if error is None else error.error_type,
            retry_decision=retry,
            input_ref=self._arguments_ref,
            result_ref=None if result is None else self._trace.put(result)[0],
        )

    def _evidence(self, contract: ToolContract, attempt: int) -> dict[str, Any]:
        return {
            "tool_version": contract.version,
            "arguments_ref": self._arguments_ref,
            "idempotency_ref": self.idempotency_key,
            "authorization_decision": "allow",
            "attempt_history": attempt,
        }


def _outcome(contract: ToolContract, proposal: Proposal, generated: Generated, result: dict[str, Any]) -> ToolOutcome:
    source = result["ticket"] if contract.name == "create_ticket" else f"A-{result['account']}"
    ordered = {name: result[name] for name in contract.result_fields}
    turn = Turn(tool=contract.name, call=generated.text, result=compact(ordered), source=source)
    summary = {
        "tool": contract.name,
        "version": contract.version,
        "arguments": proposal.arguments,
        "result": result,
        "side_effect": contract.side_effect,
    }
    return ToolOutcome(turn=turn, summary=summary)

"""Stage 8. Is the output fit to be shown, and if not, may it be repaired?

Rules in order: complete, JSON by schema, no tool call left over, sources among those provided, no secret, grounded to
the threshold. A repair is one further generation under a tighter grammar, only when the policy has one left and the
broken rule can be repaired by it; everything else is rejected and never shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

from manifests.canonical import digest
from runtime.errors import OutputRejected
from runtime.serve import masking
from runtime.serve.boundary import Accepted
from runtime.serve.context import ContextPackage
from runtime.serve.decode import Generated
from runtime.serve.pinning import support_schema
from runtime.serve.schemas import violations
from runtime.serve.services import Services
from runtime.serve.stage import Emitted, RequestTrace
from runtime.serve.turns import Turn, provided_sources
from traces.failures import decide_retry
from traces.stages import Stage

REPAIRABLE = frozenset({"incomplete", "schema", "citations", "tool_budget"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What was decided about one output."""

    result: dict[str, Any] | None
    """The accepted result; None when a repair is to follow."""
    citations: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    evaluation: dict[str, str]
    """Evaluation name to a decimal number."""
    repair_sources: tuple[str, ...] | None
    """What the repaired output may cite; None unless a repair is to follow."""


async def judge(
    trace: RequestTrace,
    services: Services,
    accepted: Accepted,
    context: ContextPackage,
    generated: Generated,
    *,
    turns: tuple[Turn, ...],
    repairs: int,
) -> Judgement:
    """Accept the output, ask for one repair, or raise OutputRejected."""
    judged: list[Judgement] = []
    sources = provided_sources(context, turns)
    received = {
        "text": generated.text,
        "finish_reason": generated.finish_reason,
        "sources": list(sources),
        "policy": context.pins.policy.to_document(),
        "repairs": repairs,
    }

    async def work() -> Emitted:
        judgement, failed = _examine(accepted, context, generated, turns, sources)
        disposition = "accepted"
        if failed:
            _decide(trace, context, failed, repairs, sources)
            disposition = "repair"
            judgement = _repair(sources)
        _record_decision(trace, context, disposition, failed)
        judged.append(judgement)
        return _emitted(context, judgement, failed, repairs, disposition)

    await trace.stage(Stage.VALIDATION, received, work)
    return judged[0]


def _examine(
    accepted: Accepted, context: ContextPackage, generated: Generated, turns: tuple[Turn, ...], sources: tuple[str, ...]
) -> tuple[Judgement, list[str]]:
    """Apply every rule; returns the judgement as if accepted, and the rules that failed."""
    if not accepted.is_support:
        result: dict[str, Any] = {"tokens": list(generated.tokens), "text": generated.text}
        return _accept(result, (), {}, ()), [] if generated.tokens else ["incomplete"]
    failed = ["incomplete"] if generated.finish_reason != "stop" else []
    try:
        output = json.loads(generated.text)
    except ValueError:
        return _accept({}, (), {}, ()), [*failed, "schema"]
    if violations(support_schema(frozenset(context.pins.tools.tools)), output):
        return _accept({}, (), {}, ()), [*failed, "schema"]
    fields = cast("dict[str, Any]", output)
    if "tool" in fields:
        return _accept({}, (), {}, ()), [*failed, "tool_budget"]
    cited = [str(source) for source in fields["sources"]]
    if accepted.envelope.output.require_citations and any(source not in sources for source in cited):
        failed.append("citations")
    if masking.mask(fields["answer"])[1]:
        failed.append("secrets")
    grounded = _groundedness(fields["answer"], cited, context, turns)
    evaluation = {"groundedness": grounded}
    least = context.pins.policy.thresholds.get("groundedness", "0")
    if Decimal(grounded) < Decimal(least):
        failed.append("groundedness")
    warnings = () if Decimal(grounded) >= Decimal("0.5") else ("The answer's words are mostly not in its sources.",)
    return _accept(fields, _citations(cited, context, turns), evaluation, warnings), failed


def _accept(
    result: dict[str, Any],
    citations: tuple[dict[str, Any], ...],
    evaluation: dict[str, str],
    warnings: tuple[str, ...],
) -> Judgement:
    return Judgement(result=result, citations=citations, warnings=warnings, evaluation=evaluation, repair_sources=None)


def _repair(sources: tuple[str, ...]) -> Judgement:
    return Judgement(result=None, citations=(), warnings=(), evaluation={}, repair_sources=sources)


def _decide(
    trace: RequestTrace, context: ContextPackage, failed: list[str], repairs: int, sources: tuple[str, ...]
) -> None:
    """Return when the retry rules allow a repair; raises OutputRejected otherwise."""
    policy = context.pins.policy
    repairable = set(failed) <= REPAIRABLE and bool(sources)
    decision = decide_retry(
        OutputRejected.bound_class, attempt=repairs + 1, max_attempts=policy.repair_limit + 1, repairable=repairable
    )
    if decision.action == "repair":
        return
    _record_decision(trace, context, "rejected", failed)
    raise OutputRejected(
        f"The output broke the rule {', '.join(failed)} and is not shown.",
        reason=f"output_{failed[0]}",
        evidence={
            "validator_version": dict(policy.validators),
            "policy_version": policy.policy_version,
            "failed_rule": failed,
            "redacted_sample": None,
            "repair_attempts": repairs,
            "disposition": "rejected",
        },
        fix="A person should look at it; the trace holds the output.",
    )


def _record_decision(trace: RequestTrace, context: ContextPackage, disposition: str, failed: list[str]) -> None:
    decision = {"accepted": "allow", "repair": "repair", "rejected": "deny"}[disposition]
    trace.commit_later(
        "policy.decided",
        payload={"decision": decision, "rule": "output", "failed_rules": failed},
        stage=Stage.VALIDATION,
        policy_decision=decision,
        policy_version=context.pins.policy.policy_version,
    )


def _citations(cited: list[str], context: ContextPackage, turns: tuple[Turn, ...]) -> tuple[dict[str, Any], ...]:
    articles = {piece.article: piece.text_digest for piece in context.pieces}
    results = {turn.source: digest(turn.result.encode()) for turn in turns}
    return tuple(
        {
            "source": source,
            "kind": "article" if source in articles else "tool_result" if source in results else "unknown",
            "digest": articles.get(source) or results.get(source),
        }
        for source in cited
    )


def _groundedness(answer: str, cited: list[str], context: ContextPackage, turns: tuple[Turn, ...]) -> str:
    """Return the share of the answer's words that its sources contain, as decimal text with three digits."""
    texts = [piece.text for piece in context.pieces if piece.article in cited]
    texts += [turn.result for turn in turns if turn.source in cited]
    known = _words(" ".join(texts))
    words = _words(answer)
    if not words:
        return "0"
    share = sum(word in known for word in words) * 1_000 // len(words)
    return "1" if share == 1_000 else f"0.{share:03d}"


def _words(text: str) -> frozenset[str]:
    return frozenset("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


def _emitted(
    context: ContextPackage, judgement: Judgement, failed: list[str], repairs: int, disposition: str
) -> Emitted:
    policy = context.pins.policy
    document = {
        "disposition": disposition,
        "failed_rules": failed,
        "result": judgement.result,
        "citations": list(judgement.citations),
        "warnings": list(judgement.warnings),
        "evaluation": judgement.evaluation,
    }
    record = {
        "validators": dict(policy.validators),
        "policy_version": policy.policy_version,
        "failed_rules": failed,
        "repair_attempts": repairs,
        "disposition": disposition,
    }
    columns = {"policy_decision": "allow" if disposition == "accepted" else "repair",
               "policy_version": policy.policy_version}  # fmt: skip
    return Emitted(document=document, record=record, columns=columns)

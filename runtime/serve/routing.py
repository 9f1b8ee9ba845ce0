"""Stage 3. Which route serves the request, and may it enter now?

Candidates are tried in the deployment's order: the wanted route, then its fallbacks. A candidate must have the
capability, be loaded and healthy, have room, fit the prompt and keep below the cost ceiling; the first that does is
taken. Health is an effect, so a replay decides on what was known then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manifests.run import Pins
from runtime.effects import read_clock
from runtime.errors import CapacityRefused, DeadlineExceeded, InputOutsideGuard, RequestRefused, RouteUnavailable
from runtime.serve.boundary import Accepted
from runtime.serve.context import ContextPackage
from runtime.serve.deployment import RouteRecord
from runtime.serve.envelope import CompletionTask
from runtime.serve.pinning import record_pins
from runtime.serve.services import RouteBinding, Services
from runtime.serve.stage import Emitted, RequestTrace
from runtime.serve.turns import opening_prompt
from traces.failures import ClassifiedError
from traces.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDecision:
    """An admitted request on its route."""

    route: RouteRecord
    binding: RouteBinding
    pins: Pins
    prompt: tuple[int, ...]
    """Tokens of the opening prompt."""
    fallback_plan: tuple[str, ...]
    estimated_cost: int
    """Millionths of a dollar, for one generation of full length."""
    load: int
    """Generations that ran or waited on the route when the request was admitted."""


async def admit(
    trace: RequestTrace, services: Services, accepted: Accepted, context: ContextPackage, *, without: frozenset[str]
) -> RouteDecision:
    """Choose a route that is not in `without`; raises a classified refusal when none can serve."""
    decided: list[RouteDecision] = []
    names = [name for name in _candidates(services, accepted) if name not in without]
    received: dict[str, Any] = {
        "context": context.context_digest,
        "candidates": names,
        "deadline_us": accepted.deadline_us,
        "budget": accepted.envelope.budget.model_dump(mode="json"),
    }

    async def work() -> Emitted:
        now_us = await read_clock(services.effects, "admission", services.world.now_us)
        if now_us >= accepted.deadline_us:
            raise DeadlineExceeded(
                "The deadline passed before the request was admitted.",
                reason="deadline_before_admission",
                evidence={"deadline_us": accepted.deadline_us, "emitted_output_count": 0},
                fix="Allow more time in `timeout_us`.",
            )
        refusals: list[ClassifiedError] = []
        for place, name in enumerate(names):
            try:
                decision = await _consider(services, accepted, context, name, tuple(names[place + 1 :]))
            except ClassifiedError as refusal:
                refusals.append(refusal)
                continue
            decided.append(decision)
            return _emitted(accepted, decision, refusals)
        raise _nothing(accepted, names, refusals)

    await trace.stage(Stage.ROUTING, received, work)
    decision = decided[0]
    trace.bind(model_route=decision.route.name, response_model=decision.binding.artifact.model, provider="replaylab")
    if decision.pins != context.pins:
        record_pins(trace, decision.pins, services)
    return decision


def _candidates(services: Services, accepted: Accepted) -> list[str]:
    wanted = accepted.envelope.model.route or services.deployment.default_route
    record = services.deployment.route(wanted)
    fallback = record.fallback if record is not None and accepted.envelope.model.allow_fallback else ()
    return [wanted, *fallback]


async def _consider(
    services: Services, accepted: Accepted, context: ContextPackage, name: str, rest: tuple[str, ...]
) -> RouteDecision:
    record = services.deployment.route(name)
    if record is None:
        raise RequestRefused(
            f"There is no route {name!r}.",
            reason="unknown_route",
            evidence={"failed_rule": "route", "known": [route.name for route in services.deployment.routes]},
            fix="Leave `model.route` out, or name a known route.",
        )
    health = await services.effects.perform("health", {"route": name}, lambda: services.world.route_health(name))
    binding = services.routes.get(name)
    if not health["loaded"] or binding is None:
        raise RouteUnavailable(
            f"Route {name!r} has no loaded package.", reason="route_not_loaded", evidence={"model_version": name},
            fix="Activate a prepared package on it.",
        )  # fmt: skip
    if accepted.envelope.task.kind not in record.capabilities:
        raise RouteUnavailable(
            f"Route {name!r} cannot serve {accepted.envelope.task.kind} tasks.",
            reason="capability",
            evidence={"operator_details": accepted.envelope.task.kind},
            fix="Choose a route with the capability.",
        )
    if health["breaker"] == "open" or health["in_flight"] >= record.max_concurrent:
        raise CapacityRefused(
            f"Route {name!r} takes no more work now.",
            reason="breaker_open" if health["breaker"] == "open" else "route_concurrency",
            evidence={"queue_depth": health["in_flight"], "provider_health": health["breaker"], "route_decision": name},
            fix="Try again later, or allow fallbacks.",
        )
    prompt = opening_prompt(accepted, context, binding)
    check_fit(accepted, binding, len(prompt))
    cost = cost_of(record, len(prompt), accepted.pins.generation.max_tokens)
    if cost > accepted.envelope.budget.max_cost_microusd:
        raise CapacityRefused(
            f"One generation on {name!r} may cost {cost} microdollars, above the ceiling.",
            reason="cost_ceiling",
            evidence={"reservation_failure": "cost", "route_decision": name},
            fix="Raise `budget.max_cost_microusd` or shorten the request.",
        )
    pins = context.pins.replace(
        artifact=binding.artifact, compiler=binding.compiler, hardware=binding.hardware, scheduling=binding.scheduling
    )
    pins = pins if services.mode == "live" else context.pins
    return RouteDecision(
        route=record,
        binding=binding,
        pins=pins,
        prompt=prompt,
        fallback_plan=rest,
        estimated_cost=cost,
        load=health["in_flight"],
    )


def check_fit(accepted: Accepted, binding: RouteBinding, prompt_tokens: int) -> None:
    """Refuse a prompt that the package was not compiled for; raises InputOutsideGuard."""
    limit = min(accepted.envelope.budget.max_input_tokens, binding.max_positions - accepted.pins.generation.max_tokens)
    task = accepted.envelope.task
    foreign = isinstance(task, CompletionTask) and max(task.prompt_tokens) >= binding.vocab_size
    if prompt_tokens <= limit and not foreign:
        return
    raise InputOutsideGuard(
        f"The prompt has a token outside the vocabulary of {binding.vocab_size}."
        if foreign
        else f"The prompt has {prompt_tokens} tokens; {max(limit, 0)} fit on route {binding.route!r}.",
        reason="token_outside_vocabulary" if foreign else "prompt_too_long",
        evidence={
            "input_signature": {"prompt_tokens": prompt_tokens},
            "guard": f"prompt_tokens <= {limit}, token < {binding.vocab_size}",
            "cache_key": binding.artifact.package_digest,
            "selected_fallback": None,
        },
        fix="Shorten the prompt, or choose a route with more positions.",
    )


def cost_of(route: RouteRecord, prompt_tokens: int, output_tokens: int) -> int:
    """Return the price of one generation in millionths of a dollar, rounded up."""
    return -(-(prompt_tokens * route.input_cost + output_tokens * route.output_cost) // 1_000)


def _nothing(accepted: Accepted, names: list[str], refusals: list[ClassifiedError]) -> ClassifiedError:
    """Return the first candidate's refusal, told about all of them."""
    if not refusals:
        return RouteUnavailable(
            "No route is left to try.", reason="no_route_left", evidence={"model_version": None, "tried": names},
            fix="Allow fallbacks, or activate another route.",
        )  # fmt: skip
    first = refusals[0]
    first.evidence["tried"] = [f"{name}: {refusal.error_type}" for name, refusal in zip(names, refusals, strict=True)]
    first.evidence.setdefault("deadline_us", accepted.deadline_us)
    return first


def _emitted(accepted: Accepted, decision: RouteDecision, refusals: list[ClassifiedError]) -> Emitted:
    profile = {
        "package": decision.binding.artifact.package_digest,
        "residency": decision.route.residency,
        "prompt_tokens": len(decision.prompt),
        "max_tokens": accepted.pins.generation.max_tokens,
    }
    document = {
        "route": decision.route.name,
        "profile": profile,
        "priority": accepted.envelope.priority,
        "admission": "admitted",
        "passed_over": [refusal.error_type for refusal in refusals],
        "fallback_plan": list(decision.fallback_plan),
        "estimated_cost_microusd": decision.estimated_cost,
    }
    record = {
        "route": decision.route.name,
        "execution_profile": profile,
        "priority": accepted.envelope.priority,
        "admission": "admitted",
        "fallback_plan": list(decision.fallback_plan),
    }
    return Emitted(document=document, record=record, columns={"queue_depth": decision.load})

"""Under which pins does this request run?  Eight dimensions, derived from deployment, request and package."""

from __future__ import annotations

import json
from typing import Any

from manifests.canonical import canonical_bytes, digest
from manifests.context import ContextManifest
from manifests.generation import GenerationManifest
from manifests.policy import PolicyManifest
from manifests.run import Pins
from manifests.tools import ToolsManifest
from runtime.engine.sampling import SAMPLER_ALGORITHM
from runtime.models.reference.prompt import output_schema
from runtime.serve import masking
from runtime.serve.contracts import TOOL_CONTRACTS
from runtime.serve.deployment import DeploymentDocument
from runtime.serve.envelope import RequestEnvelope, SupportTask
from runtime.serve.services import RouteBinding, Services, ToolFacts
from runtime.serve.stage import RequestTrace

VALIDATORS = {"json-schema": "jsonschema-rs/0.60.3", "citations": "1", "secrets": masking.VERSION, "completeness": "1"}
EVALUATION = {"groundedness": "word-overlap/1"}


def support_schema(tools: frozenset[str], sources: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return the support task's output schema with only these tools, and only these sources where given."""
    whole = output_schema()
    options: list[dict[str, Any]] = []
    for option in whole["anyOf"]:
        properties: dict[str, Any] = option["properties"]
        if "tool" in properties:
            if properties["tool"]["const"] in tools:
                options.append(option)
        elif sources is not None:
            listed = properties["sources"] | {"items": {"enum": list(sources)}}
            options.append(option | {"properties": properties | {"sources": listed}})
        else:
            options.append(option)
    return {"anyOf": options}


def schema_text(schema: dict[str, Any]) -> str:
    """Return a schema as the grammar's text; the order of properties is the order of the output, so it is kept."""
    return json.dumps(schema, separators=(",", ":"))


def schema_digest(schema: dict[str, Any]) -> str:
    """Name a grammar by its text."""
    return digest(schema_text(schema).encode())


def permitted_tools(envelope: RequestEnvelope, permissions: frozenset[str]) -> frozenset[str]:
    """Return the tools that the request allows and its authority covers."""
    return frozenset(
        name
        for name in envelope.tools.allowed
        if name in TOOL_CONTRACTS and TOOL_CONTRACTS[name].permission in permissions
    )


def derive_pins(
    envelope: RequestEnvelope, deployment: DeploymentDocument, binding: RouteBinding, facts: ToolFacts
) -> Pins:
    """Return the pins that deployment, request and package give together, before any context is known."""
    support = isinstance(envelope.task, SupportTask)
    tools = frozenset(envelope.tools.allowed) & frozenset(TOOL_CONTRACTS) if support else frozenset[str]()
    grammar = schema_digest(support_schema(tools)) if support else None
    settings, policy, retrieval = envelope.generation, deployment.policy, deployment.retrieval
    return Pins(
        artifact=binding.artifact,
        compiler=binding.compiler,
        hardware=binding.hardware,
        scheduling=binding.scheduling,
        generation=GenerationManifest(
            seed=settings.seed,
            sampler="greedy" if settings.temperature == "0" else "categorical",
            sampler_algorithm=SAMPLER_ALGORITHM,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            stop_token_ids=binding.stop_token_ids if support else (),
            grammar_digest=grammar,
        ),
        context=ContextManifest(
            query_transform=retrieval.query_transform,
            index_digest=retrieval.index_digest,
            filters={"tenant": "bound", "max_articles": str(envelope.context.max_articles)},
            ranking=retrieval.ranking,
            redaction_version=retrieval.redaction_version,
            token_budget=envelope.context.token_budget,
        )
        if support and envelope.context.sources
        else ContextManifest(),
        tools=ToolsManifest(
            server=facts.server,
            server_version=facts.server_version,
            protocol_version=facts.protocol_version,
            tools={name: TOOL_CONTRACTS[name].schema_digest for name in sorted(tools)},
            authorization_version=deployment.tools.authorization_version,
        )
        if tools
        else ToolsManifest(),
        policy=PolicyManifest(
            policy_version=policy.policy_version,
            validators=VALIDATORS,
            output_schema_digest=grammar,
            evaluation=EVALUATION,
            thresholds=dict(policy.thresholds),
            repair_limit=min(policy.repair_limit, envelope.output.max_repairs),
        ),
    )


def candidate_route(envelope: RequestEnvelope, services: Services) -> RouteBinding | None:
    """Return the binding that the request would take first, or any that is loaded."""
    wanted = envelope.model.route or services.deployment.default_route
    return services.routes.get(wanted) or next(iter(services.routes.values()), None)


def record_pins(trace: RequestTrace, pins: Pins, services: Services) -> None:
    """Begin to record `request.manifest`; `trace.settled` waits for it. The last one of a request holds."""
    manifest = pins.manifest(mode=services.mode, parent=services.parent)
    documents, _ = trace.put(pins.to_documents())
    reference = services.recorder.put_blob(canonical_bytes(manifest.to_document()))
    trace.bind(manifest_digest=manifest.digest)
    trace.commit_later(
        "request.manifest",
        payload={"manifest": manifest.to_document()},
        input_ref=reference,
        result_ref=documents,
        gen_policy_digest=pins.generation.digest,
        seed=pins.generation.seed,
        temperature=pins.generation.temperature,
        top_p=pins.generation.top_p,
        top_k=pins.generation.top_k,
        max_tokens=pins.generation.max_tokens,
        request_model=pins.artifact.model,
    )

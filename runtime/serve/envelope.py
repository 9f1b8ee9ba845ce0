"""What may a caller ask for, and in which words?  The versioned request envelope and the versioned response envelope.

The request is checked here before anything costly happens: strict types, unknown fields refused, every text, list and
number bounded. The fields are the specification's request contract: actor, tenant, task, permissions, deadline, budget,
context policy, model constraints, tools, memory, output contract and trace settings.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manifests.base import DecimalText
from manifests.canonical import digest
from runtime.errors import RequestRefused

REQUEST_VERSION = "replaylab.request/1"
RESPONSE_VERSION = "replaylab.response/1"
LARGEST_BODY_BYTES = 64 * 1024
"""Largest request body; a completion of 8,192 token ids fits."""
LARGEST_QUESTION = 2_000
LARGEST_PROMPT_TOKENS = 8_192
LARGEST_TEMPERATURE = 5

Permission = Literal["answer", "complete", "read_accounts", "create_tickets", "write_memory"]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]
"""A short identifier."""
Microseconds = Annotated[int, Field(ge=1, le=3_600_000_000)]


class EnvelopePart(BaseModel):
    """Frozen, strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SupportTask(EnvelopePart):
    """A customer's question to the support desk."""

    kind: Literal["support"] = "support"
    question: Annotated[str, Field(min_length=1, max_length=LARGEST_QUESTION)]


class CompletionTask(EnvelopePart):
    """A raw token prompt to continue, as in a trace workload: no retrieval, no tools, no structure."""

    kind: Literal["completion"] = "completion"
    prompt_tokens: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1, max_length=LARGEST_PROMPT_TOKENS)
    ]


Task = Annotated[SupportTask | CompletionTask, Field(discriminator="kind")]


class Budget(EnvelopePart):
    """What the request may use up."""

    max_input_tokens: Annotated[int, Field(ge=1, le=LARGEST_PROMPT_TOKENS)] = LARGEST_PROMPT_TOKENS
    """Largest prompt of one generation."""
    max_cost_microusd: Annotated[int, Field(ge=0, le=10**9)] = 1_000_000
    """Ceiling over all generations, in millionths of a dollar."""
    max_tool_rounds: Annotated[int, Field(ge=0, le=4)] = 2
    """Tool calls that the model may make."""


class ContextPolicy(EnvelopePart):
    """What the model may be given to read."""

    sources: Annotated[tuple[Literal["articles"], ...], Field(max_length=1)] = ("articles",)
    """Allowed sources; empty means no retrieval."""
    max_articles: Annotated[int, Field(ge=0, le=8)] = 3
    token_budget: Annotated[int, Field(ge=0, le=LARGEST_PROMPT_TOKENS)] = 160
    """Most tokens of retrieved text."""


class ModelConstraints(EnvelopePart):
    """Which routes may serve the request."""

    route: Name | None = None
    """A route by name; None takes the deployment's default."""
    allow_fallback: bool = True
    """Whether another route may serve it when the first cannot."""


class ToolPolicy(EnvelopePart):
    """Which tools the model may propose; permissions decide apart from this whether a proposal is carried out."""

    allowed: Annotated[tuple[Name, ...], Field(max_length=8)] = ("lookup_account", "create_ticket")


class MemoryPolicy(EnvelopePart):
    """Whether the request may change long-term memory."""

    write: bool = False


class OutputContract(EnvelopePart):
    """What the answer must look like."""

    schema_name: Literal["support.output/1", "tokens/1"] | None = None
    """None takes the task's own."""
    require_citations: bool = True
    """Whether every cited source must be among those that were provided."""
    max_repairs: Annotated[int, Field(ge=0, le=1)] = 1
    """Further generations allowed to repair one rejected output."""


class GenerationSettings(EnvelopePart):
    """How tokens are chosen."""

    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    temperature: DecimalText = "0"
    """Decimal text, because floats are not hashed; "0" is greedy."""
    top_k: Annotated[int, Field(ge=1, le=100_000)] | None = None
    top_p: DecimalText = "1"
    """Above 0, at most 1."""
    max_tokens: Annotated[int, Field(ge=1, le=2_048)] = 96

    @model_validator(mode="after")
    def _in_range(self) -> GenerationSettings:
        if not 0 <= Decimal(self.temperature) <= LARGEST_TEMPERATURE:
            raise ValueError(f"temperature is from 0 to {LARGEST_TEMPERATURE}")
        if not 0 < Decimal(self.top_p) <= 1:
            raise ValueError("top_p is above 0 and at most 1")
        return self


class TraceSettings(EnvelopePart):
    """What the caller wishes to have recorded; mandatory evidence is always recorded."""

    label: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.\-]*$")] = ""
    """A name to find the request by."""


class RequestEnvelope(EnvelopePart):
    """One request, version 1."""

    version: Literal["replaylab.request/1"] = REQUEST_VERSION
    tenant: Name
    """The tenant that the caller claims to act for; the key decides whether that is so."""
    actor: Name
    conversation: Name | None = None
    idempotency_key: Annotated[str, Field(min_length=8, max_length=128, pattern=r"^[\x21-\x7e]+$")] | None = None
    task: Task
    permissions: Annotated[tuple[Permission, ...], Field(max_length=8)] | None = None
    """Authority delegated to this request, a part of the key's own; None delegates all of it."""
    timeout_us: Microseconds = 60_000_000
    """Deadline, counted from arrival."""
    priority: Annotated[int, Field(ge=0, le=9)] = 0
    """Lower is served first, where the scheduler's policy looks at it."""
    budget: Budget = Budget()
    context: ContextPolicy = ContextPolicy()
    model: ModelConstraints = ModelConstraints()
    tools: ToolPolicy = ToolPolicy()
    memory: MemoryPolicy = MemoryPolicy()
    output: OutputContract = OutputContract()
    generation: GenerationSettings = GenerationSettings()
    trace: TraceSettings = TraceSettings()

    def to_document(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Name the request by its content."""
        return digest(self.to_document())


class FailureReport(EnvelopePart):
    """Why a request did not succeed, in the caller's terms."""

    failure_class: str
    reason: str
    stage: str | None
    message: str
    fix: str | None
    retry: str
    """What the retry rules decided: none, retry, fallback, resume, repair, escalate or forbidden."""


class ResponseEnvelope(EnvelopePart):
    """One response, version 1: what the specification says a runtime should expose, and no more."""

    version: Literal["replaylab.response/1"] = RESPONSE_VERSION
    request: str
    """The request's reference."""
    status: Literal["ok", "refused", "failed", "cancelled", "review"]
    result: dict[str, Any] | None
    warnings: tuple[str, ...] = ()
    citations: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Outcome of each tool call, in order."""
    route: dict[str, Any] | None = None
    policy: dict[str, Any] = {}
    memory: tuple[dict[str, Any], ...] = ()
    trace_id: str
    usage: dict[str, int] = {}
    """Tokens, generations and cost in millionths of a dollar."""
    timing: dict[str, int] | None = None
    """Microseconds a stage and in all; never part of what a replay compares."""
    failure: FailureReport | None = None

    def to_document(self) -> dict[str, Any]:
        """Return what a replay must repeat: everything but the times."""
        return self.model_dump(mode="json", exclude={"timing"})


def parse_envelope(body: bytes) -> RequestEnvelope:
    """Read a request from JSON; raises RequestRefused naming each wrong field, never its value."""
    if len(body) > LARGEST_BODY_BYTES:
        raise RequestRefused(
            f"The request has {len(body)} bytes; {LARGEST_BODY_BYTES} are allowed.",
            reason="body_too_large",
            evidence={"bytes": len(body), "limit": LARGEST_BODY_BYTES},
            fix="Shorten the question or the prompt.",
        )
    try:
        return RequestEnvelope.model_validate_json(body)
    except ValidationError as error:
        fields = [
            {"field": ".".join(str(part) for part in item["loc"]) or "body", "problem": item["type"]}
            for item in error.errors(include_url=False, include_input=False, include_context=False)[:20]
        ]
        named = ", ".join(f"{item['field']} ({item['problem']})" for item in fields)
        raise RequestRefused(
            f"The request is not a valid {REQUEST_VERSION}: {named}.",
            reason="malformed_request",
            evidence={"fields": fields, "body_digest": digest(body), "bytes": len(body)},
            fix="Compare the request with the schema in the service's /openapi.json.",
        ) from None

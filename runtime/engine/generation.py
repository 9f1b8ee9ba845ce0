"""What is asked of a language model, and what comes back?  The one protocol that engine and replay both offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are chosen; the draw for output token i is a function of (seed, stream, i) and of nothing else."""

    seed: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    top_p: float = 1.0
    max_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    stream: str = ""
    """Names an independent random stream under the same seed; it must survive replay (never a fresh id)."""


class GenerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sequence to generate."""

    sequence_id: str
    tenant: str
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    grammar: str | None = None
    """JSON schema text that the output must satisfy."""
    deadline_us: int | None = None
    """Microseconds after submission at which the engine gives up."""
    cache_salt: str = ""
    """Splits the prefix cache further than the tenant does."""
    request_ref: str | None = None
    forced_tokens: tuple[int, ...] | None = None
    """Feed these tokens whatever would have been chosen; records then say what would have been."""
    priority: int = 0
    """Lower is served first, where the scheduler's policy looks at it."""

    def encode(self) -> bytes:
        """Return the request as JSON; equal requests give equal bytes."""
        return msgspec.json.encode(self)


class TokenRecord(msgspec.Struct, frozen=True, array_like=True):
    """What is known about one output token."""

    token: int
    """The token that was chosen (with forced tokens: that would have been)."""
    logits_digest: str
    """xxh3_128 of the float32 logits row's bytes, before any mask, hexadecimal."""
    logprob: float
    """Natural log-probability of `token` under the raw row at temperature 1."""
    margin: float | None
    """Best minus second-best logit among the allowed tokens; None when only one was allowed."""
    step: int
    """Engine step whose logits chose it."""
    position: int
    """Its position in the sequence (prompt length + output index)."""
    emitted_us: int
    """Microseconds from submission until it was handed out."""


class EngineLatency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who had a sequence's time in the engine, in microseconds; `account` says how it is split.  It adds up exactly."""

    queue_us: int
    """Until the first step that ran it."""
    prefill_us: int
    """Its own share of steps before its first output token."""
    decode_us: int
    """Its own share of steps after it."""
    interference_us: int
    """Co-scheduled work, and steps that passed it over."""
    preemption_us: int
    """Evicted, and until what was lost was computed again."""
    sampling_us: int
    """Choosing its tokens, grammar included."""
    delivery_us: int
    """Handing its tokens out, waiting for its reader, and telling its end."""

    @property
    def total_us(self) -> int:
        """From submission to the end."""
        return (
            self.queue_us
            + self.prefill_us
            + self.decode_us
            + self.interference_us
            + self.preemption_us
            + self.sampling_us
            + self.delivery_us
        )


class GenerationResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished sequence."""

    sequence_id: str
    tokens: tuple[int, ...]
    """Output tokens as fed back (forced ones where forced); a stop token, where one ended it, is the last of them."""
    records: tuple[TokenRecord, ...]
    finish_reason: FinishReason
    queue_us: int
    """Submission until the first step that ran it."""
    prefill_us: int
    """First step until the first output token."""
    decode_us: int
    """First output token until the end."""
    first_token_us: int | None
    """Submission until the first output token; None without one."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens read from the prefix cache at the first admission."""
    steps: tuple[int, ...]
    """Engine steps that it was a row of, ascending."""
    preemptions: int = 0
    error: str | None = None
    """Failure class, when the reason is `error`."""
    cancel_origin: str | None = None
    latency: EngineLatency | None = None
    """None for a replay, whose times are its own, and for a result from before it was measured."""
    error_type: str | None = None
    """Which failure, when the reason is `error`."""

    @property
    def partial(self) -> bool:
        """Whether the output was cut off before it was done."""
        return self.finish_reason in ("cancelled", "deadline", "error")

    def encode(self) -> bytes:
        """Return the result as JSON."""
        return msgspec.json.encode(self)

    def document(self) -> dict[str, Any]:
        """Return what a replay must repeat: no times, no step numbers, floats as strings."""
        return {
            "sequence_id": self.sequence_id,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "records": [
                {
                    "token": record.token,
                    "logits_digest": record.logits_digest,
                    "logprob": repr(record.logprob),
                    "margin": None if record.margin is None else repr(record.margin),
                    "position": record.position,
                }
                for record in self.records
            ],
        }


OnToken = Callable[[TokenRecord], None]


class GenerationService(Protocol):
    """Anything that turns a request into a result: a live engine or a recorded one."""

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        """Generate one sequence; raises ClassifiedError when it is refused or fails."""
        ...


def decode_request(data: bytes | str) -> GenerationRequest:
    """Read what `GenerationRequest.encode` wrote."""
    return msgspec.json.decode(data, type=GenerationRequest)


def decode_result(data: bytes | str) -> GenerationResult:
    """Read what `GenerationResult.encode` wrote."""
    return msgspec.json.decode(data, type=GenerationResult)

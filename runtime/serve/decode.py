"""Stage 6. Which tokens came out, and why did they end?

The work was done inside the generation call of stage 4; here it is recorded with the engine's own times.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from manifests.canonical import digest
from runtime.errors import ProviderFailed
from runtime.serve.boundary import Accepted
from runtime.serve.queueing import Execution, raise_for
from runtime.serve.services import RouteBinding
from runtime.serve.stage import Emitted, RequestTrace, cancelled_by_caller
from traces.failures import ClassifiedError
from traces.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One finished output."""

    tokens: tuple[int, ...]
    text: str
    """Without the stop token."""
    finish_reason: str
    prompt_tokens: int


def observe(trace: RequestTrace, accepted: Accepted, binding: RouteBinding, execution: Execution) -> Generated:
    """Record the decode and return its output; raises the failure of a generation that ended early."""
    span = execution.decoded
    opened = trace.open(Stage.DECODE, {"sequence": execution.request.sequence_id}, span=span)
    try:
        generated = _output(accepted, binding, execution)
    except asyncio.CancelledError:
        trace.fail(opened, cancelled_by_caller(Stage.DECODE), span=span)
        raise
    except ClassifiedError as error:
        trace.fail(opened, error, span=span)
        raise
    document = {
        "tokens": list(generated.tokens),
        "text": generated.text,
        "finish_reason": generated.finish_reason,
        "prompt_tokens": generated.prompt_tokens,
    }
    record = {
        "output_tokens": len(generated.tokens),
        "finish_reason": generated.finish_reason,
        "decode_us": span.duration_us,
        "usage": {"prompt_tokens": generated.prompt_tokens, "output_tokens": len(generated.tokens)},
        "output_digest": digest(list(generated.tokens)),
    }
    columns = {"output_tokens": len(generated.tokens), "finish_reason": generated.finish_reason}
    trace.close(opened, Emitted(document=document, record=record, columns=columns), span=span)
    return generated


def _output(accepted: Accepted, binding: RouteBinding, execution: Execution) -> Generated:
    if execution.failure is not None:
        raise execution.failure
    result = execution.result
    if result is None:
        raise ProviderFailed(
            "The generation service gave neither a result nor a failure.", reason="no_result",
            evidence={"error_class": "no_result"}, fix="This is a fault of the generation service.",
        )  # fmt: skip
    raise_for(accepted, result, "while tokens were coming")
    stops = frozenset(execution.request.sampling.stop_token_ids)
    kept = [token for token in result.tokens if token not in stops]
    return Generated(
        tokens=result.tokens,
        text=binding.decode(kept),
        finish_reason=result.finish_reason,
        prompt_tokens=result.prompt_tokens,
    )

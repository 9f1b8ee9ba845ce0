"""Stage 5. What did the first pass over the prompt cost, and what did the cache spare?

The work was done inside the generation call of stage 4; here it is recorded with the engine's own times.
"""

from __future__ import annotations

import asyncio

from runtime.serve.boundary import Accepted
from runtime.serve.queueing import Execution, raise_for
from runtime.serve.stage import Emitted, RequestTrace, cancelled_by_caller
from traces.failures import ClassifiedError
from traces.stages import Stage


def observe(trace: RequestTrace, accepted: Accepted, execution: Execution) -> None:
    """Record the prefill; raises the failure of a generation that ended before its first token."""
    request, result = execution.request, execution.result
    span = execution.prefilled
    opened = trace.open(Stage.PREFILL, {"sequence": request.sequence_id, "prompt": list(request.prompt)}, span=span)
    try:
        if execution.tokens_seen == 0:
            if execution.failure is not None:
                raise execution.failure
            if result is not None:
                raise_for(accepted, result, "before the first token")
    except asyncio.CancelledError:
        trace.fail(opened, cancelled_by_caller(Stage.PREFILL), span=span)
        raise
    except ClassifiedError as error:
        trace.fail(opened, error, span=span)
        raise
    first = result.records[0] if result is not None and result.records else None
    document = {"prompt_tokens": len(request.prompt), "first_token": None if first is None else first.token}
    record = {
        "prompt_tokens": len(request.prompt),
        "cached_tokens": None if result is None else result.cached_tokens,
        "prefill_us": None if result is None else result.prefill_us,
        "first_token_us": None if result is None else result.first_token_us,
        "logits_digest": None if first is None else first.logits_digest,
    }
    columns = {
        "input_tokens": len(request.prompt),
        "kv_hit_tokens": record["cached_tokens"],
        "cache_read_tokens": record["cached_tokens"],
        "first_token_us": record["first_token_us"],
    }
    trace.close(opened, Emitted(document=document, record=record, columns=columns), span=span)

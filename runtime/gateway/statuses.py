"""Which HTTP status says what a response envelope says?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BY_REASON = {
    "unauthenticated": 401,
    "forbidden_tenant": 403,
    "forbidden": 403,
    "duplicate_request": 409,
    "idempotency_conflict": 409,
    "body_too_large": 413,
    "malformed_request": 422,
    "prompt_too_long": 422,
    "token_outside_vocabulary": 422,
    "unknown_route": 422,
    "cost_ceiling": 422,
    "tenant_rate": 429,
    "tenant_concurrency": 429,
}
_BY_CLASS = {
    "artifact_compatibility": 503,
    "shape_guard": 422,
    "capacity_admission": 503,
    "timeout_cancellation": 504,
    "model_provider": 502,
    "tool_side_effect": 502,
    "validation_policy": 502,
    "telemetry_persistence": 503,
}
DOCUMENTED = tuple(sorted({200, *_BY_REASON.values(), *_BY_CLASS.values()}))


def status_code(response: Mapping[str, Any]) -> int:
    """Return the HTTP status of a response envelope; a request under human review was answered: 200."""
    failure = response["failure"]
    if failure is None or response["status"] == "review":
        return 200
    return _BY_REASON.get(failure["reason"]) or _BY_CLASS[failure["failure_class"]]


def retry_after(failure: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the `Retry-After` header of a rate refusal, in whole seconds."""
    waits = 0 if failure is None else int(failure["evidence"].get("retry_after_us") or 0)
    return {"retry-after": str(-(-waits // 1_000_000))} if waits else {}

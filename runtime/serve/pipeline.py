"""How does one request go from envelope to response?  The ten stages, in the specification's order, once."""

from __future__ import annotations

from runtime.serve.envelope import RequestEnvelope
from runtime.serve.services import Outcome, Services

__all__ = ["Outcome", "Services", "run_request"]


async def run_request(envelope: RequestEnvelope | bytes, services: Services, *, api_key: str | None = None) -> Outcome:
    """Run one request through all stages; never raises for a request's own failure, which is part of the outcome.

    Args:
        envelope: the request, or its body as it arrived.
        services: everything impure or replaceable.
        api_key: the caller's key; a replay has none, because authentication is answered from the record.
    """
    raise NotImplementedError

"""What do live effects act on?  The deployment's stores, tool server and route health, a request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.serve.articles import ArticleIndex
from runtime.serve.boundary import authenticate
from runtime.serve.deployment import Deployment
from runtime.serve.health import RouteHealth
from runtime.serve.limits import Limits
from runtime.serve.memory import MemoryStore
from runtime.serve.toolclient import ToolClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What a deployment keeps open while it serves."""

    deployment: Deployment
    index: ArticleIndex
    limits: Limits
    memory: MemoryStore
    health: RouteHealth
    tools: ToolClient
    now_us: Callable[[], int]

    def close(self) -> None:
        """Close the files; the tool server belongs to whoever started it."""
        self.index.close()
        self.limits.close()
        self.memory.close()


class LiveWorld:
    """The world as one live request may touch it."""

    def __init__(self, stores: Stores, request_ref: str) -> None:
        self._stores = stores
        self._request_ref = request_ref
        self._admitted: str | None = None

    def now_us(self) -> int:
        """Read the wall clock, UTC microseconds."""
        return self._stores.now_us()

    def authenticate(self, api_key: str | None) -> dict[str, Any]:
        """Say whose key this is."""
        return authenticate(self._stores.deployment.document, api_key)

    def take_quota(self, tenant: str, at_us: int, idempotency_ref: str | None, request_digest: str) -> dict[str, Any]:
        """Take the tenant's room for this request; `release` gives it back."""
        taken = self._stores.limits.take(tenant, at_us, idempotency_ref, request_digest, self._request_ref)
        if taken["refused"] is None:
            self._admitted = tenant
        return taken

    def route_health(self, route: str) -> dict[str, Any]:
        """Say how the route stands."""
        return self._stores.health.look(route)

    def search(self, tenant: str, query: str, limit: int) -> dict[str, Any]:
        """Find the tenant's articles."""
        return self._stores.index.search(tenant, query, limit)

    async def call_tool(
        self, name: str, arguments: dict[str, Any], *, tenant: str, idempotency_key: str, timeout_us: int
    ) -> dict[str, Any]:
        """Call a tool for the tenant."""
        return await self._stores.tools.call(
            name, arguments, tenant=tenant, idempotency_key=idempotency_key, timeout_us=timeout_us
        )

    async def remember(self, tenant: str, memory_id: str, document: dict[str, Any]) -> dict[str, Any]:
        """Store a memory durably."""
        return await asyncio.to_thread(self._stores.memory.remember, tenant, memory_id, document)

    def release(self) -> None:
        """Give back what the request took."""
        if self._admitted is not None:
            self._stores.limits.release(self._admitted)
            self._admitted = None

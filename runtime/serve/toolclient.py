"""How does the runtime reach its tool server?  One MCP client over stdio, started once for a deployment.

A time-out and a dead server look alike from here. For a read both mean that nothing happened; for a write the outcome
is unknown, and said to be.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import AmbiguousSideEffect, RouteUnavailable, ToolFailed
from runtime.serve.contracts import TOOL_CONTRACTS
from runtime.serve.deployment import Deployment
from runtime.serve.services import ToolFacts

START_TIMEOUT_S = 60.0
_TENANT = "replaylab/tenant"
_IDEMPOTENCY = "replaylab/idempotency-key"


class ToolClient:
    """An open connection to the deployment's tool server."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._stop = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None
        self._client: Any = None
        self.facts = ToolFacts()

    async def __aenter__(self) -> Self:
        """Start the server; raises RouteUnavailable when it does not answer as its contract says."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # one task owns the connection: its cancel scopes must be entered and left by the same task
        self._owner = asyncio.create_task(self._own(ready), name="tool-server")
        try:
            await asyncio.wait_for(asyncio.shield(ready), START_TIMEOUT_S)
        except Exception as error:
            await self.__aexit__(None, None, None)
            raise RouteUnavailable(
                f"The tool server did not start: {type(error).__name__}: {error}",
                reason="tool_server_unavailable",
                evidence={"validation_output": str(error), "runtime_version": self._deployment.document.tools.module},
                fix=f"Run `python -m {self._deployment.document.tools.module} --help` and look at its message.",
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self._stop.set()
        if self._owner is not None:
            await asyncio.wait([self._owner])

    async def call(
        self, name: str, arguments: dict[str, Any], *, tenant: str, idempotency_key: str, timeout_us: int
    ) -> dict[str, Any]:
        """Call a tool; returns its structured result, raises ToolFailed or AmbiguousSideEffect."""
        from mcp import MCPError

        meta: Any = {_TENANT: tenant, _IDEMPOTENCY: idempotency_key}
        try:
            async with asyncio.timeout(timeout_us / 1_000_000 + 1.0):
                answer = await self._client.call_tool(
                    name, arguments, read_timeout_seconds=timeout_us / 1_000_000, meta=meta
                )
        except (MCPError, TimeoutError, OSError, RuntimeError) as error:
            raise _unanswered(name, type(error).__name__) from error
        if answer.is_error or not isinstance(answer.structured_content, dict):
            raise _unanswered(name, "tool_error")
        result: dict[str, Any] = answer.structured_content
        return result

    async def _own(self, ready: asyncio.Future[None]) -> None:
        from mcp import Client, StdioServerParameters, stdio_client

        tools = self._deployment.document.tools
        command = ["-m", tools.module, "--database", str(self._deployment.crm_path.absolute())]
        async with AsyncExitStack() as stack:
            try:
                quiet = stack.enter_context(Path(os.devnull).open("w"))  # noqa: SIM115  the stack closes it
                transport = stdio_client(StdioServerParameters(command=sys.executable, args=command), errlog=quiet)
                # the handshake of 2025-11-25, which the specification cites
                self._client = await stack.enter_async_context(Client(transport, mode="legacy"))
                listed = await self._client.list_tools()
                _check_contracts({tool.name: tool.input_schema for tool in listed.tools})
                info = self._client.server_info
                self.facts = ToolFacts(
                    server=info.name, server_version=info.version, protocol_version=str(self._client.protocol_version)
                )
            except BaseException as error:
                if not ready.done():
                    ready.set_exception(error)
                return
            ready.set_result(None)
            await self._stop.wait()


def _check_contracts(offered: dict[str, dict[str, Any]]) -> None:
    """Refuse a server that lacks a tool or names its arguments otherwise; it may say no more than that."""
    for name, contract in TOOL_CONTRACTS.items():
        wanted = sorted(contract.input_schema["required"])
        found = sorted(offered.get(name, {}).get("required", []))
        if found != wanted:
            raise ToolFailed(
                f"The tool server offers {name!r} with the arguments {found}, the contract says {wanted}.",
                reason="tool_contract_mismatch",
                evidence={"tool_version": contract.version, "side_effect_status": "none"},
                fix="Start the tool server that belongs to this version.",
            )


def _unanswered(name: str, cause: str) -> ToolFailed | AmbiguousSideEffect:
    contract = TOOL_CONTRACTS[name]
    if contract.side_effect == "read":
        return ToolFailed(
            f"The tool {name!r} gave no answer ({cause}).",
            reason="tool_unanswered",
            evidence={"tool_version": contract.version, "side_effect_status": "none", "cause": cause},
            fix="Look at the tool server's health.",
        )
    return AmbiguousSideEffect(
        f"The tool {name!r} gave no definite answer ({cause}); the write may have happened.",
        reason="ambiguous_side_effect",
        evidence={"tool_version": contract.version, "side_effect_status": "ambiguous", "cause": cause},
        fix="Call it again with the same idempotency key, or read the external state first.",
    )

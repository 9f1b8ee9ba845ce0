"""What can the support desk's tools do?  An MCP server over stdio: look an account up, open a ticket.

The tenant and the idempotency key arrive in the request's `_meta`, from the runtime, never among the arguments that a
model writes. A row of another tenant is answered as if it were not there.

    python -m runtime.serve.toolserver --database crm.sqlite
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
from pathlib import Path
from typing import Any, Literal

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from runtime.models.reference.prompt import TICKET_TOPICS
from runtime.serve.databases import opened

SERVER_NAME = "replaylab-crm"
SERVER_VERSION = "1"
TENANT_KEY = "replaylab/tenant"
IDEMPOTENCY_KEY = "replaylab/idempotency-key"


def lookup(path: Path, tenant: str, account: str) -> dict[str, str]:
    """Return the tenant's account, all fields as text, or `{"error": "not_found"}`."""
    with opened(path, read_only=True) as connection:
        row = connection.execute(
            "SELECT number, plan, status, balance, orders FROM accounts WHERE number = ? AND tenant = ?",
            (account, tenant),
        ).fetchone()
    if row is None:
        return {"error": "not_found"}
    return {"account": row[0], "plan": row[1], "status": row[2], "balance": str(row[3]), "orders": str(row[4])}


def open_ticket(path: Path, tenant: str, account: str, topic: str, idempotency_key: str) -> dict[str, str]:
    """Open a ticket once for a key; the same key again gives the same ticket."""
    if topic not in TICKET_TOPICS:
        return {"error": "unknown_topic"}
    if "error" in lookup(path, tenant, account):
        return {"error": "not_found"}
    with opened(path) as connection:
        connection.execute("PRAGMA synchronous=FULL")
        with_key = (tenant, idempotency_key)
        with contextlib.suppress(sqlite3.IntegrityError):  # the key was used: answer what it did then
            connection.execute(
                "INSERT INTO tickets (tenant, account, topic, idempotency_key) VALUES (?, ?, ?, ?)",
                (tenant, account, topic, idempotency_key),
            )
        number, account, topic = connection.execute(
            "SELECT number, account, topic FROM tickets WHERE tenant = ? AND idempotency_key = ?", with_key
        ).fetchone()
    return {"ticket": f"T-{number:04d}", "account": account, "topic": topic}


def build_server(path: Path) -> MCPServer[Any]:
    """Return the server over one CRM file."""
    server: MCPServer[Any] = MCPServer(SERVER_NAME, version=SERVER_VERSION, log_level="ERROR")

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def lookup_account(account: str, context: Context[Any, Any]) -> dict[str, str]:
        """Return the tenant's account."""
        return lookup(path, _meta(context, TENANT_KEY), account)

    @server.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True))
    def create_ticket(account: str, topic: str, context: Context[Any, Any]) -> dict[str, str]:
        """Open a ticket for the tenant's account, once for an idempotency key."""
        return open_ticket(path, _meta(context, TENANT_KEY), account, topic, _meta(context, IDEMPOTENCY_KEY))

    del lookup_account, create_ticket  # registered by the decorator
    return server


def _meta(context: Context[Any, Any], key: str) -> str:
    meta: Any = context.request_context.meta
    value = (meta or {}).get(key) if isinstance(meta, dict) or meta is None else getattr(meta, key, None)
    if not isinstance(value, str) or not value:
        raise ToolError(f"the call carries no {key}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Serve until the client closes standard input."""
    parser = argparse.ArgumentParser(description="Serve the support desk's tools over stdio (MCP).")
    parser.add_argument("--database", type=Path, required=True, help="the CRM's SQLite file")
    transport: Literal["stdio"] = "stdio"
    build_server(parser.parse_args(arguments).database).run(transport)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What does the deployment remember of earlier requests?  Explicit, owned, dated, deletable rows in SQLite."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any


class MemoryStore:
    """Long-term memory: one row a memory, written durably, once for an id."""

    def __init__(self, path: Path) -> None:
        """Open or make the store."""
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS memories (tenant TEXT NOT NULL, memory_id TEXT NOT NULL,"
            " document TEXT NOT NULL, PRIMARY KEY (tenant, memory_id)) STRICT"
        )

    def remember(self, tenant: str, memory_id: str, document: dict[str, Any]) -> dict[str, Any]:
        """Store a memory; returns `{"memory_id", "action": "created" | "kept"}`."""
        with self._lock:
            cursor = self._connection.execute(
                "INSERT OR IGNORE INTO memories VALUES (?, ?, ?)", (tenant, memory_id, json.dumps(document))
            )
        return {"memory_id": memory_id, "action": "created" if cursor.rowcount else "kept"}

    def recall(self, tenant: str) -> list[dict[str, Any]]:
        """Return a tenant's memories by id."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT memory_id, document FROM memories WHERE tenant = ? ORDER BY memory_id", (tenant,)
            ).fetchall()
        return [{"memory_id": memory_id, **json.loads(document)} for memory_id, document in rows]

    def forget(self, tenant: str, memory_id: str) -> bool:
        """Delete a memory; returns whether it was there."""
        with self._lock:
            cursor = self._connection.execute(
                "DELETE FROM memories WHERE tenant = ? AND memory_id = ?", (tenant, memory_id)
            )
        return cursor.rowcount > 0

    def close(self) -> None:
        """Release the store."""
        self._connection.close()

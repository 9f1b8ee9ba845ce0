"""Which of a tenant's articles match a query?  SQLite full text, best first, in the tenant's own table."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from runtime.serve.databases import corpus_digest


class ArticleIndex:
    """An article index, opened read-only; its content's digest is taken once."""

    def __init__(self, path: Path) -> None:
        """Open an index; raises OSError or sqlite3.Error when it is not one."""
        self.digest = corpus_digest(path)
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False, timeout=5.0
        )
        # which table belongs to a tenant is read from the index, never built from a request's text
        self._tables = {
            tenant: f"articles_{int(number)}"
            for number, tenant in self._connection.execute("SELECT number, tenant FROM tenants")
        }

    def search(self, tenant: str, query: str, limit: int) -> dict[str, Any]:
        """Return `{"index": digest, "rows": [{article, tenant, text, rank, score_micro}]}`, best first.

        Args:
            tenant: bound as a parameter, besides choosing the table.
            query: full-text terms as `context.query_of` writes them.
            limit: most rows.
        """
        table = self._tables.get(tenant)
        if table is None or not query:
            return {"index": self.digest, "rows": []}
        found = self._connection.execute(
            f"SELECT article, tenant, body, bm25({table}) FROM {table} WHERE {table} MATCH ? AND tenant = ?"
            f" ORDER BY bm25({table}), article LIMIT ?",
            (query, tenant, limit),
        ).fetchall()
        rows = [
            {"article": article, "tenant": owner, "text": body, "rank": rank, "score_micro": round(-score * 1_000_000)}
            for rank, (article, owner, body, score) in enumerate(found)
        ]
        return {"index": self.digest, "rows": rows}

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

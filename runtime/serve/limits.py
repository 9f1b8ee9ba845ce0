"""May this tenant send another request now, and was this idempotency key used before?

The rate is a token bucket whose only clock is the request's recorded arrival, so the same arrivals give the same
decisions. Idempotency keys outlive the process in SQLite, as references only.
"""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.serve.deployment import DeploymentDocument, TenantRecord


@dataclass(slots=True)
class _Bucket:
    """What a tenant has left."""

    tokens_micro: int
    """Requests, in millionths."""
    at_us: int
    running: int = 0


class Limits:
    """Rate, concurrency and replay protection of one deployment."""

    def __init__(self, deployment: DeploymentDocument, store: Path) -> None:
        """Open or make the idempotency store."""
        self._deployment = deployment
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(store, check_same_thread=False, isolation_level=None, timeout=10.0)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS used (reference TEXT PRIMARY KEY, request TEXT NOT NULL,"
            " request_ref TEXT NOT NULL, at_us INTEGER NOT NULL) STRICT"
        )

    def take(
        self, tenant: str, at_us: int, idempotency_ref: str | None, request_digest: str, request_ref: str
    ) -> dict[str, Any]:
        """Take one request's room, or say why not: `refused`, `retry_after_us`, `earlier_request`, `running`."""
        record = self._deployment.tenant(tenant)
        if record is None:
            return _refusal("unknown_tenant")
        with self._lock:
            bucket = self._refilled(record, at_us)
            if bucket.running >= record.max_concurrent:
                return _refusal("tenant_concurrency")
            if bucket.tokens_micro < 1_000_000:
                missing = 1_000_000 - bucket.tokens_micro
                return _refusal("tenant_rate", retry_after_us=missing * 60 // record.requests_per_minute)
            refusal = self._repeated(idempotency_ref, request_digest, request_ref, at_us)
            if refusal is not None:
                return refusal
            bucket.tokens_micro -= 1_000_000
            bucket.running += 1
            return {"refused": None, "retry_after_us": 0, "earlier_request": None, "running": bucket.running}

    def release(self, tenant: str) -> None:
        """Give back the room of a request that `take` admitted."""
        with self._lock:
            bucket = self._buckets.get(tenant)
            if bucket is not None and bucket.running > 0:
                bucket.running -= 1

    def close(self) -> None:
        """Release the store."""
        self._connection.close()

    def _refilled(self, record: TenantRecord, at_us: int) -> _Bucket:
        full = record.burst * 1_000_000
        bucket = self._buckets.setdefault(record.name, _Bucket(tokens_micro=full, at_us=at_us))
        gained = max(0, at_us - bucket.at_us) * record.requests_per_minute // 60
        bucket.tokens_micro = min(full, bucket.tokens_micro + gained)
        bucket.at_us = max(bucket.at_us, at_us)
        return bucket

    def _repeated(
        self, reference: str | None, request_digest: str, request_ref: str, at_us: int
    ) -> dict[str, Any] | None:
        if reference is None:
            return None
        try:
            self._connection.execute(
                "INSERT INTO used VALUES (?, ?, ?, ?)", (reference, request_digest, request_ref, at_us)
            )
        except sqlite3.IntegrityError:
            earlier, earlier_ref = self._connection.execute(
                "SELECT request, request_ref FROM used WHERE reference = ?", (reference,)
            ).fetchone()
            reason = "duplicate_request" if earlier == request_digest else "idempotency_conflict"
            return _refusal(reason, earlier=earlier_ref)
        return None


def _refusal(reason: str, *, retry_after_us: int = 0, earlier: str | None = None) -> dict[str, Any]:
    return {"refused": reason, "retry_after_us": retry_after_us, "earlier_request": earlier, "running": 0}

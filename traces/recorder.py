"""How does running code say what happened?

``Recorder.emit`` costs a few microseconds and never waits; ``Recorder.commit`` returns only when the event is on disk
and raises when it cannot be: whoever commits before acting fails closed.
"""

from __future__ import annotations

import atexit
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from msgspec.structs import force_setattr

from traces.envelope import RECORDER_COLUMNS, SCHEMA_VERSION, TEXT_COLUMNS, TraceEvent, encode
from traces.evidence import PREFIX, hex_digest
from traces.failures import EventRefused
from traces.ledger.blobs import BlobStore
from traces.ledger.keys import pseudonym_key
from traces.ledger.layout import LedgerLayout
from traces.ledger.outbox import GROUP_WINDOW_US, QUEUE_LIMIT, Outbox
from traces.redaction import POLICY_VERSION, Redactor

# Evidence up to this size rides in the outbox, so that one fsync covers it and the event that names it.
INLINE_BLOB_BYTES = 262_144
KNOWN_BLOBS = 100_000

PSEUDONYMS = (("actor", "actor_ref"), ("tenant", "tenant_ref"), ("idempotency", "idempotency_ref"))


def system_clock() -> tuple[int, int]:
    """Return (UTC epoch microseconds, monotonic microseconds)."""
    return time.time_ns() // 1_000, time.monotonic_ns() // 1_000


def random_ids() -> str:
    """Return a fresh UUIDv7 as 32 hex digits."""
    from uuid_utils import uuid7

    return uuid7().hex


class Recorder:
    """Records one component's events of one run into a ledger.  One per process and run; threads may share it.

    Args:
        ledger_path: the ledger's folder; made if missing.
        run_id: the recording all events belong to.
        component: who speaks, unless an event names another.
        clock: returns (UTC epoch us, monotonic us).
        ids: returns a new event id.
    """

    def __init__(
        self,
        ledger_path: Path | str,
        *,
        run_id: str,
        component: str,
        clock: Callable[[], tuple[int, int]] = system_clock,
        ids: Callable[[], str] | None = None,
        group_window_us: int = GROUP_WINDOW_US,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        self.layout = LedgerLayout(Path(ledger_path)).create()
        self.run_id = run_id
        self.component = component
        self._clock = clock
        self._ids = ids if ids is not None else _load_ids()
        self._redactor = Redactor(pseudonym_key(self.layout))
        self._blobs = BlobStore(self.layout.blobs)
        self._stored: set[str] = set()
        self._outbox = Outbox(self.layout.outbox, self, group_window_us=group_window_us, queue_limit=queue_limit)
        atexit.register(self.close)

    @property
    def outbox_name(self) -> str:
        """The outbox this recorder writes; with ``outbox_seq`` it identifies every event."""
        return self._outbox.name

    @property
    def dropped(self) -> int:
        """How many optional events were dropped so far; each drop is also recorded as ``recorder.dropped``."""
        return self._outbox.dropped

    @property
    def halted(self) -> bool:
        """Whether a storage error has stopped this recorder for good."""
        return self._outbox.failure is not None

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool:
        """Record an optional event; return False when it was dropped.  The payload must not be changed afterwards.

        Raises:
            EventRefused: an unknown column or a value outside its domain.
        """
        return self._outbox.offer(self._event(event_type, payload, columns))

    def commit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        """Record a mandatory event and return when it, and all that this recorder wrote before it, is on disk.

        Raises:
            TelemetryPersistenceError: it is not on disk; do not act.
            EventRefused: an unknown column or a value outside its domain.
        """
        self._outbox.submit(self._event(event_type, payload, columns)).result()

    async def commit_async(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> None:
        """Record a mandatory event without blocking the event loop; errors as ``commit``."""
        import asyncio  # whoever awaits this has it loaded; preparing a model need not load it

        future: Future[None] = self._outbox.submit(self._event(event_type, payload, columns))
        await asyncio.wrap_future(future)

    def put_blob(self, data: bytes) -> str:
        """Store evidence and return ``evidence://sha256/<hex>``; durable at the latest with the next commit.

        Raises:
            TelemetryPersistenceError: it cannot be stored.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._stored:
            if len(data) > INLINE_BLOB_BYTES:
                self._blobs.put(data)
            else:
                self._outbox.put_blob(digest, data)
            if len(self._stored) >= KNOWN_BLOBS:
                self._stored.clear()  # storing a piece again is harmless
            self._stored.add(digest)
        return PREFIX + digest

    def erase_blob(self, reference: str, *, reason: str) -> bool:
        """Record that evidence is erased, then delete it; the log still verifies.  Return whether it was there.

        Evidence that no drain has moved out of an outbox yet is not reached: drain first.

        Raises:
            TelemetryPersistenceError: the erasure could not be recorded, so nothing was deleted.
        """
        self.commit("evidence.erased", track="M", input_ref=reference, payload={"reason": reason})
        self._stored.discard(hex_digest(reference))
        return self._blobs.erase(reference)

    def flush(self) -> None:
        """Return when everything recorded so far is on disk.

        Raises:
            TelemetryPersistenceError: it is not.
        """
        self._outbox.submit(None).result()

    def close(self) -> None:
        """Write what is queued and release the outbox; a drain will take it from there.  Idempotent."""
        atexit.unregister(self.close)
        self._outbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _event(self, event_type: str, payload: dict[str, Any] | None, columns: dict[str, Any]) -> TraceEvent:
        if not RECORDER_COLUMNS.isdisjoint(columns):
            raise EventRefused(f"{event_type}: the recorder itself fills {sorted(RECORDER_COLUMNS & set(columns))}.")
        wall, mono = self._clock()
        columns.setdefault("ts_us", wall)
        columns.setdefault("mono_us", mono)
        columns.setdefault("run_id", self.run_id)
        columns.setdefault("component", self.component)
        columns["event_type"] = event_type
        if payload is not None:
            columns["payload"] = payload
        try:
            return msgspec.convert(columns, TraceEvent)
        except msgspec.ValidationError as error:
            raise EventRefused(
                f"The event {event_type!r} does not fit the envelope: {error}.",
                fix="columns and their domains stand in traces/envelope.py; everything else goes into payload.",
            ) from None

    def stamp(self, event: TraceEvent, outbox: str, *, seq: int, mandatory: bool) -> bytes:
        """Redact, identify and encode an event (called by the outbox's thread, in order)."""
        redactor = self._redactor
        payload = redactor.payload(event.payload)
        hidden = payload.hidden
        force_setattr(event, "payload", payload.value)
        for name in TEXT_COLUMNS:
            text: str | None = getattr(event, name)
            if text is not None:
                cleaned = redactor.text(text)
                if cleaned != text:
                    hidden = True
                    force_setattr(event, name, cleaned)
        for kind, name in PSEUDONYMS:
            text = getattr(event, name)
            if text is not None:
                force_setattr(event, name, redactor.pseudonym(kind, text))
        force_setattr(event, "redaction_status", "payload-redacted" if hidden else "clean")
        force_setattr(event, "redaction_policy", POLICY_VERSION)
        if event.track is None and event.stage is not None:
            force_setattr(event, "track", event.stage.track)
        force_setattr(event, "event_id", self._ids())
        force_setattr(event, "outbox", outbox)
        force_setattr(event, "outbox_seq", seq)
        force_setattr(event, "schema_version", SCHEMA_VERSION)
        if mandatory:
            force_setattr(event, "durability", "mandatory")
        return encode(event)

    def report_drops(self, count: int) -> TraceEvent:
        """Return the event that records dropped events (called by the outbox's thread)."""
        return self._event("recorder.dropped", {"count": count}, {"track": "M"})

    def tenant_pseudonym(self, name: str) -> str:
        """Return the pseudonym under which a tenant's events are recorded."""
        return self._redactor.pseudonym("tenant", name)

    def knows_blob(self, reference: str) -> bool:
        """Tell whether this recorder stored this evidence, or the ledger already has it."""
        return hex_digest(reference) in self._stored or self._blobs.has(reference)


def _load_ids() -> Callable[[], str]:
    from uuid_utils import uuid7

    return lambda: uuid7().hex

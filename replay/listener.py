"""What did a replayed request say about itself?  Its events are kept in memory as they are recorded."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import msgspec

from traces.envelope import TraceEvent

if TYPE_CHECKING:
    from traces.recorder import Recorder


class Listener:
    """Records into the child run and keeps the events of the request that is being replayed."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.events: list[TraceEvent] = []
        self._blobs: dict[str, bytes] = {}

    def emit(self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any) -> bool:
        """Record an optional event."""
        self._keep(event_type, payload, columns)
        return self._recorder.emit(event_type, payload=payload, **columns)

    def commit_async(
        self, event_type: str, *, payload: dict[str, Any] | None = None, **columns: Any
    ) -> Awaitable[None]:
        """Record a mandatory event."""
        self._keep(event_type, payload, columns)
        return self._recorder.commit_async(event_type, payload=payload, **columns)

    def put_blob(self, data: bytes) -> str:
        """Store evidence."""
        reference = self._recorder.put_blob(data)
        self._blobs[reference] = data
        return reference

    def read_blob(self, reference: str) -> bytes:
        """Return evidence that this request stored."""
        return self._blobs[reference]

    def _keep(self, event_type: str, payload: dict[str, Any] | None, columns: dict[str, Any]) -> None:
        whole: dict[str, Any] = {
            "ts_us": 0,
            "mono_us": 0,
            "run_id": self._recorder.run_id,
            "component": self._recorder.component,
            **columns,
            "event_type": event_type,
            "payload": payload or {},
        }
        self.events.append(msgspec.convert(whole, TraceEvent))

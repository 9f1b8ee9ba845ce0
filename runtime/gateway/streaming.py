"""How are events sent while a request runs, so that a stalled or vanished client costs nothing?

A stream that waits too long for its client is cut; whatever happens, the source is closed, which cancels the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Message, Send


class EventStream(StreamingResponse):
    """Server-sent events; stall-limited, always closes its source and then awaits `finish`."""

    def __init__(
        self, source: AsyncGenerator[str], *, finish: Callable[[], Awaitable[None]], stall_s: float = 5.0
    ) -> None:
        super().__init__(
            source,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._source = source
        self._finish = finish
        self._stall_s = stall_s

    async def stream_response(self, send: Send) -> None:
        """Send until the end, the client's leaving, or a stall."""

        async def guarded(message: Message) -> None:
            # asyncio.timeout, not wait_for: on 3.11 the latter can swallow a cancellation
            async with asyncio.timeout(self._stall_s):
                await send(message)

        try:
            async with contextlib.aclosing(self._source):
                with contextlib.suppress(TimeoutError):  # the client stalled: cut
                    await super().stream_response(guarded)
        finally:  # apart from the source, because closing a generator that never began runs nothing of it
            await self._finish()


def event(name: str, data: Any) -> str:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"

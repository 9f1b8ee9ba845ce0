"""How do the engine's process and a backend's child speak?  One JSON document a packet over a socket pair; no pickle.

Packets keep their borders (`SOCK_SEQPACKET`), descriptors of shared memory travel beside them, and arrays never go
through the socket.  An end of file means that the other side is gone.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 1 << 16
"""Bytes of one packet; what is longer is shortened by whoever makes it."""
_DESCRIPTORS = 4


class Channel:
    """One end of the conversation."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one message; raises OSError when the other side is gone."""
        data = json.dumps(message, default=str).encode()
        if descriptors:
            socket.send_fds(self._end, [data], list(descriptors))
        else:
            self._end.send(data)

    def receive(self, timeout_s: float | None = None) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next message and its descriptors; None when the other side is gone.  Raises TimeoutError."""
        self._end.settimeout(timeout_s)
        try:
            data, descriptors, _, _ = socket.recv_fds(self._end, LARGEST, _DESCRIPTORS)
        except ConnectionError:
            return None
        if not data:
            return None
        return json.loads(data), descriptors

    def answer(self, timeout_s: float | None) -> dict[str, Any] | None:
        """Return the next message where no descriptors are due; None when the other side is gone."""
        self._end.settimeout(timeout_s)
        try:
            data = self._end.recv(LARGEST)
        except ConnectionError:
            return None
        return json.loads(data) if data else None

    def close(self) -> None:
        """Hang up."""
        self._end.close()


def channel_pair() -> tuple[Channel, socket.socket]:
    """Make both ends: ours, and the child's to be inherited."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), theirs


def inherited(descriptor: int) -> Channel:
    """Take the end that the parent left in this process."""
    os.set_inheritable(descriptor, False)
    return Channel(socket.socket(fileno=descriptor))

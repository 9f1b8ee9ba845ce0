"""What does a signature over a segment say, and who signed it?

A checkpoint is a C2SP signed note (tlog-checkpoint): origin, tree size and root on the first three lines, our extension
lines after them, an empty line, and one Ed25519 signature line.  The head is the same note for the newest segment.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_NAME = "replaylab-ledger"
_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw


class CheckpointError(Exception):
    """A checkpoint cannot be read, or its signature is not by this ledger's key."""


@dataclass(frozen=True)
class OutboxRange:
    """Which events of one outbox a segment holds."""

    outbox: str
    first: int
    last: int


@dataclass(frozen=True)
class Checkpoint:
    """The signed statement about one segment."""

    ledger_id: str
    segment: int
    """From 1."""
    leaves: int
    """Events in this segment."""
    root: bytes
    """RFC 6962 root over the canonical bodies of this segment."""
    first: int
    """Ledger-wide sequence number of the first event."""
    previous: bytes | None
    """Root of the previous segment; None for the first."""
    ranges: tuple[OutboxRange, ...] = ()
    sealed_us: int = 0
    """UTC epoch time of sealing, microseconds."""
    writer: str = ""
    """Build that sealed it and envelope version."""

    @property
    def last(self) -> int:
        """Ledger-wide sequence number of the last event."""
        return self.first + self.leaves - 1

    def body(self) -> bytes:
        """Return the text that is signed."""
        lines = [
            f"replaylab/{self.ledger_id}/segment/{self.segment}",
            str(self.leaves),
            base64.b64encode(self.root).decode(),
            f"first {self.first}",
            f"previous {base64.b64encode(self.previous).decode() if self.previous is not None else '-'}",
            f"sealed {self.sealed_us}",
            f"writer {self.writer or '-'}",
            *(f"outbox {part.outbox} {part.first} {part.last}" for part in self.ranges),
        ]
        return ("\n".join(lines) + "\n").encode()


def parse(text: bytes) -> Checkpoint:
    """Read the statement of a signed note, without judging the signature.

    Raises:
        CheckpointError: it is not a checkpoint of a ledger.
    """
    try:
        lines = text.decode().split("\n\n", 1)[0].split("\n")
        product, ledger_id, kind, segment = lines[0].split("/")
        if (product, kind) != ("replaylab", "segment"):
            raise ValueError("origin")
        fields = dict(line.split(" ", 1) for line in lines[3:7])
        ranges = [line.split(" ") for line in lines[7:] if line]
        previous = fields["previous"]
        return Checkpoint(
            ledger_id=ledger_id,
            segment=int(segment),
            leaves=int(lines[1]),
            root=base64.b64decode(lines[2], validate=True),
            first=int(fields["first"]),
            previous=None if previous == "-" else base64.b64decode(previous, validate=True),
            ranges=tuple(OutboxRange(name, int(first), int(last)) for _, name, first, last in ranges),
            sealed_us=int(fields["sealed"]),
            writer="" if fields["writer"] == "-" else fields["writer"],
        )
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"it is not a ledger checkpoint ({error})") from error


class Signer:
    """Signs statements with a ledger's Ed25519 seed (32 bytes)."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._key.public_key().public_bytes(*_RAW)

    def sign(self, checkpoint: Checkpoint) -> bytes:
        """Return the signed note."""
        body = checkpoint.body()
        signature = base64.b64encode(_key_hash(self.public) + self._key.sign(body)).decode()
        return body + f"\n— {KEY_NAME} {signature}\n".encode()


def open_note(text: bytes, public: bytes) -> Checkpoint:
    """Return the statement of a note that was signed by the key.

    Raises:
        CheckpointError: unreadable, not byte for byte what was signed, or signed by another key.
    """
    body, separator, signatures = text.partition(b"\n\n")
    words = signatures.decode(errors="replace").split()
    if not separator or len(words) != 3 or words[:2] != ["—", KEY_NAME]:
        raise CheckpointError("it has no signature line of this ledger")
    checkpoint = parse(text)
    if checkpoint.body() != body + b"\n":
        raise CheckpointError("it has lines that this version does not write")
    try:
        raw = base64.b64decode(words[2], validate=True)
        if raw[:4] != _key_hash(public):
            raise CheckpointError("it is signed by another key")
        Ed25519PublicKey.from_public_bytes(public).verify(raw[4:], checkpoint.body())
    except (ValueError, InvalidSignature) as error:
        raise CheckpointError("its signature does not match its text") from error
    return checkpoint


def _key_hash(public: bytes) -> bytes:
    """C2SP signed-note key id: first four bytes of SHA-256(name, newline, algorithm 1, key)."""
    return hashlib.sha256(KEY_NAME.encode() + b"\n\x01" + public).digest()[:4]

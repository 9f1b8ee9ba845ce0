"""Which keys does a ledger own, and how are they made once?

``ledger_id`` names the ledger, ``pseudonym.key`` turns names into pseudonyms, ``signing.key`` (Ed25519, 32 raw bytes)
signs checkpoints; ``signing.pub`` may be given away.  Losing the pseudonym key unlinks old pseudonyms; leaking the
signing key lets its holder rewrite what no witness has seen.
"""

from __future__ import annotations

import os
from pathlib import Path

from traces.ledger.layout import LedgerLayout, sync_folder


def _make_once(path: Path, data: bytes) -> bytes:
    """Create a secret file, or return what another process created first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # unlike rename, this never replaces the winner's key
        sync_folder(path.parent)
    except FileExistsError:
        return path.read_bytes()
    finally:
        temporary.unlink(missing_ok=True)
    return data


def _read_or_make(path: Path, size: int) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return _make_once(path, os.urandom(size))


def pseudonym_key(layout: LedgerLayout) -> bytes:
    """Return the ledger's 32-byte pseudonym key, making it the first time."""
    return _read_or_make(layout.keys / "pseudonym.key", 32)


def ledger_id(layout: LedgerLayout) -> str:
    """Return the ledger's random identity, 32 hex digits."""
    return _read_or_make(layout.keys / "ledger_id", 16).hex()


def signing_seed(layout: LedgerLayout) -> bytes:
    """Return the 32-byte Ed25519 seed, making it the first time."""
    return _read_or_make(layout.keys / "signing.key", 32)

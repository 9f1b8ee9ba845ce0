"""How is evidence named, and do its bytes still deserve the name?

A reference is ``evidence://sha256/<hex>``: content is its identity, so storing it twice is storing it once.
"""

from __future__ import annotations

import hashlib
import re

from traces.failures import EvidenceError

PREFIX = "evidence://sha256/"
_REFERENCE = re.compile(r"(?:evidence://sha256/|sha256:)([0-9a-f]{64})")


def reference_to(data: bytes) -> str:
    """Return the reference that names these bytes."""
    return PREFIX + hashlib.sha256(data).hexdigest()


def hex_digest(reference: str) -> str:
    """Return the 64 hex digits of ``evidence://sha256/<hex>`` or ``sha256:<hex>``.

    Raises:
        EvidenceError: it is not such a reference.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise EvidenceError(
            f"{reference!r} does not name evidence.", fix="a reference looks like evidence://sha256/ and 64 hex digits."
        )
    return match.group(1)


def check(reference: str, data: bytes) -> bytes:
    """Return the bytes when they have the digest that names them.

    Raises:
        EvidenceError: the bytes are not those that were stored.
    """
    wanted = hex_digest(reference)
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise EvidenceError(
            f"The evidence {PREFIX}{wanted} is damaged: its bytes have the digest {found}.",
            evidence={"record_type": "blob"},
            fix="restore the file from a copy of the ledger; the record itself is not affected.",
        )
    return data

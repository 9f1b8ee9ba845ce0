"""Which single hash commits to an ordered list of records, and how is one record's membership proved?

The Merkle tree of RFC 6962, section 2.1: a leaf is ``SHA-256(0x00 || record)``, a node is
``SHA-256(0x01 || left || right)``, and a list splits at the largest power of two below its length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(record: bytes) -> bytes:
    """Return the 32-byte hash of one record."""
    return hashlib.sha256(b"\x00" + record).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the 32-byte hash of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(leaves: Iterable[bytes]) -> bytes:
    """Return the root over leaf hashes, keeping only the finished subtrees (one a bit of the count)."""
    stack: list[bytes] = []
    for count, leaf in enumerate(leaves, start=1):
        stack.append(leaf)
        while count % 2 == 0:
            right = stack.pop()
            stack.append(node_hash(stack.pop(), right))
            count //= 2
    if not stack:
        return EMPTY_ROOT
    root = stack.pop()
    while stack:
        root = node_hash(stack.pop(), root)
    return root


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the audit path of one leaf, from the leaf upwards (RFC 6962, section 2.1.1).

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    if len(leaves) == 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*inclusion_path(leaves[:split], index), root_of(leaves[split:])]
    return [*inclusion_path(leaves[split:], index - split), root_of(leaves[:split])]


def root_from_path(leaf: bytes, path: Sequence[bytes], *, index: int, size: int) -> bytes:
    """Return the root that an audit path implies; equal to the signed root when the record is a member.

    Raises:
        ValueError: the path does not have the length that index and size demand.
    """
    if size == 1:
        if path:
            raise ValueError("the audit path is too long")
        return leaf
    if not path:
        raise ValueError("the audit path is too short")
    split = _split(size)
    if index < split:
        return node_hash(root_from_path(leaf, path[:-1], index=index, size=split), path[-1])
    return node_hash(path[-1], root_from_path(leaf, path[:-1], index=index - split, size=size - split))


def _split(size: int) -> int:
    return 1 << ((size - 1).bit_length() - 1)

"""Which cache block holds what, and who computed it?  Reference counts, hashed prefix blocks, eviction and lineage.

Only accounting lives here: block ids and hashes, never a tensor.  Block 0 is scratch: padding and stand-ins point at it
and nothing that counts is ever written there.  A block is in exactly one state:

    free        no content worth keeping
    held        at least one sequence's table names it
    evictable   no table names it, but its hash can still be hit; when none is free, the one released longest ago goes
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SCRATCH_BLOCK = 0


class Origin(NamedTuple):
    """The row of the step plan that computed a block's last token."""

    step: int
    call: int
    row: int


def root_hash(tenant: str | None, salt: str) -> bytes:
    """Start a chain of block hashes that no other tenant or salt can meet; None is the chain that tenants share."""
    text = (f"*:{salt}" if tenant is None else f"{len(tenant)}:{tenant}:{salt}").encode()
    return hashlib.sha256(b"replaylab.prefix/1\x00" + text).digest()


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name a full block by everything before it and its own tokens."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockCache:
    """Accounts for `num_blocks` usable blocks, numbered from 1."""

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self.references = [0] * (num_blocks + 1)
        self.free = list(range(num_blocks, 0, -1))
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.block_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.origin_of: dict[int, Origin] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` can still hand out."""
        return len(self.free) + len(self.evictable)

    def allocate(self) -> int | None:
        """Take a block for new content, evicting the least recently released cached one; None when all are held."""
        if self.free:
            block = self.free.pop()
        elif self.evictable:
            block, _ = self.evictable.popitem(last=False)
            self._forget(block)
        else:
            return None
        self.references[block] = 1
        return block

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Find the cached blocks of the longest known prefix of a hash chain; nothing is acquired."""
        found: list[int] = []
        for name in hashes:
            block = self.block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def count_evictable(self, blocks: Iterable[int]) -> int:
        """Count those that would leave the evictable set when acquired, and so lessen `available`."""
        return sum(block in self.evictable for block in blocks)

    def acquire(self, block: int) -> Origin:
        """Add a reader to a cached block and return who computed it."""
        if self.references[block] == 0:
            del self.evictable[block]
        self.references[block] += 1
        return self.origin_of[block]

    def register(self, block: int, name: bytes, origin: Origin) -> None:
        """Make a full, computed block findable; the first block of a hash keeps it."""
        if self.prefix_caching and name not in self.block_of and block not in self.hash_of:
            self.block_of[name] = block
            self.hash_of[block] = name
            self.origin_of[block] = origin

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reader of each block of a table; later blocks are evicted before earlier ones."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self.hash_of:
                    self.evictable[block] = None
                else:
                    self.free.append(block)

    def _forget(self, block: int) -> None:
        del self.block_of[self.hash_of.pop(block)]
        del self.origin_of[block]

    def problems(self, tables: Iterable[Sequence[int]]) -> list[str]:
        """Compare the accounts with the tables of all running sequences; empty when every block is in its place."""
        held = [0] * (self.num_blocks + 1)
        for table in tables:
            for block in table:
                held[block] += 1
        found: list[str] = []
        free, evictable = set(self.free), set(self.evictable)
        for block in range(1, self.num_blocks + 1):
            if held[block] != self.references[block]:
                found.append(f"block {block}: {self.references[block]} references, in {held[block]} tables")
            states = (block in free) + (block in evictable) + (held[block] > 0)
            if states != 1:
                found.append(f"block {block} is in {states} states")
            if block in evictable and block not in self.hash_of:
                found.append(f"block {block} is evictable without a hash")
        if held[SCRATCH_BLOCK]:
            found.append("the scratch block is in a table")
        if len(free) != len(self.free):
            found.append("a block is free twice")
        if any(self.hash_of.get(block) != name for name, block in self.block_of.items()):
            found.append("hash tables disagree")
        return found

"""What does the scheduler know of one unfinished sequence?"""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.engine.cache import chain_hash

PlannedRow = tuple[int, int, int, bool]
"""Sequence, first position, tokens, and whether its last logits are sampled."""


@dataclass(slots=True)
class SequenceState:
    """One unfinished sequence: its tokens, its blocks, and what orders it among the others."""

    index: int
    tokens: list[int]
    """Prompt and output so far."""
    root: bytes
    """Start of its hash chain: tenant (unless prefixes are shared by all) and salt."""
    computed: int = 0
    """Tokens whose keys and values are in its blocks."""
    blocks: list[int] = field(default_factory=list[int])
    hashes: list[bytes] = field(default_factory=list[bytes])
    """Chain hashes of its full blocks, as far as they were needed."""
    registered: int = 0
    """Leading blocks that were offered to the prefix cache."""
    tenant: str = ""
    priority: int = 0
    """Lower is served first, where the policy looks at it."""
    deadline_us: int | None = None
    """When its result is worth nothing any more, on the clock that arrivals are told on."""
    key: tuple[int, int] = (0, 0)
    """Its place in the policy's order: the policy's rank, then the arrival; it never changes."""
    preemptions: int = 0
    """Times that it lost its blocks to others."""
    charged: int = 0
    """Leading tokens that its tenant was charged for, or that the cache spared."""
    held: bool = False
    """Passed over, because its reader is too far behind."""

    @property
    def arrival(self) -> int:
        """How many sequences had arrived before it."""
        return self.key[1]

    def chain(self, blocks: int, block_size: int) -> list[bytes]:
        """Return the hashes of the first `blocks` full blocks, extending what is known."""
        while len(self.hashes) < blocks:
            first = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(chain_hash(parent, self.tokens[first : first + block_size]))
        return self.hashes[:blocks]

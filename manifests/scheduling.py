"""Under which rules did requests share the engine?  The fourth dimension."""

from __future__ import annotations

from typing import Literal

from manifests.base import Count, DecimalText, Manifest, PositiveCount

Policy = Literal["fcfs", "priority", "deadline", "fair"]


class SchedulingManifest(Manifest):
    """Pin batching, cache and admission rules; settings carry vLLM's names and sense.

    These rules say what the scheduler may do.  What it did is recorded step by step as step plans.
    """

    document: Literal["replaylab.scheduling/1"] = "replaylab.scheduling/1"
    policy: Policy = "fcfs"
    max_num_seqs: PositiveCount = 8
    """Sequences that may run at once."""
    max_num_batched_tokens: PositiveCount = 256
    """Tokens that one step may compute."""
    long_prefill_token_threshold: Count = 0
    """Longest chunk of one prompt in a step; 0 means no limit of its own."""
    block_size: PositiveCount = 16
    """Tokens in a cache block."""
    num_blocks: PositiveCount = 512
    """Blocks in the cache pool."""
    watermark: DecimalText = "0"
    """Share of the blocks that admission keeps free."""
    enable_prefix_caching: bool = True
    context_multiple: PositiveCount = 64
    """Cached context is padded to a multiple of this: its padded length reaches the bits."""
    batch_sizes: tuple[PositiveCount, ...] = (1, 2, 4, 8)
    """Row counts that a call is padded to, ascending."""
    engine_id: str = "engine-0"

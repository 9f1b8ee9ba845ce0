"""Under which rules did requests share the engine?  The fourth dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from manifests.base import Count, DecimalText, Manifest, PositiveCount

Policy = Literal["fcfs", "priority", "deadline", "fair"]
"""Who is served next: arrival; least priority number, then arrival; earliest deadline; least served tenant."""
PrefixSharing = Literal["tenant", "all"]
RowOrder = Literal["stable", "service"]


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
    context_multiple: PositiveCount | None = None
    """Cached context is padded to a multiple of this, which reaches the bits: a multiple of the block size, which it is
    where none is given."""
    batch_sizes: tuple[PositiveCount, ...] = (1, 2, 4, 8)
    """Row counts that a call is padded to, ascending."""
    engine_id: str = "engine-0"
    max_num_queued_reqs: PositiveCount | None = None
    """Sequences that may wait beside those that find places; one more is refused with a time to come back."""
    max_num_queued_tokens: PositiveCount | None = None
    """Tokens that those may have together."""
    max_preemptions: Count | None = None
    """Times that a sequence may lose its blocks to others; None is no limit under `fcfs`, where the oldest never does,
    and 4 under the other policies."""
    aging_steps: PositiveCount = 1_000
    """Steps of waiting that outweigh one level of priority (`priority`)."""
    aging_us: PositiveCount = 60_000_000
    """No sequence is ordered as if due later than this after its arrival (`deadline`)."""
    load_shedding: bool = False
    """Whether a waiting sequence whose deadline cannot be met is refused rather than run into it."""
    prefix_sharing: PrefixSharing = "tenant"
    """Whose cached prefixes a sequence may read: its own tenant's, or anybody's under the same salt."""
    max_undelivered_tokens: PositiveCount | None = None
    """Tokens that a stream may be ahead of its reader before its sequence is passed over; None is no limit."""

    row_order: RowOrder = "stable"
    """Where a decoding sequence stands in its call: in the row that it had in the step before (`stable`), or in the
    order of service, in which all after one that leaves move up (`service`, as it was before there was a choice)."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "max_preemptions",
        "aging_steps",
        "aging_us",
        "load_shedding",
        "prefix_sharing",
        "max_undelivered_tokens",
        "row_order",
    )
    earlier: ClassVar[Mapping[str, Any]] = {"row_order": "service"}

"""How were tokens chosen?  The fifth dimension."""

from __future__ import annotations

from typing import Literal

from manifests.base import Count, DecimalText, Digest, Manifest, PositiveCount


class GenerationManifest(Manifest):
    """Pin seed, sampler, stop rules and the structure that output must have (specification: generation policy)."""

    document: Literal["replaylab.generation/1"] = "replaylab.generation/1"
    seed: Count
    sampler: str = "categorical"
    """greedy or categorical."""
    sampler_algorithm: str = "counter-gumbel/1"
    """Name and version of the function from (seed, request, position) to a draw."""
    temperature: DecimalText = "0"
    top_k: PositiveCount | None = None
    """None keeps every token."""
    top_p: DecimalText = "1"
    max_tokens: PositiveCount
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[Count, ...] = ()
    grammar_digest: Digest | None = None
    """Of the grammar or JSON Schema that constrains decoding."""

"""What was the model allowed to read?  The sixth dimension."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manifests.base import Count, Digest, DigestMap, Manifest, TextMap


class ContextManifest(Manifest):
    """Pin the way from a question to the assembled context (specification: context and retrieval)."""

    document: Literal["replaylab.context/1"] = "replaylab.context/1"
    query_transform: str = "none"
    """Name and version."""
    index_digest: Digest | None = None
    """None for a request without retrieval."""
    filters: TextMap = Field(default_factory=dict[str, str])
    ranking: str = "none"
    """Name and version of the ranking function."""
    source_snapshots: DigestMap = Field(default_factory=dict[str, str])
    """Source reference to the digest of the text that was used."""
    redaction_version: str = "none"
    context_digest: Digest | None = None
    """Of the context as assembled."""
    token_budget: Count = 0
    """Most tokens that context may take."""

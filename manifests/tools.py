"""Which tools could be called, under whose rules?  The seventh dimension."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manifests.base import DigestMap, Manifest, TextMap


class ToolsManifest(Manifest):
    """Pin tool contracts and authorization (specification: tools and external state).

    Arguments, idempotency keys and results of calls are facts of a run, and so stand in its trace.
    """

    document: Literal["replaylab.tools/1"] = "replaylab.tools/1"
    server: str = "none"
    server_version: str = "none"
    protocol_version: str = "none"
    tools: DigestMap = Field(default_factory=dict[str, str])
    """Tool name to the digest of its input schema."""
    authorization_version: str = "none"
    resource_versions: TextMap = Field(default_factory=dict[str, str])
    """External resources that tools read, and their versions."""

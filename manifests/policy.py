"""What decided whether an output was accepted?  The eighth dimension."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manifests.base import Count, DecimalMap, Digest, Manifest, TextMap


class PolicyManifest(Manifest):
    """Pin policy, validators, output schema, evaluation and thresholds (specification: policy and evaluation)."""

    document: Literal["replaylab.policy/1"] = "replaylab.policy/1"
    policy_version: str
    validators: TextMap = Field(default_factory=dict[str, str])
    """Validator name to its version."""
    output_schema_digest: Digest | None = None
    evaluation: TextMap = Field(default_factory=dict[str, str])
    """Evaluation data set and rubric to their versions."""
    thresholds: DecimalMap = Field(default_factory=dict[str, str])
    """Name to a decimal number."""
    repair_limit: Count = 0
    """Model calls that may be spent on repairing one output."""

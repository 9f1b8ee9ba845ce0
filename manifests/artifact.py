"""Which model is it, exactly?  The first dimension: digests instead of mutable names."""

from __future__ import annotations

from typing import Literal

from manifests.base import Digest, Manifest


class ArtifactManifest(Manifest):
    """Pin model, tokenizer, preprocessing, adapters, quantization and package (specification: artifact identity)."""

    document: Literal["replaylab.artifact/1"] = "replaylab.artifact/1"
    model: str
    """The name people use; it pins nothing."""
    family: str
    """Architecture family: llama, qwen2, qwen3, onnx, torch-export."""
    model_digest: Digest
    """Of configuration and weights."""
    tokenizer_digest: Digest | None = None
    """None for a model without a tokenizer."""
    preprocessing_digest: Digest | None = None
    """Of prompt template, special tokens and whatever else stands between a request and its tensors."""
    adapter_digests: tuple[Digest, ...] = ()
    """In the order in which they are applied."""
    quantization: str = "none"
    package_digest: Digest | None = None
    """Of the prepared package; None before there is one."""

"""How was the model made executable?  The second dimension: everything between weights and kernels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manifests.base import Manifest, TextMap


class CompilerManifest(Manifest):
    """Pin backend, precision, exporter, passes and flags (specification: compiler and runtime configuration)."""

    document: Literal["replaylab.compiler/1"] = "replaylab.compiler/1"
    backend: str
    """eager, inductor, onnxruntime, ..."""
    backend_version: str
    precision: str
    """float32, bfloat16, ...: of weights and activations."""
    exporter: str = "none"
    exporter_version: str = "none"
    optimization_level: str = "default"
    """In the backend's own words."""
    passes: tuple[str, ...] = ()
    """Graph passes in the order in which they ran."""
    flags: TextMap = Field(default_factory=dict[str, str])
    """Backend options that can change kernels: freezing, prepacking, norm, ..."""
    execution_providers: tuple[str, ...] = ()
    """In order of preference; the order decides the partition."""
    batch_invariant: bool = False
    """Whether a recipe was chosen under which a row's bits do not depend on its batch."""
    runtime_versions: TextMap = Field(default_factory=dict[str, str])
    """Libraries that were present when the package was built."""

"""Pins of a made-up run, all eight dimensions."""

from __future__ import annotations

from manifests.artifact import ArtifactManifest
from manifests.canonical import digest
from manifests.compiler import CompilerManifest
from manifests.context import ContextManifest
from manifests.generation import GenerationManifest
from manifests.hardware import HardwareManifest
from manifests.policy import PolicyManifest
from manifests.run import Pins
from manifests.scheduling import SchedulingManifest
from manifests.tools import ToolsManifest


def made_up_pins() -> Pins:
    """Return pins of a request of the eager backend in float32."""
    return Pins(
        artifact=ArtifactManifest(model="m", family="llama", model_digest=digest(b"m"), package_digest=digest(b"p")),
        compiler=CompilerManifest(backend="eager", backend_version="2.13", precision="float32"),
        hardware=HardwareManifest(
            cpu_model="cpu", architecture="x86_64", cores=2, threads=1, memory_bytes=1, kernel="k"
        ),
        scheduling=SchedulingManifest(),
        generation=GenerationManifest(seed=1, max_tokens=8),
        context=ContextManifest(),
        tools=ToolsManifest(),
        policy=PolicyManifest(policy_version="support-desk/1"),
    )

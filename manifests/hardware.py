"""Which machine computed it?  The third dimension: the processor, its instruction sets, and what steers libraries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manifests.base import Count, Manifest, PositiveCount, TextMap


class HardwareManifest(Manifest):
    """Pin the machine and the environment that numeric libraries read (specification: hardware and driver state)."""

    document: Literal["replaylab.hardware/1"] = "replaylab.hardware/1"
    cpu_model: str
    """Vendor, family, model, stepping and name: a virtual machine's name alone says little."""
    architecture: str
    """x86_64, aarch64, ..."""
    isa_flags: tuple[str, ...] = ()
    """Instruction sets that numeric kernels choose by, sorted."""
    cores: PositiveCount
    """Processors that this process may use."""
    threads: PositiveCount
    """Compute threads: a reduction split over another number of threads has other bits."""
    memory_bytes: Count
    kernel: str
    """Operating system and release."""
    topology: str = "unknown"
    """Sockets, cores and threads per core."""
    firmware: str | None = None
    """Microcode revision; None where the machine does not say."""
    environment: TextMap = Field(default_factory=dict[str, str])
    """Variables that numeric libraries read (MKL_CBWR, ONEDNN_MAX_CPU_ISA, ...); an unset one is absent."""
    library_versions: TextMap = Field(default_factory=dict[str, str])
    """Numeric libraries and the C library as installed."""
    gpu: str | None = None
    """Model of each device, in order; None without one."""
    gpu_driver: str | None = None

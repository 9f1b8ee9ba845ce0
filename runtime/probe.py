"""Which machine is this?  Fills the hardware dimension with what can reach the bits of a result here."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from manifests.hardware import HardwareManifest

NUMERIC_ENVIRONMENT = (
    "AOTI_RUNTIME_CHECK_INPUTS",
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "GLIBC_TUNABLES",  # the C library's own choice of exp, log and memcpy kernels
    "GOMP_SPINCOUNT",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NPY_DISABLE_CPU_FEATURES",
    "NPY_ENABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_SCHEDULE",
    "OMP_WAIT_POLICY",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "XLA_FLAGS",
)
"""Variables that numeric libraries read; each changes kernels, splits or thread counts."""

# fmt: off
NUMERIC_ISA = frozenset({
    "sse2", "ssse3", "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8",
    "avx_ne_convert", "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl", "avx512ifma", "avx512vbmi",
    "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_int8", "amx_bf16", "amx_fp16", "avx10", "asimd", "asimdhp", "asimddp", "asimdfhm", "fphp", "sve", "sve2",
    "i8mm", "bf16", "svebf16", "svei8mm", "sme", "sme2",
})
# fmt: on
"""Instruction sets by which MKL, oneDNN, MLAS, ATen and libm choose kernels, in the kernel's spelling."""

LIBRARIES = ("numpy", "onnxruntime", "safetensors", "tokenizers", "torch", "executorch", "iree-base-runtime", "jaxlib")
"""Distributions whose code computes, or feeds what is computed."""


def probe(
    *,
    threads: int | None = None,
    deep: bool = False,
    environment: Mapping[str, str] | None = None,
    root: Path = Path("/"),
) -> HardwareManifest:
    """Describe this machine and process.

    Args:
        threads: compute threads that will be used; by default OMP_NUM_THREADS, or 1.
        deep: also import torch (seconds) for the versions of MKL, oneDNN and the capability that ATen chose.  The two
            depths give different documents, so compare runs that were probed alike.
        environment: instead of this process's own.
        root: where ``proc`` is found.
    """
    variables = os.environ if environment is None else environment
    processor = _processor(root)
    versions = _library_versions()
    if deep:
        versions |= _linked_versions()
    gpu, driver = _gpu(root)
    return HardwareManifest(
        cpu_model=_cpu_model(processor),
        architecture=platform.machine(),
        isa_flags=_isa_flags(processor),
        cores=_usable_cores(),
        threads=_threads(variables) if threads is None else threads,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {platform.release()}",
        topology=_topology(processor),
        firmware=processor.get("microcode"),
        environment={name: variables[name] for name in NUMERIC_ENVIRONMENT if name in variables},
        library_versions=versions,
        gpu=gpu,
        gpu_driver=driver,
    )


def pinned_environment(hardware: HardwareManifest, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which a worker process has the recorded numeric settings.

    Every variable of NUMERIC_ENVIRONMENT is as recorded, which includes being unset; a recorded OMP_NUM_THREADS follows
    the thread count.  Libraries read these once, at load, so they must be set before a process starts.
    """
    inherited = os.environ if base is None else base
    kept = {name: value for name, value in inherited.items() if name not in NUMERIC_ENVIRONMENT}
    pinned = kept | dict(hardware.environment)
    if "OMP_NUM_THREADS" in pinned and _threads(pinned) != hardware.threads:
        pinned["OMP_NUM_THREADS"] = str(hardware.threads)
    return pinned


def _processor(root: Path) -> dict[str, str]:
    """Read the first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = (root / "proc" / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        name, sign, value = line.partition(":")
        if sign:
            fields[name.strip()] = value.strip()
    return fields


def _cpu_model(processor: Mapping[str, str]) -> str:
    """Name vendor, family, model and stepping too: virtual machines call very different processors alike."""
    parts = [processor.get("vendor_id") or processor.get("CPU implementer", "")]
    for label, name in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"), ("part", "CPU part")):
        if name in processor:
            parts.append(f"{label} {processor[name]}")
    name = processor.get("model name") or platform.processor()
    described = " ".join(part for part in parts if part)
    return f"{name} ({described})" if name and described else name or described or "unknown"


def processor_flags(root: Path = Path("/")) -> frozenset[str]:
    """List every feature of the processor: what compiled code may need is more than what a manifest pins."""
    return _offered(_processor(root))


def _offered(processor: Mapping[str, str]) -> frozenset[str]:
    return frozenset((processor.get("flags") or processor.get("Features", "")).split())


def _isa_flags(processor: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(_offered(processor).intersection(NUMERIC_ISA)))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _topology(processor: Mapping[str, str]) -> str:
    if "siblings" not in processor or "cpu cores" not in processor:
        return f"{os.cpu_count() or 1} processors"
    return f"{processor['cpu cores']} cores, {processor['siblings']} threads a socket; {os.cpu_count() or 1} processors"


def _threads(environment: Mapping[str, str]) -> int:
    """Read OMP_NUM_THREADS, which may be a list by nesting level; one compute thread is this project's default."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else 1


def _library_versions() -> dict[str, str]:
    """Read versions from installed metadata: importing the libraries would take seconds."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        versions["libc"] = os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    except (AttributeError, ValueError, OSError):
        versions["libc"] = "unknown"
    return versions


def _linked_versions() -> dict[str, str]:
    """Ask torch which MKL and oneDNN it was linked with and which kernels ATen chose; empty without torch."""
    try:
        import torch
    except ImportError:
        return {}
    shown = torch.__config__.show()
    found = {"aten-cpu-capability": str(torch.backends.cpu.get_cpu_capability())}
    patterns = {"mkl": r"Math Kernel Library Version (\S+)", "onednn": r"(?:oneDNN|MKL-DNN|MKLDNN) v(\S+)"}
    for name, pattern in patterns.items():
        match = re.search(pattern, shown)
        if match is not None:
            found[name] = match[1]
    return found


def _gpu(root: Path) -> tuple[str | None, str | None]:
    """Read NVIDIA devices and driver from /proc; starting nvidia-smi would take a second and may hang."""
    folder = root / "proc" / "driver" / "nvidia"
    models: list[str] = []
    for information in sorted((folder / "gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", _text(information), flags=re.MULTILINE)
        models.append(match[1].strip() if match is not None else "unknown NVIDIA device")
    if not models:
        return None, None
    version = re.search(r"Kernel Module\D*?(\d[\d.]+)", _text(folder / "version"))
    return ", ".join(models), None if version is None else version[1]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

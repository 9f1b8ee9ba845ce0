"""What is inside an AOTInductor package, and how do two equal builds get equal bytes?"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.backends.elf import text_section_bytes

COMMAND_COMMENT = b"\n// Compile cmd"
"""Generated sources end with the compiler commands, appended once per build with the cache in use: not content."""
IDENTITY_MEMBER = ".data/serialization_id"
"""torch's own hash over the members, comments included; it would repeat the difference."""
ENFORCED = re.compile(r"input_handles\[(\d+)\]: dim value is too large at (\d+), \"\s*<< \"expected to be <= (\d+)")


def canonicalize(path: Path) -> None:
    """Rewrite a package with sorted members, no times and no command comments, so that its bytes name its content."""
    members: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            members[name] = data.split(COMMAND_COMMENT)[0] if name.endswith(".cpp") else data
    written = path.with_suffix(".canonical")
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            if not name.endswith(IDENTITY_MEMBER):
                archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), members[name])
    written.replace(path)


def read_package(path: Path) -> dict[str, Any]:
    """Read from a package of our own making: enforced bounds, library kernels, code size, vector instructions."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        wrapper = archive.read(next(name for name in names if name.endswith(".wrapper.cpp"))).decode()
        kernels = archive.read(next(name for name in names if name.endswith(".kernel.cpp"))).decode()
        metadata = archive.read(next(name for name in names if name.endswith(".wrapper_metadata.json"))).decode()
        shared = archive.read(next(name for name in names if name.endswith(".so")))
    limits = {(int(place), int(axis)): int(most) for place, axis, most in ENFORCED.findall(wrapper)}
    library = Counter(re.findall(r"aoti_torch_cpu_\w+(?=\()", wrapper))
    isa = re.search(r'"AOTI_CPU_ISA": "([^"]*)"', metadata)
    return {
        "limits": limits,
        "library": dict(sorted(library.items())),
        "openmp_regions": kernels.count("#pragma omp parallel"),
        "code_bytes": text_section_bytes(shared),
        "isa": isa.group(1) if isa else "unknown",
    }


def enforced_bounds(
    limits: Mapping[tuple[int, int], int], signature: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[int]]:
    """Give the largest size of each symbol that the compiled checks enforce, at the first place where it stands.

    `limits` is by (input, dimension); a dimension is a symbol where its text is a name alone.
    """
    found: dict[str, list[int]] = {}
    for place, entry in enumerate(signature.values()):
        for axis, name in enumerate(entry["shape"]):
            if str(name).isidentifier() and (place, axis) in limits:
                found.setdefault(name, [limits[place, axis]])
    return found

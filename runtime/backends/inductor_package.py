"""What is inside an AOTInductor package, and how do two equal builds get equal bytes?"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from runtime.backends.elf import text_section_bytes

COMMAND_COMMENT = b"\n// Compile cmd"
"""Generated sources end with the compiler commands, appended once per build with the cache in use: not content."""
IDENTITY_MEMBER = ".data/serialization_id"
"""torch's own hash over the members, comments included; it would repeat the difference."""
ENFORCED = re.compile(r"input_handles\[(\d+)\]: dim value is too large at (\d+), \"\s*<< \"expected to be <= (\d+)")
SYMBOL_PLACES = {"B": (0, 0), "T": (0, 1), "S": (4, 1)}
"""Where each symbol's bound stands in the compiled checks: (input, dimension)."""


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
        "symbols": {name: [1, limits[place]] for name, place in SYMBOL_PLACES.items() if place in limits},
        "library": dict(sorted(library.items())),
        "openmp_regions": kernels.count("#pragma omp parallel"),
        "code_bytes": text_section_bytes(shared),
        "isa": isa.group(1) if isa else "unknown",
    }

"""How are all buckets compiled without risking this process?  The child: `python -m runtime.backends.xla_compile`.

Reports `optimized` (passes of the inspected buckets, memory, cost), `partitioned` (who runs which instruction) and
`lowered` (code, kernels, files).  XLA compiles a bucket in one go, so the three come close together.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from runtime.backends.build_child import Reporter, run_build
from runtime.backends.xla_executable import (
    code_bytes,
    compile_shapes,
    count_instructions,
    instruction_sets,
    kernels,
    owners,
    serialize,
)
from runtime.backends.xla_passes import PassReport, dump_options, read_passes
from runtime.backends.xla_platform import client
from runtime.backends.xla_program import PortableProgram, shape_of


def build(request: dict[str, Any], reporter: Reporter) -> None:
    """Compile every requested bucket, writing executables and reporting what each holds."""
    from manifests.canonical import digest

    client(request["threads"])
    program = PortableProgram.read(Path(request["program"]).read_bytes(), Path(request["document"]).read_text())
    held = [shape_of(tuple(sizes), dtype) for sizes, dtype in request["held"]]
    options: dict[str, Any] = request["options"]
    inspected = {
        name: inspect(program, request["buckets"][name], held, options, Path(request["dump"]) / name)
        for name in request["inspect"]
    }
    found: dict[str, dict[str, Any]] = {}
    for name, values in request["buckets"].items():
        start = time.perf_counter_ns()
        compiled = compile_shapes(program, values, held, options)
        data = serialize(compiled)
        Path(request["output"], request["file_name"].format(name)).write_bytes(data)
        generated = kernels(data)
        found[name] = {
            "hlo": digest(compiled.text.encode()),
            "instructions": count_instructions(compiled.text),
            "temporary_bytes": compiled.temporary_bytes,
            "flops": compiled.flops,
            "owners": owners(compiled.text, generated),
            "kernels": len(generated),
            "code_bytes": code_bytes(data),
            "executable_bytes": len(data),
            "instruction_sets": list(instruction_sets(data)),
            "us": (time.perf_counter_ns() - start) // 1000,
        }
    parts = {
        "optimized": ("hlo", "instructions", "temporary_bytes", "flops"),
        "partitioned": ("owners",),
        "lowered": ("kernels", "code_bytes", "executable_bytes", "instruction_sets", "us"),
    }
    for event, fields in parts.items():
        extra = {"inspected": inspected} if event == "optimized" else {}
        buckets = {name: {field: entry[field] for field in fields} for name, entry in found.items()}
        reporter.send(event, buckets=buckets, **extra)


def inspect(
    program: PortableProgram, values: dict[str, int], held: list[Any], options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Compile one bucket with XLA's dumps on and read its passes; its executable names the folder and is dropped."""
    folder.mkdir(parents=True)
    compile_shapes(program, values, held, {**options, **dump_options(folder)})
    report: PassReport = read_passes(folder)
    shutil.rmtree(folder)
    return {
        "passes": report.passes,
        "times_us": report.times_us,
        "before": report.before,
        "after": report.after,
        "fusions": report.fusions,
    }


if __name__ == "__main__":
    raise SystemExit(run_build(sys.argv[1:], build))

"""How is a program compiled by IREE without risking this process?  The child: imports, then compiles phase by phase.

Run as `python -m runtime.backends.iree_compile REQUEST.json`; reports `imported`, `verified`, `optimized`,
`partitioned` and `lowered`.  Every phase is one call of iree-compile that resumes where the one before stopped; the
module at the end is byte for byte that of a single call.  Input goes through standard input, because a file's name
would become part of the module's bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.backends import iree_records
from runtime.backends.build_child import Reporter, ToolCrashed, run_build

PHASES = (("optimized", None, "global-optimization"), ("partitioned", "global-optimization", "flow"))
"""Report, phase to resume from, phase to stop after; `lowered` is what remains."""


class CompilerFailed(Exception):
    """iree-compile refused its input."""


def import_programs(request: dict[str, Any], reporter: Reporter) -> bytes | None:
    """Import every function of the request into one module; None where it holds operators that no compiler knows."""
    import iree.compiler.ir as library
    from iree.compiler.extras.fx_importer import FxImporter

    from runtime.backends.narrowing import load_program, narrow

    ir: Any = library  # its names come from a native module
    exported = load_program(request["program"])
    with ir.Context() as context:
        importer = FxImporter(context=context)
        for function in request["functions"]:
            program = narrow(exported, function["sizes"]).run_decompositions(_decompositions())
            importer.import_program(program, func_name=function["name"])
        module = importer.module
        data, text = _bytecode(module.operation), _text(module)
        unsupported = iree_records.unsupported(module.operation, ir.WalkResult.ADVANCE)
        reporter.send(
            "imported",
            module="sha256:" + hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            unsupported=unsupported,
            dimensions=iree_records.imported_dimensions(text),
        )
        if unsupported:
            return None
        operators = iree_records.operators(module.operation, ir.WalkResult.ADVANCE)
        reporter.send("verified", valid=bool(module.operation.verify()), operators=operators)
    return data


def compile_phases(data: bytes, request: dict[str, Any], reporter: Reporter) -> None:
    """Compile the imported module, one report a phase."""
    import iree.compiler.ir as library

    ir: Any = library  # its names come from a native module
    for event, start, stop in PHASES:
        input_type = ["--iree-input-type=torch"] if start is None else [f"--compile-from={start}"]
        timing = ["--mlir-timing", "--mlir-timing-display=tree", "--mlir-output-format=json"]
        began = time.perf_counter_ns()
        arguments = [*request["flags"], *input_type, f"--compile-to={stop}", "--emit-mlir-bytecode", *timing]
        data, log = run_compiler(arguments, data)
        spent = (time.perf_counter_ns() - began) // 1000
        with ir.Context():
            module = ir.Module.parse(data)
            text = _text(module)
            reporter.send(
                event,
                module="sha256:" + hashlib.sha256(data).hexdigest(),
                operators=iree_records.operators(module.operation, ir.WalkResult.ADVANCE),
                passes=iree_records.passes(log),
                us=spent,
                target=iree_records.target_of(text),
                executables=iree_records.executables(text),
                dimensions=iree_records.compiled_dimensions(text),
            )
    statistics = Path(request["work"]) / "scheduling.json"
    counted = [
        "--iree-scheduling-dump-statistics-format=json",
        f"--iree-scheduling-dump-statistics-file={statistics}",
    ]
    began = time.perf_counter_ns()
    module_bytes, _ = run_compiler([*request["flags"], "--compile-from=flow", *counted], data)
    spent = (time.perf_counter_ns() - began) // 1000
    Path(request["output"]).write_bytes(module_bytes)
    reporter.send("lowered", us=spent, statistics=json.loads(statistics.read_text()))


def run_compiler(arguments: list[str], data: bytes) -> tuple[bytes, str]:
    """Run iree-compile from standard input to standard output; a death by signal is `ToolCrashed`."""
    from iree.compiler.tools.binaries import find_tool

    done = subprocess.run([find_tool("iree-compile"), "-", *arguments, "-o", "-"], input=data, capture_output=True)
    log = done.stderr.decode(errors="replace")
    sys.stderr.write(log[:2000])
    if done.returncode < 0:
        # A compiler that named a fault and then crashed has refused its input; only a silent death is a crash.
        if "error:" in log and -done.returncode in (signal.SIGSEGV, signal.SIGABRT):
            raise CompilerFailed(_diagnostics(log))
        raise ToolCrashed("iree-compile", -done.returncode, log[-1500:])
    if done.returncode:
        raise CompilerFailed(_diagnostics(log))
    return done.stdout, log


def _diagnostics(log: str) -> str:
    lines = [line for line in log.splitlines() if "error:" in line or "LLVM ERROR" in line]
    return "\n".join(lines[:8]) or log[-1500:]


def _decompositions() -> Any:
    """Decompose as torch does by default, but to `squeeze.dim`: torch-mlir has no `squeeze.dims`."""
    import torch

    aten = torch.ops.aten
    table = torch.export.default_decompositions()

    def squeeze_dims(x: Any, dims: list[int]) -> Any:
        for dim in sorted((entry % x.dim() for entry in dims), reverse=True):
            x = aten.squeeze.dim(x, dim)
        return x

    table[aten.squeeze.dims] = squeeze_dims
    table.pop(aten.squeeze.dim, None)  # else it decomposes back into squeeze.dims, for ever
    return table


def _text(module: Any) -> str:
    return str(module.operation.get_asm(large_elements_limit=4, large_resource_limit=4))


def _bytecode(operation: Any) -> bytes:
    held = io.BytesIO()
    operation.write_bytecode(held)
    return held.getvalue()


def build(request: dict[str, Any], reporter: Reporter) -> None:
    """Import, and compile what was imported."""
    data = import_programs(request, reporter)
    if data is not None:
        compile_phases(data, request, reporter)


if __name__ == "__main__":
    raise SystemExit(run_build(sys.argv[1:], build))

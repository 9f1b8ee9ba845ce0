"""How is a program compiled without risking this process?  The child: reads a request, compiles, reports as it goes.

Run as `python -m runtime.backends.inductor_compile REQUEST.json`.  Reports are JSON lines on the original standard
output: `optimized`, `partitioned`, `lowered`, or `failed` with the compiler's own words.  Everything else that
libraries print goes to standard error.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

SETTINGS_THAT_REPEAT = {"aot_inductor.check_lowerbound": False}
"""Without it the compiled check refuses every dimension of size 1."""


class Reporter:
    """Writes reports as the compiler passes the points that part optimize, partition and lower."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = time.perf_counter_ns()
        self.passes: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        """Write one report with the microseconds since the start."""
        spent = (time.perf_counter_ns() - self._start) // 1000
        self._stream.write(json.dumps({"event": event, "elapsed_us": spent, **fields}) + "\n")
        self._stream.flush()


def watch_passes(reporter: Reporter) -> None:
    """Count graph nodes before and after every pass that Inductor's observer announces."""
    from torch.fx.passes.graph_transform_observer import GraphTransformObserver as Observer

    enter, leave = Observer.__enter__, Observer.__exit__

    def entered(self: Any) -> Any:
        self._replaylab_nodes = len(self.gm.graph.nodes)
        return enter(self)

    def left(self: Any, *error: Any) -> Any:
        result = leave(self, *error)
        after = len(self.gm.graph.nodes)
        entry = {"name": f"{self.subsystem}.{self.passname}", "before": self._replaylab_nodes, "after": after}
        reporter.passes.append(entry)
        return result

    Observer.__enter__, Observer.__exit__ = entered, left  # type: ignore[method-assign]


def watch_commands(reporter: Reporter) -> None:
    """Keep the flags and the seconds of every C++ compiler call."""
    from torch._inductor import cpp_builder

    run = cpp_builder.run_compile_cmd

    def timed(command: str, cwd: str) -> Any:
        start = time.perf_counter_ns()
        result = run(command, cwd)
        flags = re.findall(r"(?:^|\s)(-(?:O\d|march=\S+|ffp-contract=\S+|fopenmp|mavx512\w*|mfma|std=\S+))", command)
        reporter.commands.append({"flags": flags, "us": (time.perf_counter_ns() - start) // 1000})
        return result

    cpp_builder.run_compile_cmd = timed


def watch_graph(reporter: Reporter) -> None:
    """Report when the graph passes are done and when every operation has an owner."""
    from torch._inductor.graph import GraphLowering

    run, counted = GraphLowering.run, GraphLowering.codegen_with_cpp_wrapper

    def observed_run(self: Any, *arguments: Any) -> Any:
        graph = self.module.graph
        text = "\n".join(f"{node.op} {node.target} {node.args}" for node in graph.nodes)
        calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
        reporter.send(
            "optimized",
            passes=reporter.passes,
            nodes=len(graph.nodes),
            operators=dict(sorted(calls.items())),
            graph="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        )
        return run(self, *arguments)

    def observed_codegen(self: Any, *arguments: Any) -> Any:
        owners: dict[str, Counter[str]] = {"generated": Counter(), "library": Counter()}
        for operation in self.operations:
            kernel = getattr(operation, "python_kernel_name", None) or getattr(operation, "cpp_kernel_name", None)
            if kernel:
                owners["library"][str(kernel)] += 1
            elif type(operation).__name__ == "ComputedBuffer":
                owners["generated"][type(operation.data).__name__] += 1
            else:
                owners["library"][type(operation).__name__] += 1
        found = {owner: dict(sorted(counts.items())) for owner, counts in owners.items()}
        reporter.send("partitioned", owners=found)
        return counted(self, *arguments)

    GraphLowering.run = observed_run
    GraphLowering.codegen_with_cpp_wrapper = observed_codegen


def compile_program(request: dict[str, Any], reporter: Reporter) -> None:
    """Load the program, compile it into a package file and report each part."""
    import torch
    from torch._inductor import aoti_compile_and_package, metrics

    torch.set_num_threads(request["threads"])
    watch_passes(reporter)
    watch_commands(reporter)
    watch_graph(reporter)
    exported = torch.export.load(request["program"])
    with torch.no_grad():
        aoti_compile_and_package(
            exported,
            package_path=request["output"],
            inductor_configs={
                **SETTINGS_THAT_REPEAT,
                "aot_inductor.metadata": request["metadata"],
                "freezing": request["freezing"],
            },
        )
    reporter.send(
        "lowered",
        compiler=compiler_version(),
        commands=reporter.commands,
        kernels=metrics.generated_kernel_count,
        nodes_before_fusion=metrics.ir_nodes_pre_fusion,
    )


def compiler_version() -> str:
    """Ask the C++ compiler for its name and version: with another one the same program gives other code."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    answer = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()[0].strip()


def wait_for_turn(cache: Path) -> None:
    """Hold the cache's lock until this process ends: equal programs share files there, so builds go one by one."""
    descriptor = os.open(cache / "build.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def main(arguments: list[str]) -> int:
    """Compile one request; exit code 0, or 1 after a `failed` report."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not disturb the reports
    reporter = Reporter(reports)
    request = json.loads(Path(arguments[0]).read_text())
    try:
        wait_for_turn(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        compile_program(request, reporter)
    except Exception as error:
        reporter.send(
            "failed", exception=type(error).__name__, text=str(error)[-4000:], errno=getattr(error, "errno", None)
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

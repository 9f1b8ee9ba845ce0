"""How is a program compiled without risking this process?  The child: reads a request, compiles, reports as it goes.

Run as `python -m runtime.backends.inductor_compile REQUEST.json`; reports `optimized`, `partitioned` and `lowered`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from runtime.backends.build_child import Reporter, run_build

SETTINGS_THAT_REPEAT = {"aot_inductor.check_lowerbound": False}
"""Without it the compiled check refuses every dimension of size 1."""


class Observed:
    """What the watchers below saw, in the compiler's order."""

    def __init__(self) -> None:
        self.passes: list[dict[str, Any]] = []
        self.pass_us: dict[str, int] = {}
        self.commands: list[dict[str, Any]] = []


def watch_passes(observed: Observed) -> None:
    """Count graph nodes, and the time, before and after every pass that Inductor's observer announces."""
    from torch.fx.passes.graph_transform_observer import GraphTransformObserver as Observer

    enter, leave = Observer.__enter__, Observer.__exit__

    def entered(self: Any) -> Any:
        self._replaylab_nodes, self._replaylab_ns = len(self.gm.graph.nodes), time.perf_counter_ns()
        return enter(self)

    def left(self: Any, *error: Any) -> Any:
        result = leave(self, *error)
        after = len(self.gm.graph.nodes)
        name = f"{self.subsystem}.{self.passname}"
        entry = {"name": name, "before": self._replaylab_nodes, "after": after}
        observed.passes.append(entry)
        spent = (time.perf_counter_ns() - self._replaylab_ns) // 1000
        observed.pass_us[name] = observed.pass_us.get(name, 0) + spent
        return result

    Observer.__enter__, Observer.__exit__ = entered, left  # type: ignore[method-assign]


def watch_commands(observed: Observed) -> None:
    """Keep the flags and the seconds of every C++ compiler call."""
    from torch._inductor import cpp_builder

    run = cpp_builder.run_compile_cmd

    def timed(command: str, cwd: str) -> Any:
        start = time.perf_counter_ns()
        result = run(command, cwd)
        flags = re.findall(r"(?:^|\s)(-(?:O\d|march=\S+|ffp-contract=\S+|fopenmp|mavx512\w*|mfma|std=\S+))", command)
        observed.commands.append({"flags": flags, "us": (time.perf_counter_ns() - start) // 1000})
        return result

    cpp_builder.run_compile_cmd = timed


def watch_graph(observed: Observed, reporter: Reporter) -> None:
    """Report when the graph passes are done and when every operation has an owner."""
    from torch._inductor.graph import GraphLowering

    run, counted = GraphLowering.run, GraphLowering.codegen_with_cpp_wrapper

    def observed_run(self: Any, *arguments: Any) -> Any:
        graph = self.module.graph
        text = "\n".join(f"{node.op} {node.target} {node.args}" for node in graph.nodes)
        calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
        reporter.send(
            "optimized",
            passes=observed.passes,
            pass_us=observed.pass_us,
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
    from torch.utils import _pytree as pytree

    torch.set_num_threads(request["threads"])
    observed = Observed()
    watch_passes(observed)
    watch_commands(observed)
    watch_graph(observed, reporter)
    exported = torch.export.load(request["program"])
    nesting = exported.call_spec.in_spec
    if not exported.example_inputs and nesting is not None:  # a saved program's own are never read
        made = [torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape in request["examples"]]
        exported.example_inputs = pytree.tree_unflatten(made, nesting)
    with torch.no_grad():
        aoti_compile_and_package(
            exported,
            package_path=request["output"],
            inductor_configs={
                **SETTINGS_THAT_REPEAT,
                "aot_inductor.metadata": request["metadata"],
                "freezing": request["freezing"],
                **request.get("settings", {}),
            },
        )
    reporter.send(
        "lowered",
        compiler=compiler_version(),
        commands=observed.commands,
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


def build(request: dict[str, Any], reporter: Reporter) -> None:
    """Compile when it is this build's turn."""
    wait_for_turn(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    compile_program(request, reporter)


if __name__ == "__main__":
    raise SystemExit(run_build(sys.argv[1:], build))

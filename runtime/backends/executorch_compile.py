"""How is a program compiled by ExecuTorch without risking this process?  The child: edge dialect, delegates, plan.

Run as `python -m runtime.backends.executorch_compile REQUEST.json`; reports `optimized`, `partitioned` and `lowered`.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from runtime.backends import executorch_records as records
from runtime.backends.build_child import Reporter, run_build


def watch_passes(passes: list[dict[str, Any]]) -> None:
    """Count nodes before and after every graph pass, and its microseconds."""
    from torch.fx.passes.infra.pass_base import PassBase

    run = PassBase.__call__

    def observed(self: Any, module: Any) -> Any:
        before, start = len(module.graph.nodes), time.perf_counter_ns()
        result = run(self, module)
        spent = (time.perf_counter_ns() - start) // 1000
        after = len(result.graph_module.graph.nodes) if result is not None else before
        passes.append({"name": type(self).__name__, "before": before, "after": after, "us": spent})
        return result

    PassBase.__call__ = observed  # type: ignore[method-assign]


def to_edge(programs: dict[str, Any], request: dict[str, Any], reporter: Reporter, passes: list[dict[str, Any]]) -> Any:
    """Lower to the edge dialect and hand subgraphs to the delegate; reports between the two."""
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower

    partition = EdgeProgramManager.to_backend

    def announce(manager: Any) -> None:
        reporter.send("optimized", passes=passes.copy(), methods=describe(manager, programs, request["symbols"]))

    def observed(self: Any, partitioner: Any) -> Any:
        announce(self)
        passes.clear()
        return partition(self, partitioner)

    EdgeProgramManager.to_backend = observed
    # The validity check evaluates real values, and by that adds guards that make dynamic dimensions static.
    manager = to_edge_transform_and_lower(
        programs,
        partitioner={name: partitioners(request["delegate"]) for name in programs},
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    if request["delegate"] == "none":
        announce(manager)
        passes.clear()
    return manager


def partitioners(delegate: str) -> list[Any]:
    """Give the partitioners of a delegate: none leaves every node to the portable kernels.

    XNNPACK's partitioner takes `unsqueeze` whatever its shape, but its compiler fails where two dimensions are dynamic,
    so that operator falls back.
    """
    if delegate == "none":
        return []
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner([one for one in ALL_PARTITIONER_CONFIGS if "unsqueeze" not in one.target_name])]


def describe(manager: Any, programs: dict[str, Any], symbols: dict[str, str]) -> dict[str, Any]:
    """Describe every method of an edge program: nodes, operators, ranges of the named symbols."""
    found: dict[str, Any] = {}
    for name in sorted(programs):
        exported = manager.exported_program(name)
        nodes = list(exported.graph.nodes)
        text = "\n".join(f"{node.op} {node.target} {node.args}" for node in nodes)
        found[name] = {
            "nodes": len(nodes),
            "operators": records.operators(nodes),
            "ranges": records.ranges(programs[name], exported, symbols),
            "graph": "sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        }
    return found


def memory_plan(algorithm: str) -> Any:
    """Plan the arena; inputs stay outside, else every call would copy the pools into it."""
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite, greedy, naive
    from executorch.exir.passes import MemoryPlanningPass

    chosen = {"greedy": greedy, "naive": naive}[algorithm]
    return MemoryPlanningPass(MemoryPlanningAlgorithmSuite([chosen]), alloc_graph_input=False)


def build(request: dict[str, Any], reporter: Reporter) -> None:
    """Compile the methods of the request into one file."""
    import torch
    from executorch.exir import ExecutorchBackendConfig

    from runtime.backends.narrowing import limit, load_program

    torch.set_num_threads(request["threads"])
    programs = {entry["name"]: limit(load_program(request["program"]), entry["limits"]) for entry in request["methods"]}
    passes: list[dict[str, Any]] = []
    watch_passes(passes)
    start = time.perf_counter_ns()
    manager = to_edge(programs, request, reporter, passes)
    methods = describe(manager, programs, request["symbols"])
    for name in methods:
        methods[name] |= records.partition(programs[name], manager.exported_program(name), request)
    reporter.send("partitioned", methods=methods, us=(time.perf_counter_ns() - start) // 1000)
    start = time.perf_counter_ns()
    plan = memory_plan(request["memory_plan"])
    program = manager.to_executorch(ExecutorchBackendConfig(memory_planning_pass=plan))
    data = bytes(program.buffer)
    Path(request["output"]).write_bytes(data)
    reporter.send(
        "lowered",
        plans=records.plans(program.executorch_program),
        us=(time.perf_counter_ns() - start) // 1000,
    )


if __name__ == "__main__":
    raise SystemExit(run_build(sys.argv[1:], build))

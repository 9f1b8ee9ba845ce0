"""What does ExecuTorch say of its own work?  Delegated nodes, crossings between partitions, plans and their arenas."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from runtime.backends.lowering import unknown

FALLBACK = "portable"
"""The owner of every node that no delegate took: ExecuTorch's own kernels."""


def operators(nodes: Iterable[Any]) -> dict[str, int]:
    """Count operators by name."""
    return dict(sorted(Counter(_name(node.target) for node in nodes if node.op == "call_function").items()))


def ranges(original: Any, lowered: Any, symbols: Mapping[str, str]) -> dict[str, list[int]]:
    """Read the range of each named symbol from a lowered program, by the input dimensions that it stands for.

    A symbol that became a number is given as that number alone.  Lower ends of 2 are ExecuTorch's way to write 1: it
    runs size 1 all the same.
    """
    found: dict[str, list[int]] = {}
    for name, now in _places(original, lowered, symbols):
        interval = None if isinstance(now, int) else lowered.range_constraints.get(now.node.expr)
        if isinstance(now, int):
            found[name] = [now, now]
        elif interval is not None:
            found[name] = [1 if int(interval.lower) <= 2 else int(interval.lower), int(interval.upper)]
    return found


def partition(original: Any, lowered: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Say who owns which nodes, and which values cross from one owner to another with their bytes at nominal sizes."""
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(lowered.graph_module)
    taken = info.delegation_by_operator.values()
    sizes = {
        symbol: request["nominal"].get(name, 1)
        for name, now in _places(original, lowered, request["symbols"])
        if not isinstance(now, int)
        for symbol in now.node.expr.free_symbols
    }
    return {
        "subgraphs": info.num_delegated_subgraphs,
        "delegated": info.num_delegated_nodes,
        "not_delegated": info.num_non_delegated_nodes,
        "delegated_operators": {entry.op_type: entry.delegated for entry in taken if entry.delegated},
        "fallback_operators": {entry.op_type: entry.non_delegated for entry in taken if entry.non_delegated},
        "edges": crossings(lowered, sizes),
    }


def crossings(exported: Any, sizes: Mapping[Any, int]) -> list[dict[str, Any]]:
    """List the tensors that pass between a delegate's subgraph and the kernels around it; bytes at `sizes`."""
    owners: dict[Any, str] = {}
    graph = exported.graph
    for node in graph.nodes:
        if node.op == "call_function" and _name(node.target) == "executorch_call_delegate":
            owners[node] = _name(node.args[0].target)
        elif node.op == "call_function":
            source = node.args[0] if _name(node.target) == "getitem" else None
            owners[node] = owners.get(source, FALLBACK)
    edges: list[dict[str, Any]] = []
    for node, owner in owners.items():
        for source in node.all_input_nodes:
            if source in owners and owners[source] != owner and _is_tensor(source):
                edges.append(
                    {
                        "value": source.name,
                        "from": owners[source],
                        "to": owner,
                        "bytes": _bytes(source.meta["val"], sizes),
                    }
                )
    return edges


def plans(program: Any) -> dict[str, Any]:
    """Describe each method's execution plan: what the runtime will load and run."""
    return {
        plan.name: {
            "arena_bytes": sum(plan.non_const_buffer_sizes),
            "instructions": sum(len(chain.instructions) for chain in plan.chains),
            "operators": sorted(f"{operator.name}.{operator.overload}".rstrip(".") for operator in plan.operators),
            "delegates": dict(sorted(Counter(delegate.id for delegate in plan.delegates).items())),
        }
        for plan in program.execution_plan
    }


def _inputs(exported: Any) -> list[Any]:
    wanted = set(exported.graph_signature.user_inputs)
    return [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in wanted]


def _places(original: Any, lowered: Any, symbols: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Pair each named dimension of the original's inputs with what stands there after lowering."""
    pairs = zip(_inputs(original), _inputs(lowered), strict=True)
    return [
        (symbols[str(size)], now)
        for before, after in pairs
        for size, now in zip(before.shape, after.shape, strict=True)
        if str(size) in symbols
    ]


def _is_tensor(node: Any) -> bool:
    return hasattr(node.meta.get("val"), "element_size")


def _bytes(value: Any, sizes: Mapping[Any, int]) -> int | dict[str, str]:
    shape: list[int] = []
    for size in value.shape:
        if isinstance(size, int):
            shape.append(size)
            continue
        known = size.node.expr.subs(dict(sizes))
        if not known.is_number:
            return unknown(f"the size {size} depends on values")
        shape.append(int(known))
    return math.prod(shape) * int(value.element_size())


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    name = getattr(target, "name", None)
    return str(name() if callable(name) else name or getattr(target, "__name__", target))

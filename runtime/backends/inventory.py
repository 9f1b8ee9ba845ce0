"""Which nodes can a backend not run?  The inventory of stage 1, asked of each toolchain's own tables."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.export import ExportedProgram


def without_kernel(exported: ExportedProgram) -> list[str]:
    """Name the operators that have neither a CPU kernel nor a decomposition in this build of torch."""
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
    operators = {node.target for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}  # pyright: ignore[reportPrivateUsage]
    return sorted(operator.name() for operator in operators if not has_kernel(operator.name(), "CPU"))


def without_schema(operators: Iterable[tuple[str, str]], *, functions: Iterable[tuple[str, str]] = ()) -> list[str]:
    """Name the ONNX operators, given as (domain, type), that neither ONNX nor the model's own functions define."""
    import onnx

    local = set(functions)
    missing = {
        f"{domain or 'ai.onnx'}:{kind}"
        for domain, kind in operators
        if (domain, kind) not in local and not onnx.defs.has(kind, domain=domain)
    }
    return sorted(missing)

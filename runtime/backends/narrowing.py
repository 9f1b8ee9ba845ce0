"""How does a saved program with dynamic dimensions become programs for chosen sizes?  Exported again, same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from runtime.backends.errors import BuildFailed


def load_program(path: str) -> ExportedProgram:
    """Load what `torch.export.save` wrote, so that it can be decomposed and exported again.

    A loaded program's shape environment holds ranges for derived dimensions (`2*s10`) beside those for symbols, and
    torch's own decomposition trips over them ("expected sympy.Symbol"), so they are dropped; they follow from the rest.
    """
    exported = torch.export.load(path)
    for value in _user_inputs(exported):
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                ranges = size.node.shape_env.var_to_range
                for derived in [symbol for symbol in ranges if not symbol.is_Symbol]:
                    del ranges[derived]
    return exported


def narrow(exported: ExportedProgram, sizes: Mapping[str, int]) -> ExportedProgram:
    """Fix the symbols named in `sizes`; every other dimension stays dynamic within its range.

    sizes: by the exporter's own symbol text, such as `s22`.  The weights of the new program are the same tensors, so a
    compiler that shares constants stores them once for all sizes.  Raises BuildFailed where a remaining dimension is
    not a multiple of one symbol, or where the program cannot be exported again.
    """
    if not sizes:
        return exported
    inputs: list[torch.Tensor] = []
    shapes: list[dict[int, Any] | None] = []
    dims = _dims(exported, sizes)
    for value in _user_inputs(exported):
        dynamic: dict[int, Any] = {}
        shape: list[int] = []
        for axis, size in enumerate(value.shape):
            fixed, dim = _dimension(size, sizes, dims)
            shape.append(fixed)
            if dim is not None:
                dynamic[axis] = dim
        inputs.append(torch.zeros(shape, dtype=value.dtype))
        shapes.append(dynamic)
    try:
        with torch.no_grad():
            return torch.export.export(exported.module(), tuple(inputs), dynamic_shapes=tuple(shapes))
    except Exception as error:  # torch.export has no common error class
        raise _refused(f"at sizes {dict(sizes)}: {str(error).splitlines()[0][:300]}") from error


def limit(exported: ExportedProgram, limits: Mapping[str, int]) -> ExportedProgram:
    """Lower the upper end of the symbols named in `limits`, in place; the program itself does not change.

    A compiler that plans memory for the largest sizes then plans less.  Fixing a symbol instead would export the
    program anew, and a dimension of 1 brings guards of its own over the strides of its neighbours.
    """
    for value in _user_inputs(exported):
        for size in value.shape:
            if isinstance(size, torch.SymInt) and str(size.node.expr) in limits:
                symbol, most = size.node.expr, limits[str(size.node.expr)]
                lowered = ValueRanges(1, most)
                size.node.shape_env.var_to_range[symbol] = lowered
                exported.range_constraints[symbol] = lowered
    return exported


def _user_inputs(exported: ExportedProgram) -> list[torch.Tensor]:
    wanted = set(exported.graph_signature.user_inputs)
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in wanted]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _dims(exported: ExportedProgram, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Declare a dimension again for every plain symbol that stays dynamic."""
    found: dict[str, Any] = {}
    for symbol, interval in exported.range_constraints.items():
        name = str(symbol)
        if symbol.is_Symbol and name not in sizes:  # pyright: ignore[reportAttributeAccessIssue]
            found[name] = Dim(name, min=max(1, int(interval.lower)), max=int(interval.upper))
    return found


def _dimension(size: Any, sizes: Mapping[str, int], dims: Mapping[str, Any]) -> tuple[int, Any]:
    """Give the example size of one dimension, and its declaration where it stays dynamic."""
    if isinstance(size, int):
        return size, None
    expression = size.node.expr
    free = [symbol for symbol in expression.free_symbols if str(symbol) not in sizes]
    fixed = expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols if symbol not in free})
    if not free:
        return int(fixed), None
    factor = fixed / free[0] if len(free) == 1 else None
    if factor is None or not factor.is_Integer or str(free[0]) not in dims:
        raise _refused(f"dimension {expression} is not a multiple of one symbol")
    dim = dims[str(free[0])]
    return int(size.node.hint), dim if int(factor) == 1 else int(factor) * dim


def _refused(reason: str) -> BuildFailed:
    return BuildFailed(
        f"the program cannot be narrowed: {reason}",
        fix="keep the dimensions dynamic, or choose another backend",
        evidence={"operator_details": reason},
    )

"""How does an exported program become portable StableHLO with symbolic sizes?  Through the bridge and `jax.export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import torch
from torch.export import ExportedProgram

from runtime.backends.errors import BuildFailed, InputRefused
from runtime.backends.jax_bridge import JaxProgram, held_tensors, to_jax
from runtime.backends.xla_program import Argument, PortableProgram, shape_of

DOUBLE = "f64"


def export_portable(
    exported: ExportedProgram,
    names: Mapping[str, str],
    *,
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> PortableProgram:
    """Take a program through the bridge to StableHLO with symbolic sizes.

    names: the exporter's symbols by the names that they get.
    ranges: inclusive range of each name, where the program's own may have no end.
    Raises BuildFailed of stage 1 for unsupported operators and uses of them, sizes that are no multiple of a symbol,
    and whatever JAX itself refuses.
    """
    program = to_jax(exported)
    arguments = _arguments(exported, program, names)
    symbols = dict(ranges) if ranges is not None else _ranges(exported, names)
    limits = [
        f"{name} {sign} {bound}" for name, (low, high) in symbols.items() for sign, bound in ((">=", low), ("<=", high))
    ]
    scope = jax.export.SymbolicScope(limits)
    tensors = held_tensors(exported)
    stored = tuple(program.sources[name] for name in program.held)
    shapes = held_shapes(tensors, stored)
    for entry in arguments:
        sizes = jax.export.symbolic_shape(", ".join(entry.text()), scope=scope) if entry.sizes else ()
        shapes.append(shape_of(tuple(sizes), entry.dtype))
    try:
        made = jax.export.export(jax.jit(program.call, keep_unused=True), platforms=["cpu"])(*shapes)
        blob = bytes(made.serialize())
    except BuildFailed:
        raise  # an operator was named
    except Exception as error:  # JAX raises ValueError, TypeError and classes of its own
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BuildFailed(
            f"JAX refused the program: {text[:300]}",
            fix="the message names the shape or the operator; use another backend for this model",
            evidence={"operator_details": text[:1000], "exception": type(error).__name__},
            stage="a01",
        ) from error
    return PortableProgram(blob=blob, held=stored, inputs=arguments, symbols=symbols)


def held_shapes(tensors: Mapping[str, torch.Tensor], stored: Sequence[str]) -> list[Any]:
    """Describe the stored tensors in the order of the arguments."""
    return [shape_of(tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")) for name in stored]


def check_types(types: Mapping[str, int], exported: ExportedProgram, *, stage: str) -> None:
    """Refuse a module that computes in float64 where the program does not: one NumPy scalar promotes a whole graph."""
    values = [node.meta.get("val") for node in exported.graph.nodes]
    wanted = any(isinstance(value, torch.Tensor) and value.dtype is torch.float64 for value in values)
    if DOUBLE in types and not wanted:
        raise InputRefused(
            f"{types[DOUBLE]} results of the StableHLO module are float64, the program has none: "
            "a constant promoted the graph silently",
            fix="look for a NumPy scalar or an untyped constant in the operator table",
            evidence={"input_signature": str(dict(types)), "guard": "no f64", "compile_event": "StableHLO export"},
            stage=stage,
        )


def _arguments(exported: ExportedProgram, program: JaxProgram, names: Mapping[str, str]) -> tuple[Argument, ...]:
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    found: list[Argument] = []
    for name in program.inputs:
        value = values[name]
        sizes = tuple(_size(size, names, name) for size in value.shape)
        found.append(Argument(name, str(value.dtype).removeprefix("torch."), sizes))
    return tuple(found)


def _size(size: Any, names: Mapping[str, str], where: str) -> tuple[int, str | None]:
    if isinstance(size, int):
        return size, None
    expression = size.node.expr
    factor, rest = expression.as_coeff_Mul()
    if not rest.is_Symbol or not factor.is_Integer:
        raise BuildFailed(
            f"the size {expression} of input {where} is no multiple of one symbol",
            fix="declare the dimension as a symbol of its own",
            evidence={"operator_details": f"{where}: {expression}"},
            stage="a01",
        )
    return int(factor), names.get(str(rest), str(rest))


def _ranges(exported: ExportedProgram, names: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    used: set[str] = set()
    for node in exported.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            sizes: Sequence[Any] = node.meta["val"].shape
            for size in sizes:
                if not isinstance(size, int):
                    used.update(str(symbol) for symbol in size.node.expr.free_symbols)
    return {
        names.get(str(symbol), str(symbol)): (int(interval.lower), int(interval.upper))
        for symbol, interval in sorted(exported.range_constraints.items(), key=lambda entry: str(entry[0]))
        if str(symbol) in used
    }

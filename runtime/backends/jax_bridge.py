"""How does an exported program become a JAX function?  Its training graph, node by node, through the operator table.

The graph before decomposition is taken: its operators are few and keep their meaning (attention, norms), so XLA fuses
what torch's decomposition would have scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from runtime.backends.errors import BuildFailed
from runtime.backends.jax_operators import DROPPED, DTYPES, OPERATORS

HELD = ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")


@dataclass(frozen=True)
class JaxProgram:
    """A pure function over flat arguments: the held tensors in order, then the program's own inputs."""

    call: Callable[..., tuple[Any, ...]]
    held: tuple[str, ...]
    """Names of the leading arguments."""
    sources: Mapping[str, str]
    """Under which name of the program each of them is stored; two that share storage share the name."""
    inputs: tuple[str, ...]
    """Names of the arguments that follow."""


def inventory(exported: ExportedProgram) -> list[str]:
    """Name every operator of the program that the table lacks, all at once."""
    return sorted(
        {
            str(node.target)
            for node in exported.graph.nodes
            if node.op == "call_function" and node.target not in OPERATORS
        }
    )


def check_supported(exported: ExportedProgram) -> None:
    """Refuse a program with operators outside the table, naming all of them and where each stands in the model."""
    missing = inventory(exported)
    if not missing:
        return
    places = {
        str(node.target): _place(node)
        for node in reversed(list(exported.graph.nodes))
        if node.op == "call_function" and str(node.target) in missing
    }
    raise BuildFailed(
        f"the JAX bridge knows no {', '.join(missing)}",
        fix="use the onnxruntime or inductor backend, or add the operators to runtime/backends/jax_operators.py",
        evidence={"operator_details": ", ".join(missing), "validation_output": str(dict(sorted(places.items())))},
        stage="a01",
    )


def held_tensors(exported: ExportedProgram) -> dict[str, torch.Tensor]:
    """Collect parameters, buffers and constants by the names that `JaxProgram.sources` gives; shared storage once."""
    found = _stored(exported)
    sources = _sources(exported)
    return {name: found[name].detach().contiguous() for name in sorted(set(sources.values()))}


def to_jax(exported: ExportedProgram) -> JaxProgram:
    """Turn a program into a JAX function; raises BuildFailed of stage 1 with every unsupported operator.

    The function itself raises BuildFailed for a use that an operator of the table does not take.
    """
    check_supported(exported)
    sources = _sources(exported)
    inputs = tuple(exported.graph_signature.user_inputs)
    names = (*sources, *(str(name) for name in inputs))
    nodes: tuple[Node, ...] = tuple(exported.graph.nodes)

    def call(*arguments: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = dict(zip(names, arguments, strict=True))
        for node in nodes:
            if node.op == "call_function":
                try:
                    values[node.name] = _evaluate(node, values)
                except Exception as error:  # ours, and whatever JAX raises: ValueError, TypeError, classes of its own
                    raise _refused(node, error) from error
            elif node.op == "output":
                outputs: Sequence[Any] = _value(node.args[0], values)
                return tuple(outputs)
        raise ValueError("the program has no output")

    return JaxProgram(call, tuple(sources), sources, tuple(str(name) for name in inputs))


def _refused(node: Node, error: Exception) -> BuildFailed:
    """Say which operator does not take how it is used here, and where it stands in the model."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return BuildFailed(
        f"the JAX bridge cannot take {node.target} in {_place(node)} as it is used: {text[:300]}",
        fix="use the onnxruntime or inductor backend, or change how the model uses it",
        evidence={"operator_details": f"{node.target}: {text[:1000]}", "exception": type(error).__name__},
        stage="a01",
    )


def _evaluate(node: Node, values: Mapping[str, Any]) -> Any:
    keywords = {name: _value(value, values) for name, value in node.kwargs.items() if name not in DROPPED}
    result = OPERATORS[node.target](*[_value(argument, values) for argument in node.args], **keywords)
    expected = node.meta.get("val")
    # torch's promotion rules decide, not JAX's: int64 times a Python float is float32 there and float64 here
    if isinstance(expected, torch.Tensor) and result is not None:
        return jnp.asarray(result).astype(DTYPES[expected.dtype])
    return result


def _value(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, Node):
        return values[argument.name]
    if isinstance(argument, (list, tuple)):
        return [_value(entry, values) for entry in argument]
    return argument


def _stored(exported: ExportedProgram) -> dict[str, torch.Tensor]:
    constants = {name: value for name, value in exported.constants.items() if isinstance(value, torch.Tensor)}
    return {**exported.state_dict, **constants}


def _sources(exported: ExportedProgram) -> dict[str, str]:
    found = _stored(exported)
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    sources: dict[str, str] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind.name in HELD and spec.target is not None:
            tensor = found[spec.target]
            identity = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
            sources[spec.arg.name] = first.setdefault(identity, str(spec.target))
    return sources


def _place(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    modules = [str(path) for path, _ in stack.values() if path]
    return modules[-1] if modules else "the model"

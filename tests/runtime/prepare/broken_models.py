"""Models and graphs with one planted defect each, for toolchains to find."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import onnx
import torch

from runtime.models.decoder import Decoder

X = Any


class Branches(Decoder):
    """Chooses a path by a value."""

    def forward(
        self, token_ids: Any, positions: Any, k_pool: Any, v_pool: Any, slots: Any, context_lengths: Any
    ) -> Any:
        """Look at a number, then decide."""
        logits, *cache = super().forward(token_ids, positions, k_pool, v_pool, slots, context_lengths)
        return (logits * 2 if logits.sum() > 0 else logits), *cache


class Counts(Decoder):
    """Keeps a counter of its calls."""

    calls = 0

    def forward(
        self, token_ids: Any, positions: Any, k_pool: Any, v_pool: Any, slots: Any, context_lengths: Any
    ) -> Any:
        """Count, which no output shows."""
        self.calls += 1
        return super().forward(token_ids, positions, k_pool, v_pool, slots, context_lengths)


class Remembers(Decoder):
    """Keeps a list of its own that grows with every call."""

    def forward(
        self, token_ids: Any, positions: Any, k_pool: Any, v_pool: Any, slots: Any, context_lengths: Any
    ) -> Any:
        """Keep a sum, which no output shows."""
        logits, *cache = super().forward(token_ids, positions, k_pool, v_pool, slots, context_lengths)
        with torch.no_grad():
            self.__dict__.setdefault("seen", []).append(float(0))
        return logits, *cache


class Draws(Decoder):
    """Draws from Python's generator, which export freezes into a constant."""

    def forward(
        self, token_ids: Any, positions: Any, k_pool: Any, v_pool: Any, slots: Any, context_lengths: Any
    ) -> Any:
        """Scale by luck."""
        logits, *cache = super().forward(token_ids, positions, k_pool, v_pool, slots, context_lengths)
        return logits * (1 + random.random()), *cache


class Eigenvalues(Decoder):
    """Uses an operator that ONNX lacks."""

    def forward(
        self, token_ids: Any, positions: Any, k_pool: Any, v_pool: Any, slots: Any, context_lengths: Any
    ) -> Any:
        """Add nothing, by way of eigenvalues."""
        logits, *cache = super().forward(token_ids, positions, k_pool, v_pool, slots, context_lengths)
        square = k_pool[:4, :4].float()
        return logits + 0 * torch.linalg.eigvals(square).real.sum(), *cache


class Drifts(Decoder):
    """Answers a thousandth too much."""

    def forward(
        self, token_ids: Any, positions: Any, k_pool: Any, v_pool: Any, slots: Any, context_lengths: Any
    ) -> Any:
        """Scale."""
        logits, *cache = super().forward(token_ids, positions, k_pool, v_pool, slots, context_lengths)
        return logits * 1.001, *cache


def rebuilt_as(kind: type[Decoder], build: Callable[..., Decoder]) -> Callable[..., Decoder]:
    """Make decoders of another class, with the weights of the true one."""

    def made(*arguments: Any, **options: Any) -> Decoder:
        decoder = build(*arguments, **options)
        decoder.__class__ = kind
        return decoder

    return made


def with_foreign_node(exported: Any) -> None:
    """Put a plain Python function into an exported graph."""

    def plain(value: Any) -> Any:
        return value

    graph = exported.graph
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        node = graph.call_function(plain, (output.args[0][0],))
        node.meta["val"] = output.args[0][0].meta["val"]
    output.args = ((node, *output.args[0][1:]),)


def onnx_with(change: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Damage a real ONNX graph in one way."""
    graph = model.graph
    match change:
        case "unresolved reference":
            graph.node[5].input[0] = "nowhere"
        case "duplicate output":
            graph.node[6].output[0] = graph.node[5].output[0]
        case "cycle":
            graph.node[5].input[0] = graph.node[-1].output[0]
        case "unknown operator":
            graph.node[5].op_type = "Frobnicate"
        case "opset 99":
            next(entry for entry in model.opset_import if not entry.domain).version = 99
        case "IR version 99":
            model.ir_version = 99
        case "element type":
            next(entry for entry in graph.input if entry.name == "positions").type.tensor_type.elem_type = 6
        case "specialized batch":
            for value in graph.input:
                for dimension in value.type.tensor_type.shape.dim:
                    if dimension.dim_param == "B":
                        dimension.dim_value = 3
        case "lost bounds":
            kept = [entry for entry in model.metadata_props if "range.S" not in entry.key]
            del model.metadata_props[:]
            model.metadata_props.extend(kept)
        case _:
            raise ValueError(change)
    return model

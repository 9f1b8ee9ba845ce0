"""In which layout are matrix products computed?  In ONNX Runtime's blocks of channels, where the machine has them.

A product of activations [B,T,K] with constant weights [K,N] is a 1x1 convolution over B*T places.  ONNX Runtime's
convolutions work on blocks of 16 channels (its NCHWc layout, domain com.microsoft.nchwc); where the weights come from
memory and the rows are few, as in decoding, they take a fifth less time than its matrix product, and about as long
where the rows are many (`tests/bench/test_products.py`).  What follows element by element is computed in blocks too,
until an operator needs whole rows.

A value has up to three forms: `rows` [B,T,C]; `image` [1,B,T,C], the same memory; `blocks`, the content of [1,C,B,T].
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from runtime.backends.errors import BackendRefused
from runtime.probe import processor_flags

PRODUCTS = "products"
"""The flag that says whether large products run in blocks: `blocked` or `plain`."""
BLOCK = 16
"""Channels of a block on a processor with AVX-512; without it they are fewer, or there are none."""
REQUIRED_ISA = ("avx512f",)
"""What the processor must have for a package that holds such blocks."""
SMALLEST = 1 << 17
"""Fewest elements of weights that are worth it: with fewer, changing layouts costs more than blocks gain."""
DOMAIN = "com.microsoft.nchwc"
ELEMENTWISE = frozenset({"Add", "Mul", "QuickGelu", "Sigmoid"})
Form = Literal["rows", "image", "blocks"]


def has_blocks() -> bool:
    """Say whether ONNX Runtime's blocks are of that size on this machine."""
    return processor_flags().issuperset(REQUIRED_ISA)


def products_of(flags: Mapping[str, str], *, resident: bool) -> str:
    """Read a preparation's flag; blocks are the default of the resident form where the machine has them.

    Raises BackendRefused where blocks are asked for that the machine does not have.
    """
    able = has_blocks()
    chosen = flags.get(PRODUCTS, "blocked" if able and resident else "plain")
    if chosen == "blocked" and not able:
        raise BackendRefused(
            "matrix products in blocks need a processor with AVX-512, which this one lacks",
            fix="prepare with the flag products=plain",
            evidence={"operator_details": f"{PRODUCTS}=blocked needs {', '.join(REQUIRED_ISA)}"},
        )
    return chosen


def block_products(model: onnx.ModelProto) -> int:
    """Rewrite in place the products of [B,T,K] with constant weights that gain by it; count them.

    What leaves the graph is left alone: it would be copied once more to be rows again.
    """
    rewriting = _Rewriting(model.graph)
    for node in model.graph.node:
        rewriting.take(node)
    for value in model.graph.output:
        rewriting.give(value.name, "rows")
    if rewriting.count:
        rewriting.finish()
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return rewriting.count


class _Rewriting:
    """The nodes so far, and under which names each value is to be had: first in the form that it is computed in."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.count = 0
        self._graph = graph
        self._nodes: list[onnx.NodeProto] = []
        self._forms: dict[str, dict[Form, str]] = {}
        self._channels: dict[str, int] = {}
        self._constants = {one.name: one for one in graph.initializer}
        self._results = {one.name for one in graph.output}
        self._front = numpy_helper.from_array(np.array([0], dtype=np.int64), "front_dimension")
        self._added = {self._front.name: self._front}

    def take(self, node: onnx.NodeProto) -> None:
        """Add a node that computes in the form which its inputs have."""
        values = [name for name in node.input if name not in self._constants]
        forms = {next(iter(self._forms.get(name, {"rows": name}))) for name in values}
        if node.op_type == "MatMul" and self._fits(node):
            self._product(node)
        elif node.op_type in ELEMENTWISE and forms == {"blocks"} and len(values) == len(node.input):
            self._channels[node.output[0]] = self._channels[values[0]]
            self._copy(node, "blocks")
        else:
            alike = node.op_type in ELEMENTWISE or _is_norm_of_rows(node)
            self._copy(node, "image" if alike and forms & {"image", "blocks"} else "rows")

    def give(self, name: str, form: Form) -> str:
        """Name a value in some form, converting it where that is not to be had yet."""
        if not name or name in self._constants:
            return name
        known = self._forms.setdefault(name, {"rows": name})
        if form not in known and form == "rows":
            known[form] = self._add("Squeeze", [self.give(name, "image"), self._front.name], name)
        elif form not in known and form == "blocks":
            known[form] = self._reorder("ReorderInput", self.give(name, "image"), f"{name}_blocks")
        elif form not in known and "rows" in known:
            known[form] = self._add("Unsqueeze", [known["rows"], self._front.name], f"{name}_image")
        elif form not in known:
            channels = self._channels[name]
            known[form] = self._reorder("ReorderOutput", known["blocks"], f"{name}_image", channels=channels)
        return known[form]

    def finish(self) -> None:
        """Give the graph its nodes and weights."""
        used = {name for node in self._nodes for name in node.input}
        kept = [one for one in [*self._constants.values(), *self._added.values()] if one.name in used]
        for field in (self._graph.node, self._graph.initializer, self._graph.value_info):
            del field[:]
        self._graph.node.extend(self._nodes)
        self._graph.initializer.extend(kept)

    def _fits(self, node: onnx.NodeProto) -> bool:
        weights = self._constants.get(node.input[1])
        if weights is None or len(weights.dims) != 2 or node.output[0] in self._results:
            return False
        return prod(weights.dims) >= SMALLEST and not any(size % BLOCK for size in weights.dims)

    def _product(self, node: onnx.NodeProto) -> None:
        self.count += 1
        weights, result = node.input[1], node.output[0]
        blocked = f"{weights}_blocks"
        if blocked not in self._added:
            self._added[blocked] = numpy_helper.from_array(
                _block_weights(numpy_helper.to_array(self._constants[weights])), blocked
            )
        inputs = [self.give(node.input[0], "blocks"), blocked]
        made = self._add("Conv", inputs, f"{result}_blocks", domain=DOMAIN, kernel_shape=[1, 1])
        self._forms[result] = {"blocks": made}
        self._channels[result] = self._constants[weights].dims[1]

    def _copy(self, node: onnx.NodeProto, form: Form) -> None:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [self.give(name, form) for name in node.input]
        if form != "rows":
            copied.output[0] = f"{node.output[0]}_{form}"
            self._forms[node.output[0]] = {form: copied.output[0]}
        self._nodes.append(copied)

    def _reorder(self, operator: str, value: str, made: str, **attributes: int) -> str:
        return self._add(operator, [value], made, domain=DOMAIN, channels_last=1, **attributes)

    def _add(self, operator: str, inputs: list[str], made: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [made], name=f"{operator}_{made}", **attributes))
        return made


def _is_norm_of_rows(node: onnx.NodeProto) -> bool:
    """Say whether a node norms along the last dimension, however many stand before it."""
    return node.op_type == "RMSNormalization" and all(one.i == -1 for one in node.attribute if one.name == "axis")


def _block_weights(weights: NDArray[Any]) -> NDArray[Any]:
    """Lay weights [K,N] out as a filter [N,K,1,1] in blocks of both: N/16, K/16, then 16 of K by 16 of N."""
    rows, columns = weights.shape
    blocks = weights.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(blocks).reshape(columns, rows, 1, 1)

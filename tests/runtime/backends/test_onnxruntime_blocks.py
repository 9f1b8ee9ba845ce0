"""Products in blocks give what plain products give, whatever surrounds them, and each row the bits of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime.backends import onnxruntime_blocks as blocks

KIND = TensorProto.FLOAT
WIDTHS = (16, 32, 48)
needs_blocks = pytest.mark.skipif(not blocks.has_blocks(), reason="this processor has no blocks of 16 channels")


class Chain:
    """A graph over x [B,T,16] that is written operator by operator."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = np.random.default_rng(seed)
        self.widths = {"x": 16}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        array = self.draw.standard_normal(shape) / shape[0] ** 0.5
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def add(self, operator: str, *inputs: str, width: int, domain: str = "", **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, domain=domain, **attributes))
        self.widths[name] = width
        return name

    def product(self, value: str, width: int) -> str:
        return self.add("MatMul", value, self.constant(self.widths[value], width), width=width)

    def model(self, *results: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", KIND, ["B", "T", 16])
        made = [helper.make_tensor_value_info(name, KIND, ["B", "T", self.widths[name]]) for name in results]
        graph = helper.make_graph(self.nodes, "chain", [x], made, self.weights)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALLEST", 1)


def run(model: onnx.ModelProto, x: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def draw_chain(data: st.DataObject) -> Chain:
    """Write a few operators over any earlier values, products often."""
    chain = Chain(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 9))):
        value = data.draw(st.sampled_from(sorted(chain.widths)))
        width = chain.widths[value]
        kind = data.draw(
            st.sampled_from(
                ["product", "product", "pair", "gelu", "sigmoid", "norm", "by token", "bias", "transposed", "tanh"]
            )
        )
        if kind == "product":
            chain.product(value, data.draw(st.sampled_from(WIDTHS)))
        elif kind == "pair":
            other = data.draw(st.sampled_from(sorted(name for name, size in chain.widths.items() if size == width)))
            chain.add(data.draw(st.sampled_from(["Add", "Mul"])), value, other, width=width)
        elif kind == "gelu":
            chain.add("QuickGelu", value, width=width, domain="com.microsoft", alpha=1.0)
        elif kind == "sigmoid":
            chain.add("Sigmoid", value, width=width)
        elif kind == "by token":  # along two dimensions, counted from the front
            chain.add("RMSNormalization", value, chain.constant(width), width=width, axis=1)
        elif kind == "norm":
            chain.add("RMSNormalization", value, chain.constant(width), width=width, axis=-1)
        elif kind == "bias":
            chain.add("Add", value, chain.constant(width), width=width)
        elif kind == "transposed":  # an operator that wants rows, twice
            turned = chain.add("Transpose", value, width=width, perm=[1, 0, 2])
            chain.add("Transpose", turned, width=width, perm=[1, 0, 2])
            del chain.widths[turned]
        else:
            chain.add("Tanh", value, width=width)
    return chain


@needs_blocks
@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 7), tokens=st.integers(1, 5))
def test_any_graph_answers_as_before(data: st.DataObject, batch: int, tokens: int) -> None:
    chain = draw_chain(data)
    results = [name for name in chain.widths if name != "x"][-2:]
    model = chain.model(*results)
    x = chain.draw.standard_normal((batch, tokens, 16)).astype(np.float32)
    wanted = run(model, x)
    inner = sum(node.op_type == "MatMul" and node.output[0] not in results for node in model.graph.node)
    assert blocks.block_products(model) == inner
    for found, before in zip(run(model, x), wanted, strict=True):
        np.testing.assert_allclose(found, before, rtol=2e-4, atol=2e-4)


@needs_blocks
def test_a_row_has_the_same_bits_among_any_rows_at_any_place() -> None:
    chain = Chain()
    wide = chain.product(chain.product("x", 1040), 688)
    model = chain.model(chain.add("Identity", wide, width=688))
    assert blocks.block_products(model) == 2
    draw = np.random.default_rng(1)
    row = draw.standard_normal(16).astype(np.float32)
    alone = run(model, row[None, None])[0][0, 0]
    for batch, tokens in ((1, 2), (2, 1), (5, 1), (6, 1), (7, 1), (8, 1), (1, 13), (3, 11), (32, 1), (4, 64)):
        x = draw.standard_normal((batch, tokens, 16)).astype(np.float32)
        for place in {(0, 0), (batch - 1, tokens - 1), (batch // 2, tokens // 2)}:
            x[place] = row
            np.testing.assert_array_equal(run(model, x)[0][place], alone)


@pytest.mark.parametrize("sizes", [(16, 24), (24, 16)])
def test_sizes_that_blocks_do_not_divide_are_left_alone(sizes: tuple[int, int]) -> None:
    chain = Chain()
    first = chain.add("MatMul", "x", chain.constant(16, sizes[0]), width=sizes[0])
    second = chain.add("MatMul", first, chain.constant(*sizes), width=sizes[1])
    model = chain.model(chain.add("Tanh", second, width=sizes[1]))
    blocked = blocks.block_products(model)
    assert blocked == (sizes[0] == 16)
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 2 - blocked


def test_small_weights_results_and_products_of_two_values_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALLEST", 16 * 32 + 1)
    chain = Chain()
    small = chain.product("x", 32)
    turned = chain.add("Transpose", small, width=1, perm=[0, 2, 1])
    pairs = chain.add("MatMul", turned, small, width=32)
    model = chain.model(pairs, chain.product("x", 48))
    before = model.SerializeToString(deterministic=True)
    assert blocks.block_products(model) == 0
    assert model.SerializeToString(deterministic=True) == before

"""A graph that lost a dimension, a relation or its bounds is a silent specialization, and fails the stage."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from runtime.backends import onnx_graph
from runtime.backends.contract import Bounds
from runtime.backends.errors import BuildFailed, InputRefused

BOUNDS = Bounds(max_batch=4, max_tokens=8, max_context=16)
EXPECTED = {"token_ids": ["B", "T"], "positions": ["B", "T"], "slots": ["B", "S"], "context_lengths": ["B"]}


def graph(*, batch: str | int = "B", metadata: bool = True) -> onnx.ModelProto:
    shapes = {
        "token_ids": ["B", "T"],
        "positions": [batch, "T"],
        "slots": ["B", "S"],
        "context_lengths": ["B"],
    }
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("sum", TensorProto.INT64, ["B", "T"])
    node = helper.make_node("Add", ["token_ids", "positions"], ["sum"], name="add")
    model = helper.make_model(helper.make_graph([node], "step", inputs, [output]))
    if metadata:
        for name, (low, high) in BOUNDS.symbols().items():
            entry = model.metadata_props.add()
            entry.key, entry.value = f"{onnx_graph.RANGE}{name}", f"{low},{high}"
    return model


def test_a_graph_with_all_dimensions_and_bounds_passes() -> None:
    onnx_graph.check_dimensions(graph(), EXPECTED, BOUNDS.symbols(), stage="a03")


@pytest.mark.parametrize("broken", [graph(batch=3), graph(batch="N"), graph(metadata=False)])
def test_a_lost_dimension_relation_or_bound_is_refused(broken: onnx.ModelProto) -> None:
    with pytest.raises(InputRefused, match="specialized") as caught:
        onnx_graph.check_dimensions(broken, EXPECTED, BOUNDS.symbols(), stage="a04")
    assert caught.value.stage == "a04"


def test_an_invalid_graph_is_refused_at_stage_two() -> None:
    model = graph()
    model.graph.node[0].input[1] = "nowhere"
    with pytest.raises(BuildFailed) as caught:
        onnx_graph.check_model(model)
    assert caught.value.stage == "a02"


def test_tensors_between_owners_are_crossings() -> None:
    model = graph()
    model.graph.node.append(helper.make_node("Neg", ["sum"], ["negated"], name="neg"))
    assert onnx_graph.crossing_edges(model, {"add": "one", "neg": "two"}) == [
        {"tensor": "sum", "from": "one", "to": "two"}
    ]
    assert onnx_graph.crossing_edges(model, {"add": "one", "neg": "one"}) == []


def test_crossing_tensors_are_sized_at_stated_sizes_or_unknown_with_a_reason() -> None:
    from runtime.backends.onnx_transfers import STATED, copy_estimate, sized_edges

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"], name="add"),
        helper.make_node("Neg", ["y"], ["z"], name="neg"),
        helper.make_node("Strange", ["z"], ["w"], name="strange", domain="nowhere"),
        helper.make_node("Neg", ["w"], ["v"], name="last"),
    ]
    x = helper.make_tensor_value_info("x", kind, ["B", "2*T + 1", 16])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [helper.make_tensor_value_info("v", kind, None)]))
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    owners = {"add": "one", "neg": "two", "strange": "two", "last": "one"}
    (known, lost) = sized_edges(model, onnx_graph.crossing_edges(model, owners))
    assert known["bytes"] == 4 * STATED["B"] * (2 * STATED["T"] + 1) * 16
    assert "no shape" in lost["bytes"]["unknown"]
    assert copy_estimate([known]) == {"bytes": known["bytes"], "at": STATED}
    assert "1 of 2" in copy_estimate([known, lost])["unknown"]  # type: ignore[index]
    assert copy_estimate([]) == 0

"""int8 on ONNX Runtime: what was rewritten is recorded, the difference is within what is stated, rows stay alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from manifests.scheduling import SchedulingManifest
from runtime.backends.errors import BuildFailed
from runtime.backends.onnxruntime_quantization import DESCRIPTION, quantize
from runtime.engine.playback import PlanPlayer
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.store import PackageStore
from tests.runtime.engine.recorded import record, requests_with_shared_prefixes
from tests.runtime.engine.test_playback import RandomStandIns
from tests.runtime.engine.toy import ToyModel

Prepared = Callable[..., PreparedPackage]


def test_the_rewrite_and_its_cost_in_accuracy_are_recorded(prepared: Prepared) -> None:
    package = prepared("onnxruntime", "int8")
    records = {report.stage.value: report.record for report in package.reports}
    optimized = records["a04"]
    assert optimized["pass_list"][0] == {"name": f"quantize {DESCRIPTION}", "changed": True}
    assert optimized["graph_after"]["int8_layers"] == optimized["graph_after"]["operators"]["MatMulNBits"] > 4
    for comparison in (optimized["numerical_validation"], records["a09"]["output_comparison"]):
        assert comparison["within"] and comparison["tolerance"] == "relative_rms 0.1"
        assert 1e-4 < float(comparison["relative_rms"]) < 0.1, "int8 is neither free nor ruinous"
        equal, total = map(int, comparison["argmax_equal"].split("/"))
        assert equal / total > 0.9
    assert package.manifest.artifact.quantization == "int8"
    assert package.manifest.compiler.passes[0] == f"quantize {DESCRIPTION}"
    sizes = {
        precision: prepared("onnxruntime", precision).manifest.files["model.onnx"].size
        for precision in ("float32", "int8")
    }
    assert sizes["int8"] < 0.75 * sizes["float32"]


def test_a_quantized_batch_replays_with_other_rows_in_it(prepared: Prepared, store: PackageStore) -> None:
    """Random stand-ins in the place of every other request: equal bits, as in the float packages."""
    loaded = load_package(store, prepared("onnxruntime", "int8").digest)
    model = ToyModel(loaded.executor, loaded.tokenizer)
    scheduling = SchedulingManifest(
        max_num_seqs=8, max_num_batched_tokens=64, num_blocks=34, batch_sizes=(1, 2, 4, 8), watermark="0.02"
    )
    recording = record(model, scheduling, requests_with_shared_prefixes(20, seed=3, vocab_size=256, longest_output=12))
    assert max(call.batch for plan in recording.plans for call in plan.calls) > 2
    stand_ins = RandomStandIns(5, vocab_size=256, slots=(scheduling.num_blocks + 1) * scheduling.block_size)
    player = PlanPlayer(
        model.executor, model.tokenizer, scheduling, recording.plans, recording.sequences, stand_ins=stand_ins
    )
    for request, result in zip(recording.requests, recording.results, strict=True):
        assert player.replay(request, "faithful", result).document() == result.document()


def linear_model(folder: Path) -> Path:
    """One linear layer of 64 to 32."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = folder / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def neighbour_reaches_row(model: bytes) -> bool:
    """Change the neighbours of the first row and look whether its bits change."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    louder = np.concatenate([x[:1], x[1:] * 5])
    return not np.array_equal(session.run(None, {"x": x})[0][0], session.run(None, {"x": louder})[0][0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_scale_for_the_whole_batch_would_let_a_neighbour_reach_a_row(tmp_path: Path) -> None:
    """Why `quantize_dynamic` is not what this backend uses: the control of the claim that blocks keep rows alone."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, dynamic = linear_model(tmp_path), tmp_path / "dynamic.onnx"
    quantize_dynamic(source, dynamic, weight_type=QuantType.QInt8)
    assert neighbour_reaches_row(dynamic.read_bytes())
    assert not neighbour_reaches_row(quantize(onnx.load(source)).model.SerializeToString())
    assert not neighbour_reaches_row(source.read_bytes())


def test_a_graph_without_linear_layers_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = onnx.load(linear_model(tmp_path))
    before = model.SerializeToString(deterministic=True)
    assert quantize(model).layers == 1
    assert model.SerializeToString(deterministic=True) == before
    del model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 32]))
    with pytest.raises(BuildFailed, match="no linear layer") as caught:
        quantize(model)
    assert caught.value.stage == "a04"

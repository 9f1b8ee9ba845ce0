"""No library that a backend brings reports to its maker, nor prepares to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

USE = """
import onnx
from onnx import TensorProto, helper
from runtime.backends.onnxruntime import open_session_of, session_options
kind = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [kind], [out])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
options = session_options(threads=1, settings={})
print(open_session_of(model.SerializeToString(), options, ("CPUExecutionProvider",)).run(None, {"x": [2.0]})[0])
"""


def test_onnx_runtime_keeps_no_events_to_send(tmp_path: Path) -> None:
    """Its official builds for Linux do by default, from their import on; in CI they never would."""
    loud = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    variables = loud | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=variables, check=False)
    assert done.stdout.strip() == "[2.]", done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

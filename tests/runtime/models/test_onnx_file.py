"""An ONNX file is whole, inside its folder and of a known version, or it is refused before a backend sees it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from runtime.models.config import ModelRefused
from runtime.models.onnx_file import read_onnx
from tests.runtime.one_shot_models import save_onnx_classifier


def test_the_digest_covers_graph_and_external_data(tmp_path: Path) -> None:
    path = save_onnx_classifier(tmp_path / "m.onnx", external=True)
    before = read_onnx(path)
    assert set(before.files) == {"m.onnx", "m.data"}
    assert all(tensor.raw_data for tensor in before.whole().graph.initializer)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelRefused, match="changed while"):
        before.whole()
    assert read_onnx(path).digest != before.digest
    (tmp_path / "m.data").write_bytes(data[:-1])
    with pytest.raises(ModelRefused, match="which is shorter"):
        read_onnx(path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelRefused, match="missing"):
        read_onnx(path)


@pytest.mark.parametrize("place", ["../m.data", "/etc/hostname", "a/../../m.data", "link.data", "..\\m.data"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = save_onnx_classifier(folder / "m.onnx", external=True)
    (folder / "m.data").rename(tmp_path / "m.data")
    (folder / "link.data").symlink_to(tmp_path / "m.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = place
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelRefused, match="outside its folder"):
        read_onnx(path)


def changed(path: Path, **fields: int) -> Path:
    model = onnx.load(path)
    model.opset_import[0].version = fields.get("opset", 20)
    model.ir_version = fields.get("ir", 10)
    path.write_bytes(model.SerializeToString())
    return path


def test_unknown_versions_operators_and_damage_are_refused(tmp_path: Path) -> None:
    path = save_onnx_classifier(tmp_path / "m.onnx")
    for fields, said in (({"opset": 99}, "opset 99"), ({"ir": 99}, "IR version 99")):
        with pytest.raises(ModelRefused, match=said) as caught:
            read_onnx(changed(path, **fields))
        assert caught.value.stage == "a01"
    node = helper.make_node("TimeTravel", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("x", "y")]
    graph = helper.make_graph([node], "strange", value[:1], value[1:])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(ModelRefused, match="TimeTravel"):
        read_onnx(path)
    for damage in (b"", b"\xff" * 64, b"not onnx"):
        path.write_bytes(damage)
        with pytest.raises(ModelRefused):
            read_onnx(path)

"""A saved program is read without unpickling; state, randomness and code inside it are refused by name."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from runtime.backends.errors import BackendRefused
from runtime.backends.protocol import BuildOptions
from runtime.backends.saved_program import capture_saved, plain_archive
from runtime.models.config import ModelRefused
from runtime.models.source import ModelKind, identify
from tests.runtime.one_shot_models import VOCABULARY, save_embedder, save_perceptron


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("programs")
    save_embedder(place / "embedder.pt2")
    save_perceptron(place / "classifier.pt2")
    return place


def save(module: nn.Module, path: Path, *inputs: Tensor, **options: object) -> Path:
    torch.export.save(torch.export.export(module, inputs, **options), path)  # type: ignore[arg-type]
    return path


def test_names_ranges_relations_and_index_ranges_are_read_from_the_program(folder: Path) -> None:
    program = capture_saved(folder / "embedder.pt2", BuildOptions())
    contract = program.contract
    ids, mask = contract.inputs
    assert (ids.name, mask.name) == ("token_ids", "mask")
    assert ids.shape == mask.shape, "equal symbols are a relation"
    assert ids.index_range == (0, VOCABULARY - 1)
    assert mask.index_range is None
    assert sorted(contract.symbols.values()) == [(1, 32), (1, 48)]
    assert contract.batch == ids.shape[0]
    outputs = capture_saved(folder / "classifier.pt2", BuildOptions()).output_names
    assert outputs == ("probabilities", "label")


def test_carried_examples_are_dropped_unread_and_equal_programs_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    data = (folder / "embedder.pt2").read_bytes()
    poisoned = rewritten(data, {"data/sample_inputs/model.pt": b"cos\nsystem\n(S'false'\ntR."})
    plain = plain_archive(poisoned, "p.pt2")
    assert plain == plain_archive(data, "p.pt2")
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        assert [archive.read(name) for name in archive.namelist() if "sample_inputs" in name] == [b""]


@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("data/aotinductor/model/step.so", b"\x7fELF", "neither graph nor plain tensor"),
        ("data/constants/custom_obj_0", b"", "neither graph nor plain tensor"),
        ("data/weights/weights.pt", b"", "neither graph nor plain tensor"),
        ("archive_format", b"aoti", "not an archive of one exported program"),
        ("models/second.json", b"{}", "not an archive of one exported program"),
        ("data/constants/model_constants_config.json", b'{"config": {"c": {"use_pickle": true}}}', "pickled object"),
        ("data/constants/model_constants_config.json", b"[]", "unreadable"),
    ],
)
def test_an_archive_that_holds_more_is_refused(folder: Path, member: str, content: bytes, said: str) -> None:
    changed = rewritten((folder / "embedder.pt2").read_bytes(), {member: content})
    with pytest.raises(ModelRefused, match=said):
        plain_archive(changed, "p.pt2")


@pytest.mark.parametrize("damaged", [b"", b"not a zip", b"PK\x03\x04" + bytes(40)])
def test_bytes_that_are_no_archive_are_refused(damaged: bytes) -> None:
    with pytest.raises(ModelRefused, match="not a program archive"):
        plain_archive(damaged, "p.pt2")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_state_randomness_foreign_types_and_another_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    for module, said in ((Counting(), "changes 'count' when"), (Random(), "randomness")):
        with pytest.raises(BackendRefused, match=said):
            capture_saved(save(module, tmp_path / "p.pt2", x), BuildOptions())
    with pytest.raises(BackendRefused, match="bfloat16, which cannot cross"):
        capture_saved(save(Halved(), tmp_path / "p.pt2", x.to(torch.bfloat16)), BuildOptions())
    with pytest.raises(BackendRefused, match="computes in float32"):
        capture_saved(folder / "embedder.pt2", BuildOptions(precision="bfloat16"))


def test_dimensions_without_an_end_take_the_bounds_of_the_package(tmp_path: Path) -> None:
    path = save(Halved(), tmp_path / "p.pt2", torch.ones(2, 3), dynamic_shapes={"x": {0: Dim("b"), 1: Dim("t")}})
    program = capture_saved(path, BuildOptions())
    assert sorted(program.contract.symbols.values()) == [(1, 64), (1, 512)]
    assert list(program.declared.values()) == [[0, None], [0, None]], "what every stage must keep is the program's own"


def test_a_model_is_recognised_by_what_lies_there(folder: Path, tmp_path: Path) -> None:
    found = identify(folder / "embedder.pt2")
    assert (found.kind, found.name) == (ModelKind.PROGRAM, "embedder")
    with pytest.raises(ModelRefused, match="holds 2 models"):
        identify(folder)
    (tmp_path / "weights.bin").write_bytes(b"")
    for place, said in ((tmp_path / "weights.bin", "neither"), (tmp_path / "x.onnx", "no file"), (tmp_path, "config")):
        with pytest.raises(ModelRefused, match=said):
            identify(place)


def test_the_captured_program_computes_what_the_module_computes(folder: Path) -> None:
    from runtime.backends.lowering import saved_model

    program = capture_saved(folder / "classifier.pt2", BuildOptions())
    model = saved_model(program, "classifier")
    case = model.cases()[-1]
    answer = model.expected(case)
    np.testing.assert_allclose(answer["probabilities"].sum(-1), 1.0, rtol=1e-5)
    assert np.array_equal(answer["probabilities"].argmax(-1), answer["label"])


def rewritten(data: bytes, changes: dict[str, bytes]) -> bytes:
    """Replace or add members of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = archive.namelist()[0].partition("/")[0]
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {f"{root}/{name}": content for name, content in changes.items()}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()

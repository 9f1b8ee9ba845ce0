"""One-shot models in XLA: batches padded with rows, other sizes exact, what cannot be compiled ahead refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import replaylab
from runtime.backends.buckets import BucketPlan
from runtime.backends.errors import BackendRefused, BuildFailed, InputRefused
from runtime.backends.one_shot import fixture_inputs
from runtime.backends.protocol import BuildOptions
from runtime.backends.tensor_contract import TensorContract, TensorRule
from runtime.backends.xla_one_shot import XlaOneShot
from runtime.backends.xla_shapes import batch_plan, shape_of_call, shapes_ahead, typical_shapes
from runtime.prepare.load import load_one_shot
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from tests.runtime.one_shot_models import save_embedder, save_perceptron

PLAN = BucketPlan(decode=(2, 6), tokens=(16,), context=(16,))


def contract(low: int, high: int, *, length: int | None = None) -> TensorContract:
    """One input [n, 4], or [n, t]."""
    shape = ("n", "4") if length is None else ("n", "t")
    rule = TensorRule(name="x", dtype="float32", shape=shape)
    symbols = {"n": (low, high)} if length is None else {"n": (low, high), "t": (1, length)}
    return TensorContract(inputs=(rule,), outputs=(rule,), symbols=symbols)


@given(
    low=st.integers(1, 5),
    extra=st.integers(0, 60),
    declared=st.none() | st.lists(st.integers(1, 80), min_size=1, max_size=4),
    data=st.data(),
)
def test_every_call_within_the_contract_has_the_smallest_batch_that_holds_it(
    low: int, extra: int, declared: list[int] | None, data: st.DataObject
) -> None:
    found = contract(low, low + extra, length=9)
    batches = batch_plan(found, declared)
    assert list(batches) == sorted(set(batches)) and low <= batches[0] and batches[-1] == low + extra
    rows, length = data.draw(st.integers(low, low + extra)), data.draw(st.integers(1, 9))
    shape = shape_of_call(found, {"n": rows, "t": length}, batches).values()
    assert shape["t"] == length, "only rows may be added"
    assert shape["n"] == min(batch for batch in batches if batch >= rows)


def test_free_sizes_beside_the_batch_cannot_be_compiled_ahead() -> None:
    free = contract(1, 8, length=9)
    with pytest.raises(BackendRefused, match="t may take many sizes") as caught:
        shapes_ahead(free, batch_plan(free, None))
    assert "specialization=lazy" in (caught.value.fix or "")
    assert [shape.name for shape in typical_shapes(free, (1, 8))] == ["n1_t9", "n8_t9"]
    assert [shape.name for shape in shapes_ahead(contract(1, 8), (1, 8))] == ["n1", "n8"]


@pytest.fixture(scope="module")
def one_shot_store(tmp_path_factory: pytest.TempPathFactory) -> PackageStore:
    return PackageStore(tmp_path_factory.mktemp("one-shot"))


@pytest.fixture(scope="module")
def classifier(one_shot_store: PackageStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreparedPackage]:
    path = tmp_path_factory.mktemp("models") / "classifier.pt2"
    save_perceptron(path)
    return path, prepare(path, backend="xla", store=one_shot_store, options=BuildOptions(buckets=PLAN))


def loaded(store: PackageStore, package: PreparedPackage) -> XlaOneShot:
    executor = load_one_shot(store, package.digest).executor
    assert isinstance(executor, XlaOneShot)
    return executor


def call(executor: XlaOneShot, rows: int, **sizes: int) -> dict[str, np.ndarray[Any, Any]]:
    batch = str(executor.contract.batch)
    return fixture_inputs(executor.contract, dict.fromkeys(executor.contract.symbols, 7) | {batch: rows}, label="rows")


def test_a_padded_call_answers_the_rows_of_its_batch_to_the_bit(
    classifier: tuple[Path, PreparedPackage], one_shot_store: PackageStore
) -> None:
    _, package = classifier
    assert len([name for name in package.manifest.files if name.endswith(".xla")]) == 2
    assert package.manifest.compiler.flags["batches"] == "2,6"
    executor = loaded(one_shot_store, package)
    whole = executor.run(call(executor, 6))
    for rows in (3, 4, 5):
        some = executor.run({name: value[:rows] for name, value in call(executor, 6).items()})
        assert all(np.array_equal(some[name], whole[name][:rows]) for name in whole)
    assert executor.compile_events() == ()
    with pytest.raises(InputRefused):
        executor.run(call(executor, 7))


def test_preparing_again_gives_the_same_package(classifier: tuple[Path, PreparedPackage], tmp_path: Path) -> None:
    path, package = classifier
    again = prepare(path, backend="xla", store=PackageStore(tmp_path), options=BuildOptions(buckets=PLAN))
    assert again.digest == package.digest


@pytest.mark.slow
def test_a_model_of_free_length_compiles_at_first_use_within_its_limit(
    one_shot_store: PackageStore, tmp_path: Path
) -> None:
    path = tmp_path / "embedder.pt2"
    save_embedder(path)
    with pytest.raises(BackendRefused, match="many sizes"):
        options = BuildOptions(buckets=PLAN, flags={"specialization": "ahead"})
        prepare(path, backend="xla", store=one_shot_store, options=options)
    flags = {"max_specializations": "2", "on_limit": "evict"}
    package = prepare(path, backend="xla", store=one_shot_store, options=BuildOptions(buckets=PLAN, flags=flags))
    assert package.manifest.compiler.flags["specialization"] == "lazy"
    executor = loaded(one_shot_store, package)
    batch = str(executor.contract.batch)
    length = next(name for name in executor.contract.symbols if name != batch)
    for size in (5, 6, 7):
        executor.run(fixture_inputs(executor.contract, {batch: 2, length: size}, label="lengths"))
    events = executor.compile_events()
    assert len(events) == 3 and events[2].evicted == events[0].shape


class CubicNorm(torch.nn.Module):
    """Takes a norm that the bridge has no meaning for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(x, ord=3, dim=-1)


def test_a_use_of_an_operator_that_the_bridge_does_not_know_is_named_to_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = "aten.linalg_vector_norm.default"
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(CubicNorm(), (torch.ones(2, 3, 4),)), path)
    with pytest.raises(BuildFailed, match="order 3") as caught:
        prepare(path, backend="xla", store=PackageStore(tmp_path), options=BuildOptions(buckets=PLAN))
    assert (caught.value.stage, caught.value.failure_class.value) == ("a01", "artifact_compatibility")
    assert operator in caught.value.message
    assert caught.value.evidence["operator_details"].startswith(operator)
    assert "onnxruntime" in (caught.value.fix or "")
    assert replaylab.main(["prepare", str(path), "--backend", "xla", "--ledger", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert operator in said and "Traceback" not in said and "NotImplemented" not in said

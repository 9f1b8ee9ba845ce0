"""One-shot models go through the same nine stages, and answer as their reference on every backend that takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import replaylab
from manifests.preparation import STAGE_IDS
from runtime.backends.errors import BackendRefused, InputRefused
from runtime.backends.one_shot import fixture_inputs
from runtime.backends.protocol import BuildOptions, Support
from runtime.backends.registry import BACKENDS
from runtime.prepare.errors import PackageRefused
from runtime.prepare.load import load_one_shot, load_package
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from tests.runtime.one_shot_models import (
    VOCABULARY,
    save_classifier,
    save_embedder,
    save_onnx_classifier,
    save_perceptron,
)
from tests.runtime.prepare.conftest import ListRecorder
from traces.stages import PREPARATION_STAGES

Prepare = Callable[[str, str], PreparedPackage]
CLAIMING = tuple(row.name for row in BACKENDS if row.abilities["one_shot_models"].support is Support.SUPPORTED)
MODELS = ("classifier.pt2", "embedder.pt2", "vectors.onnx")


def takes(backend: str, model: str) -> bool:
    row = next(row for row in BACKENDS if row.name == backend)
    return not model.endswith(".onnx") or row.abilities["onnx_files"].support is Support.SUPPORTED


COMPILED = {
    ("inductor", "classifier.pt2"),
    ("iree", "classifier.pt2"),
    ("executorch", "classifier.pt2"),
    ("xla", "embedder.pt2"),
}
"""Half a minute of compiling each; one model a compiler stays in the default run."""
PAIRS = [
    pytest.param(backend, model, marks=[pytest.mark.slow] if (backend, model) in COMPILED else [])
    for backend in CLAIMING
    for model in MODELS
    if takes(backend, model)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("one-shot")
    save_perceptron(place / "classifier.pt2")
    save_embedder(place / "embedder.pt2")
    save_onnx_classifier(place / "vectors.onnx", external=True)
    save_classifier(place / "images.pt2")
    return place


@pytest.fixture(scope="module")
def one_shot_store(tmp_path_factory: pytest.TempPathFactory) -> PackageStore:
    return PackageStore(tmp_path_factory.mktemp("one-shot-ledger"))


@pytest.fixture(scope="module")
def prepared_one_shot(folder: Path, one_shot_store: PackageStore) -> Prepare:
    made: dict[tuple[str, str], PreparedPackage] = {}

    def get(backend: str, model: str) -> PreparedPackage:
        if (backend, model) not in made:
            made[backend, model] = prepare(
                folder / model, backend=backend, store=one_shot_store, recorder=ListRecorder()
            )
        return made[backend, model]

    return get


@pytest.mark.parametrize(("backend", "model"), PAIRS)
def test_all_nine_stages_are_recorded_and_the_package_answers_as_the_reference(
    prepared_one_shot: Prepare, one_shot_store: PackageStore, folder: Path, backend: str, model: str
) -> None:
    package = prepared_one_shot(backend, model)
    assert tuple(report.stage.value for report in package.reports) == STAGE_IDS
    for report, described in zip(package.reports, PREPARATION_STAGES, strict=True):
        assert set(report.record) == set(described.record)
    guards = package.reports[2].record["guard_count"]
    assert ("unknown" in guards) if model.endswith(".onnx") else isinstance(guards, int)
    compared = package.reports[-1].record["output_comparison"]
    assert compared["within"]
    expected = "onnx.reference" if model.endswith(".onnx") else "eager float32"
    assert compared["reference"].startswith(expected)
    loaded = load_one_shot(one_shot_store, package.digest)
    contract = loaded.contract
    reference = load_one_shot(one_shot_store, prepared_one_shot(PAIRS_OF[model], model).digest)
    for batch in (1, 2, 5, 17):
        sizes = dict.fromkeys(contract.symbols, 9) | {str(contract.batch): batch}
        inputs = fixture_inputs(contract, sizes, label="agreement")
        ours, theirs = loaded.executor.run(inputs), reference.executor.run(inputs)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, atol=2e-5, err_msg=f"{name} at batch {batch}")
        again = loaded.executor.run(inputs)
        assert all(np.array_equal(ours[name], again[name]) for name in ours), "same shapes, same bits"
    loaded.executor.close()
    with pytest.raises(BackendRefused, match="closed"):
        loaded.executor.run(inputs)


PAIRS_OF = {"classifier.pt2": "eager", "embedder.pt2": "eager", "vectors.onnx": "onnxruntime"}
"""Which package of a model the others are compared with."""


@pytest.mark.parametrize("backend", CLAIMING)
def test_broken_inputs_give_the_same_refusal_on_every_backend(
    prepared_one_shot: Prepare, one_shot_store: PackageStore, backend: str
) -> None:
    executor = load_one_shot(one_shot_store, prepared_one_shot(backend, "embedder.pt2").digest).executor
    good = {"token_ids": np.zeros((2, 4), dtype=np.int64), "mask": np.ones((2, 4), dtype=np.int64)}
    executor.run(good)
    broken: list[dict[str, Any]] = [
        {"token_ids": good["token_ids"] + VOCABULARY},
        {"token_ids": good["token_ids"] - 1},
        {"mask": np.ones((2, 5), dtype=np.int64)},
        {"mask": good["mask"].astype(np.int32)},
        {name: np.ones((33, 4), dtype=np.int64) for name in good},
        {name: np.ones((1, 49), dtype=np.int64) for name in good},
    ]
    for change in broken:
        with pytest.raises(InputRefused):
            executor.run({**good, **change})


@pytest.mark.parametrize("backend", [row.name for row in BACKENDS])
def test_a_backend_that_takes_no_onnx_file_or_no_one_shot_model_says_why(
    folder: Path, one_shot_store: PackageStore, backend: str
) -> None:
    row = next(row for row in BACKENDS if row.name == backend)
    for ability, model in (("one_shot_models", "classifier.pt2"), ("onnx_files", "vectors.onnx")):
        cell = row.abilities[ability]
        if cell.support is not Support.SUPPORTED:
            with pytest.raises(BackendRefused) as caught:
                prepare(folder / model, backend=backend, store=one_shot_store)
            assert cell.reason in str(caught.value)


@pytest.mark.parametrize(("backend", "model"), [("eager", "embedder.pt2"), ("onnxruntime", "vectors.onnx")])
def test_preparing_again_gives_the_same_package(
    prepared_one_shot: Prepare, folder: Path, tmp_path: Path, backend: str, model: str
) -> None:
    again = prepare(folder / model, backend=backend, store=PackageStore(tmp_path))
    assert again.digest == prepared_one_shot(backend, model).digest
    assert again.preparation.first_difference(prepared_one_shot(backend, model).preparation) is None


def test_a_convolution_runs_where_its_batch_stays_dynamic(folder: Path, one_shot_store: PackageStore) -> None:
    for backend in ("eager", "onnxruntime", "xla"):
        package = prepare(folder / "images.pt2", backend=backend, store=one_shot_store)
        assert package.reports[-1].record["output_comparison"]["within"]


@pytest.mark.slow
def test_a_compiler_that_narrows_a_dimension_in_silence_fails_its_stage(folder: Path, tmp_path: Path) -> None:
    """Inductor's choice of a convolution kernel asks whether the batch is below 16, and keeps the answer."""
    with pytest.raises(InputRefused, match="specialized") as caught:
        prepare(folder / "images.pt2", backend="inductor", store=PackageStore(tmp_path))
    assert caught.value.stage == "a06"
    assert PackageStore(tmp_path).digests() == ()


def test_each_kind_of_package_is_loaded_as_what_it_is(
    prepared_one_shot: Prepare, one_shot_store: PackageStore, store: PackageStore, prepared: Any
) -> None:
    with pytest.raises(PackageRefused, match="one-shot"):
        load_package(one_shot_store, prepared_one_shot("eager", "classifier.pt2").digest)
    with pytest.raises(PackageRefused, match="decoder"):
        load_one_shot(store, prepared("eager", "float32").digest)


def test_options_that_a_saved_program_cannot_take_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendRefused, match="batch invariance"):
        prepare(
            folder / "classifier.pt2",
            backend="eager",
            store=PackageStore(tmp_path),
            options=BuildOptions(batch_invariant=True),
        )


def test_the_command_takes_any_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--backend", "onnxruntime", "--ledger", str(tmp_path), "--name", "vectors"]
    assert replaylab.main(["prepare", str(folder / "vectors.onnx"), *words]) == 0
    assert "call ms" in capsys.readouterr().out
    assert replaylab.main(["packages", "show", "vectors", "--ledger", str(tmp_path)]) == 0
    assert "a09 warm" in capsys.readouterr().out
    assert replaylab.main(["prepare", str(folder / "vectors.onnx"), "--backend", "eager", *words[2:]]) == 2
    assert "torch reads no ONNX" in capsys.readouterr().err

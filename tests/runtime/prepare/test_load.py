"""Loading and warming refuse what does not fit this machine or does not answer as it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.backends.errors import BackendRefused, ExecutionFailed, ProviderMismatch
from runtime.prepare.errors import PackageRefused, WarmupRefused
from runtime.prepare.load import load_package
from runtime.prepare.manifest import PackageManifest, config_document, read_config_document
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.store import PackageStore, file_entry
from runtime.prepare.warm import validate
from traces.failures import FailureClass

Prepared = Callable[..., PreparedPackage]


def republish(
    store: PackageStore, package: PreparedPackage, work: Path, *, files: dict[str, Path] | None = None, **changes: Any
) -> str:
    """Sign and publish a changed package: right digests, wrong content."""
    folder = store.path(package.digest)
    all_files = {name: folder / name for name in package.manifest.files} | (files or {})
    document = package.manifest.to_document()
    document |= changes
    document["files"] = {name: file_entry(path).to_document() for name, path in all_files.items()}
    return store.publish(all_files, PackageManifest.from_document(document))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "riscv64"}, "architecture"),
        ({"system": "Plan9"}, "system"),
        ({"isa": ["AVX1024"]}, "instruction set AVX1024"),
        ({"libraries": {"torch": "1.0"}}, "made for 1.0"),
        ({"sources": {"decoder_source": "sha256:0"}}, "compiler.flags.decoder_source: made for sha256:0, here sha256:"),
    ],
)
def test_a_package_for_another_machine_is_refused(
    copied_store: PackageStore, prepared: Prepared, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    package = prepared("eager", "float32")
    digest = republish(copied_store, package, tmp_path, envelope={**package.manifest.envelope, **change})
    with pytest.raises(PackageRefused, match=said):
        load_package(copied_store, digest)


def test_an_interpreted_package_is_bound_to_the_decoder_source_and_a_compiled_one_is_not(
    copied_store: PackageStore, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another source than the recorded one is refused by name; packages from before that was recorded still load."""
    package = prepared("eager", "float32")
    envelope = dict(package.manifest.envelope)
    assert envelope["sources"] == {"decoder_source": package.manifest.compiler.flags["decoder_source"]}
    assert "sources" not in prepared("onnxruntime", "float32").manifest.envelope
    del envelope["sources"]
    old = republish(copied_store, package, tmp_path, envelope=envelope)
    monkeypatch.setattr("runtime.backends.decoder_source.MODULES", ("runtime.models.decoder",))
    with pytest.raises(PackageRefused, match="decoder_source") as refused:
        load_package(copied_store, package.digest)
    assert refused.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY
    assert refused.value.fix is not None
    assert "prepare the model again" in refused.value.fix
    load_package(copied_store, old).executor.close()


def test_a_provider_that_is_not_there_is_refused_and_never_replaced(
    copied_store: PackageStore, prepared: Prepared, tmp_path: Path
) -> None:
    package = prepared("onnxruntime", "float32")
    compiler = {**package.manifest.compiler.to_document(), "execution_providers": ["CUDAExecutionProvider"]}
    digest = republish(copied_store, package, tmp_path, compiler=compiler)
    with pytest.raises(ProviderMismatch, match="CUDAExecutionProvider"):
        load_package(copied_store, digest)


def test_weights_that_do_not_fit_the_configuration_are_refused(
    copied_store: PackageStore, prepared: Prepared, tmp_path: Path
) -> None:
    package = prepared("eager", "float32")
    config = {**package.manifest.config, "hidden_size": 32}
    with pytest.raises(BackendRefused):
        load_package(copied_store, republish(copied_store, package, tmp_path, config=config))


@pytest.mark.parametrize(("value", "error"), [(1.01, WarmupRefused), (float("nan"), ExecutionFailed)])
def test_other_weights_of_the_same_shape_fail_the_fixture(
    copied_store: PackageStore, prepared: Prepared, tmp_path: Path, value: float, error: type[Exception]
) -> None:
    package = prepared("eager", "float32")
    weights = load_file(copied_store.path(package.digest) / "weights.safetensors")
    weights["head.weight"] = weights["head.weight"] * value
    changed = tmp_path / "weights.safetensors"
    save_file(weights, changed)
    digest = republish(copied_store, package, tmp_path, files={"weights.safetensors": changed})
    with pytest.raises(error):
        validate(load_package(copied_store, digest), copied_store)


def test_loading_gives_tokenizer_config_and_pins(store: PackageStore, prepared: Prepared) -> None:
    package = prepared("onnxruntime", "float32")
    model = load_package(store, package.digest)
    assert model.artifact.package_digest == package.digest
    assert model.compiler.backend == "onnxruntime"
    assert model.compiler.execution_providers == ("CPUExecutionProvider",)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode("refund").ids) == "refund"
    assert read_config_document(config_document(model.config)) == model.config


def test_loading_leaves_the_environment_as_it_was(
    store: PackageStore, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.delenv("AOTI_RUNTIME_CHECK_INPUTS", raising=False)
    before = dict(os.environ)
    load_package(store, prepared("inductor", "float32").digest)
    assert dict(os.environ) == before


def test_threads_are_a_pin_of_the_load(store: PackageStore, prepared: Prepared) -> None:
    try:
        model = load_package(store, prepared("eager", "float32").digest, threads=2)
        assert model.executor.threads == 2
        validate(model, store)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)

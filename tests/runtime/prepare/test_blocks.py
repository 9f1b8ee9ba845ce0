"""A package whose products run in blocks answers as one of plain products, and says what machine it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.backends import onnxruntime_blocks
from runtime.backends.errors import BackendRefused
from runtime.backends.fixture import run_fixture
from runtime.backends.protocol import BuildOptions
from runtime.models.random_checkpoint import random_checkpoint
from runtime.prepare import load
from runtime.prepare.errors import PackageRefused
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from tests.runtime.prepare.compositions import Sessions
from tests.runtime.prepare.conftest import BOUNDS

Prepare = Callable[..., PreparedPackage]
needs_blocks = pytest.mark.skipif(
    not onnxruntime_blocks.has_blocks(), reason="this processor has no blocks of 16 channels"
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with products that are worth it, biases, and more heads than key heads."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    return random_checkpoint(folder, seed=4, family="qwen2", hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def made(wide: Path, store: PackageStore) -> Prepare:
    found: dict[str, PreparedPackage] = {}

    def get(*, invariant: bool = False, **changes: Any) -> PreparedPackage:
        options = BuildOptions(bounds=BOUNDS, batch_invariant=invariant, **changes)
        key = repr(options)
        if key not in found:
            found[key] = prepare(wide, backend="onnxruntime", store=store, options=options)
        return found[key]

    return get


def changed_by(package: PreparedPackage) -> list[str]:
    passes = package.reports[3].record["pass_list"]
    return [one["name"] for one in passes if one["changed"]]


@needs_blocks
def test_large_products_run_in_blocks_by_default_and_answer_as_plain_ones(made: Prepare, store: PackageStore) -> None:
    blocked, plain = made(), made(flags={"products": "plain"})
    flags = [package.manifest.compiler.flags["products"] for package in (blocked, plain)]
    assert flags == ["blocked", "plain"]
    assert [tuple(package.manifest.envelope["isa"]) for package in (blocked, plain)] == [("avx512f",), ()]
    assert "block products" in changed_by(blocked) and "block products" not in changed_by(plain)
    assert blocked.reports[3].record["graph_after"]["products_in_blocks"] == 6  # gate, up and down of both layers
    found, wanted = (run_fixture(load_package(store, package.digest).executor) for package in (blocked, plain))
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert abs(one - other).max() < 1e-4
        assert (one.argmax(-1) == other.argmax(-1)).all()


@needs_blocks
@pytest.mark.parametrize(
    ("changes", "products"),
    [({"optimization": "disable"}, "blocked"), ({"flags": {"context": "gathered"}}, "plain")],
)
def test_the_level_says_nothing_of_products_and_the_other_form_has_plain_ones(
    made: Prepare, changes: dict[str, Any], products: str
) -> None:
    package = made(**changes)
    assert package.manifest.compiler.flags["products"] == products
    assert ("block products" in changed_by(package)) == (products == "blocked")


@needs_blocks
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_no_composition_reaches_a_rows_bits_in_blocks(sessions: Sessions, seed: int) -> None:
    assert sessions.differing(seed) == []


@pytest.fixture(scope="module")
def sessions(made: Prepare, store: PackageStore) -> Sessions:
    package = made(invariant=True)
    assert "block products" in changed_by(package)
    return Sessions(load_package(store, package.digest).executor)


@needs_blocks
def test_a_processor_without_blocks_prepares_plain_products_and_loads_no_blocked_ones(
    made: Prepare, wide: Path, store: PackageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = made()
    monkeypatch.setattr(onnxruntime_blocks, "has_blocks", lambda: False)
    options = BuildOptions(bounds=BOUNDS)
    plain = prepare(wide, backend="onnxruntime", store=store, options=options)
    assert plain.manifest.compiler.flags["products"] == "plain"
    asked = BuildOptions(bounds=BOUNDS, flags={"products": "blocked"})
    with pytest.raises(BackendRefused, match="AVX-512") as refused:
        prepare(wide, backend="onnxruntime", store=store, options=asked)
    assert "products=plain" in str(refused.value.fix)
    monkeypatch.setattr(load, "processor_flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(PackageRefused, match="this processor lacks avx512f"):
        load_package(store, blocked.digest)
    assert load_package(store, plain.digest)


def test_weights_that_fit_a_cache_need_no_blocks_and_no_processor(
    prepared: Callable[..., PreparedPackage],
) -> None:
    package = prepared("onnxruntime", "float32")
    assert tuple(package.manifest.envelope["isa"]) == ()
    assert "block products" not in changed_by(package)

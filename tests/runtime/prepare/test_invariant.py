"""A batch-invariant package answers a row with the same bits in any company, chunking, padding and recomputation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.scheduling import SchedulingManifest
from runtime.backends.errors import BackendRefused
from runtime.backends.protocol import BuildOptions
from runtime.engine.playback import PlanPlayer
from runtime.prepare.errors import WarmupRefused
from runtime.prepare.invariance import AXES
from runtime.prepare.load import LoadedModel, load_package
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from tests.runtime.engine.recorded import record, requests_with_shared_prefixes
from tests.runtime.engine.toy import ToyModel
from tests.runtime.prepare.compositions import Sessions
from tests.runtime.prepare.conftest import BOUNDS

Loader = Callable[..., LoadedModel]
QUICK = [("eager", "float32"), ("eager", "bfloat16"), ("onnxruntime", "float32")]
ALL = [*QUICK, pytest.param("inductor", "float32", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def packages(model_folder: Path, store: PackageStore) -> Callable[..., PreparedPackage]:
    """Prepare on first use."""
    made: dict[Any, PreparedPackage] = {}

    def get(backend: str, precision: str = "float32", *, invariant: bool = True) -> PreparedPackage:
        key = (backend, precision, invariant)
        if key not in made:
            options = BuildOptions(precision=precision, bounds=BOUNDS, batch_invariant=invariant)
            made[key] = prepare(model_folder, backend=backend, store=store, options=options)
        return made[key]

    return get


@pytest.fixture(scope="module")
def loaded(packages: Callable[..., PreparedPackage], store: PackageStore) -> Loader:
    """Load on first use."""
    made: dict[Any, LoadedModel] = {}

    def get(backend: str, precision: str = "float32", *, invariant: bool = True) -> LoadedModel:
        digest = packages(backend, precision, invariant=invariant).digest
        if digest not in made:
            made[digest] = load_package(store, digest)
        return made[digest]

    return get


@pytest.fixture(scope="module")
def sessions(loaded: Loader) -> Callable[..., Sessions]:
    made: dict[Any, Sessions] = {}

    def get(backend: str, precision: str, *, invariant: bool = True) -> Sessions:
        key = (backend, precision, invariant)
        if key not in made:
            made[key] = Sessions(loaded(backend, precision, invariant=invariant).executor)
        return made[key]

    return get


@pytest.mark.parametrize(("backend", "precision"), ALL)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_no_composition_reaches_a_rows_bits(
    sessions: Callable[..., Sessions], backend: str, precision: str, seed: int
) -> None:
    assert sessions(backend, precision).differing(seed) == []


@pytest.mark.parametrize(("backend", "precision"), QUICK)
def test_a_rows_last_logits_have_the_bits_that_they_have_among_all(
    loaded: Loader, backend: str, precision: str
) -> None:
    executor = loaded(backend, precision).executor
    pool, draw = executor.new_pool(8), np.random.default_rng(5)
    for batch, count in ((1, 2), (1, 17), (2, 5), (7, 9)):
        tokens = draw.integers(0, executor.config.vocab_size, (batch, count))
        none = np.zeros(batch, dtype=np.int64)
        inputs = (tokens, np.tile(np.arange(count), (batch, 1)), none[:, None].copy(), none)
        whole = np.array(executor.step(*inputs, pool).logits)
        last = draw.integers(0, count, batch)
        picked = executor.step(*inputs, pool, last=last).logits
        np.testing.assert_array_equal(picked[:, 0], whole[np.arange(batch), last])


@pytest.mark.parametrize(("backend", "precision"), QUICK)
def test_the_same_compositions_reach_the_bits_without_the_recipe(
    sessions: Callable[..., Sessions], backend: str, precision: str
) -> None:
    """The negative control: were it blind, the test above would prove nothing."""
    assert any(sessions(backend, precision, invariant=False).differing(seed) for seed in range(3))


@pytest.mark.parametrize(("backend", "precision"), ALL)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), running=st.sampled_from([2, 5, 8]), chunk=st.sampled_from([0, 16, 23]))
def test_what_an_engine_answered_in_company_each_request_answers_alone(
    loaded: Loader, backend: str, precision: str, seed: int, running: int, chunk: int
) -> None:
    """Chunked prefill, prefix hits, preemption, recompute: all logits have the bits of an idle engine."""
    model = loaded(backend, precision)
    scheduling = SchedulingManifest(
        max_num_seqs=running, max_num_batched_tokens=48, num_blocks=14, long_prefill_token_threshold=chunk
    )
    asked = requests_with_shared_prefixes(8, seed=seed, vocab_size=320, longest_output=20)
    recording = record(ToyModel(model.executor), scheduling, asked)
    player = PlanPlayer(model.executor, None, scheduling, recording.plans, recording.sequences)
    exact = [
        player.replay(request, "alone").document() == result.document()
        for request, result in zip(asked, recording.results, strict=True)
    ]
    assert exact == [True] * len(asked)


@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("onnxruntime", {"disable_prepacking": "1"}),
        pytest.param("inductor", {"freezing": "false"}, marks=pytest.mark.slow),
    ],
)
def test_stage_nine_refuses_a_setting_under_which_rows_vary(
    model_folder: Path, store: PackageStore, backend: str, flags: dict[str, str]
) -> None:
    options = BuildOptions(bounds=BOUNDS, batch_invariant=True, flags=flags)
    with pytest.raises(WarmupRefused, match=r"depend on: .*batch \(\d+/\d+\)") as refused:
        prepare(model_folder, backend=backend, store=store, options=options)
    assert refused.value.stage == "a09"
    assert "batch" in refused.value.evidence["validation_output"]


def test_a_recipe_needs_the_mode_and_strict_needs_its_environment(model_folder: Path, store: PackageStore) -> None:
    with pytest.raises(BackendRefused, match="recipe without batch_invariant"):
        prepare(model_folder, backend="eager", store=store, options=BuildOptions(flags={"recipe": "tile"}))
    strict = BuildOptions(bounds=BOUNDS, batch_invariant=True, flags={"recipe": "strict"})
    with pytest.raises(BackendRefused, match="MKL_CBWR is unset"):
        prepare(model_folder, backend="eager", store=store, options=strict)


@pytest.mark.parametrize(("backend", "precision"), [("eager", "float32"), ("onnxruntime", "float32")])
def test_the_record_says_what_bits_depend_on_and_which_kernels_vary(
    packages: Callable[..., PreparedPackage], backend: str, precision: str
) -> None:
    decided = {
        invariant: packages(backend, precision, invariant=invariant).reports[-1].record["readiness_decision"]
        for invariant in (False, True)
    }
    assert {decided[True]["invariance"][axis] for axis in AXES} == {"equal"}
    assert decided[True]["varying_kernels"] == {}
    assert decided[False]["invariance"]["recompute"] == "differs"
    assert "attention" in decided[False]["varying_kernels"]
    assert ("mkl sgemm" in decided[False]["varying_kernels"]) == (backend == "eager")
    assert decided[False]["invariance"]["control"] == "differs"


STRICT = """
import sys
from runtime.backends.linears import mkl_is_strict
print(mkl_is_strict())
from pathlib import Path
from runtime.prepare.pipeline import prepare
from runtime.prepare.store import PackageStore
from runtime.backends.protocol import BuildOptions
from tests.runtime.prepare.conftest import BOUNDS
options = BuildOptions(bounds=BOUNDS, batch_invariant=True, flags={"recipe": "strict"})
prepared = prepare(Path(sys.argv[1]), backend="eager", store=PackageStore(Path(sys.argv[2])), options=options)
found = prepared.reports[-1].record["readiness_decision"]["invariance"]
print(prepared.digest)
print(sorted({found[axis] for axis in ("batch", "padding", "chunks", "prefill", "recompute")}))
"""


@pytest.mark.slow
def test_the_strict_recipe_holds_where_mkl_honours_it_and_loads_in_no_other_process(
    model_folder: Path, tmp_path: Path
) -> None:
    """MKL reads MKL_CBWR on some processors only; elsewhere the recipe is refused, whatever the variable says."""
    environment = {**os.environ, "MKL_CBWR": "AVX512,STRICT", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", STRICT, str(model_folder), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    honoured, *found = done.stdout.strip().splitlines()
    if honoured == "False":
        assert done.returncode == 1
        assert "does not honour the setting" in done.stderr
        return
    digest, axes = found
    assert axes == "['equal']"
    with pytest.raises(BackendRefused, match="MKL_CBWR is unset"):
        load_package(PackageStore(tmp_path), digest)

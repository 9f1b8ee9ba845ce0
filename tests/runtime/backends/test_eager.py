"""The eager executor: a cached session answers as one long prefill, and nothing foreign reaches the module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.backends.eager import EagerExecutor
from runtime.backends.errors import BackendRefused, InputRefused
from runtime.backends.fixture import compare, fixture_tokens, run_fixture
from runtime.backends.pool import ArrayPool
from runtime.models.random_checkpoint import random_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("eager") / "model", family="qwen3")


def test_chunks_and_decode_over_the_cache_equal_one_prefill(checkpoint: Path) -> None:
    executor = EagerExecutor.from_checkpoint(checkpoint)
    output = run_fixture(executor)
    tokens = fixture_tokens("session", 60, executor.config.vocab_size).reshape(3, 20)
    whole = executor.step(
        tokens,
        np.tile(np.arange(20), (3, 1)),
        np.zeros((3, 1), dtype=np.int64),
        np.zeros(3, dtype=np.int64),
        executor.new_pool(1),
    )
    cached = np.concatenate(output.logits[:-1], axis=1)
    np.testing.assert_allclose(cached, whole.logits, atol=2e-5)


def test_repeating_a_session_repeats_its_bits(checkpoint: Path) -> None:
    for precision in ("float32", "bfloat16"):
        executor = EagerExecutor.from_checkpoint(checkpoint, precision=precision)
        assert run_fixture(executor).digests() == run_fixture(executor).digests()


def test_bfloat16_is_within_its_tolerance_and_not_float32(checkpoint: Path) -> None:
    reference = run_fixture(EagerExecutor.from_checkpoint(checkpoint))
    half = run_fixture(EagerExecutor.from_checkpoint(checkpoint, precision="bfloat16"))
    comparison = compare(half, reference, "bfloat16")
    assert comparison.within
    assert comparison.max_abs > 1e-4


def test_read_only_and_strided_inputs_are_taken_as_they_are(checkpoint: Path) -> None:
    executor = EagerExecutor.from_checkpoint(checkpoint)
    pool = executor.new_pool(8)
    tokens = np.arange(8, dtype=np.int64).reshape(2, 4)[:, ::2]
    positions = np.broadcast_to(np.arange(2), (2, 2))
    slots, lengths = np.zeros((2, 1), dtype=np.int64), np.zeros(2, dtype=np.int64)
    plain = executor.step(tokens.copy(), positions.copy(), slots, lengths, pool)
    assert np.array_equal(executor.step(tokens, positions, slots, lengths, pool).logits, plain.logits)


def test_a_foreign_pool_is_refused(checkpoint: Path) -> None:
    executor = EagerExecutor.from_checkpoint(checkpoint)
    one, none = np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
    foreign = ArrayPool(num_layers=executor.config.num_layers, num_slots=4, width=executor.config.kv_width)
    other = EagerExecutor.from_checkpoint(checkpoint, precision="bfloat16").new_pool(4)
    for pool in (foreign, other):
        with pytest.raises(InputRefused):
            executor.step(one, one, one, none, pool)


def test_a_closed_executor_refuses(checkpoint: Path) -> None:
    executor = EagerExecutor.from_checkpoint(checkpoint)
    pool = executor.new_pool(4)
    executor.close()
    one, none = np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
    with pytest.raises(BackendRefused):
        executor.step(one, one, one, none, pool)

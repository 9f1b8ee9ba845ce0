"""What do products in blocks gain?  Steps of two packages of one checkpoint, in turns; figures are printed only."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.backends.contract import Bounds
from runtime.backends.onnxruntime_blocks import has_blocks
from runtime.backends.protocol import BuildOptions, Executor

CACHED, STEPS, ROUNDS = 64, 10, 5


@pytest.mark.slow
@pytest.mark.skipif(not has_blocks(), reason="this processor has no blocks of 16 channels")
def test_time_in_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU time of a step with plain products over that with products in blocks; layers of the medium size."""
    from runtime.models.random_checkpoint import random_checkpoint
    from runtime.prepare.load import load_package
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.store import PackageStore

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_heads": 12, "num_kv_heads": 4, "head_dim": 64}
    checkpoint = random_checkpoint(tmp_path / "checkpoint", vocab_size=4096, **sizes)
    store, bounds = PackageStore(tmp_path), Bounds(max_batch=32, max_tokens=64, max_context=256)

    def load(products: str) -> Executor:
        options = BuildOptions(bounds=bounds, flags={"products": products})
        prepared = prepare(checkpoint, backend="onnxruntime", store=store, options=options)
        return load_package(store, prepared.digest).executor

    plain, blocked = load("plain"), load("blocked")
    for rows, count in ((1, 1), (8, 1), (32, 1), (8, 64), (32, 64)):
        ratios = [seconds(plain, rows, count) / seconds(blocked, rows, count) for _ in range(ROUNDS)]
        with capsys.disabled():
            print(f"\nplain over blocked products, {rows:2} rows of {count:2} tokens: {statistics.median(ratios):.2f}")


def seconds(executor: Executor, rows: int, count: int) -> float:
    """CPU seconds of some steps over the same context, after one that nobody counts."""
    pool = executor.new_pool(rows * CACHED)
    slots = np.arange(rows * CACHED).reshape(rows, CACHED)
    tokens, lengths = np.ones((rows, count), dtype=np.int64), np.full(rows, CACHED - 1)
    positions, last = lengths[:, None] + np.arange(count), np.full(rows, count - 1)
    executor.step(tokens, positions, slots, lengths, pool, last=last)
    began = time.process_time()
    for _ in range(STEPS):
        executor.step(tokens, positions, slots, lengths, pool, last=last)
    return time.process_time() - began

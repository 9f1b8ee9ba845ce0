"""Does a row answer alike in any company?  Sequences answered alone, then again among each other at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.backends.protocol import Executor
from tests.runtime.prepare.conftest import BOUNDS

LENGTHS = (1, 5, 17, 40, 64, 64, 33)
SLOTS = 512


class Sessions:
    """Some sequences, each answered whole and alone; then again in random compositions."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        draw = np.random.default_rng(7)
        self.tokens = [draw.integers(0, executor.config.vocab_size, length) for length in LENGTHS]
        self.reference = [self._alone(tokens) for tokens in self.tokens]

    def _alone(self, tokens: Any) -> tuple[Any, Any]:
        count = len(tokens)
        pool = self.executor.new_pool(SLOTS)
        none = np.zeros(1, dtype=np.int64)
        out = self.executor.step(tokens[None], np.arange(count)[None], np.zeros((1, 1), dtype=np.int64), none, pool)
        rows = np.zeros(count, dtype=np.int64)
        pool.write(np.arange(count), out.new_k, out.new_v, rows=rows, columns=np.arange(count))
        return np.array(out.logits[0]), pool.read(np.arange(count))

    def differing(self, seed: int) -> list[str]:
        """Compose at random until all are through; name each token whose logits, or row whose cache, differ."""
        draw = np.random.default_rng(seed)
        pool = self.executor.new_pool(SLOTS)
        places = np.split(draw.permutation(SLOTS), np.cumsum(LENGTHS))
        done = [0] * len(LENGTHS)
        found: list[str] = []
        longest = int(draw.choice([1, 3, 16, 64]))
        while left := [number for number, length in enumerate(LENGTHS) if done[number] < length]:
            chosen = [int(n) for n in draw.permutation(left)[: draw.integers(1, len(left) + 1)]]
            counts = [int(draw.integers(1, min(longest, LENGTHS[n] - done[n]) + 1)) for n in chosen]
            batch = min(len(chosen) + int(draw.integers(0, 9)), BOUNDS.max_batch)
            rows = draw.permutation(batch)[: len(chosen)]
            width = min(max(counts) + int(draw.choice([0, 0, 3, 15])), BOUNDS.max_tokens)
            context = max(1, max(done[n] for n in chosen)) + int(draw.choice([0, 0, 24, 63]))
            inputs = self._noise(draw, batch, width, context)
            for row, number, count in zip(rows, chosen, counts, strict=True):
                start = done[number]
                inputs[0][row, :count] = self.tokens[number][start : start + count]
                inputs[1][row] = np.minimum(np.arange(start, start + width), self.executor.contract.max_positions - 1)
                inputs[2][row, :start] = places[number][:start]
                inputs[3][row] = start
            out = self.executor.step(*inputs, pool)
            for row, number, count in zip(rows, chosen, counts, strict=True):
                start, columns = done[number], np.arange(count)
                wanted = self.reference[number][0][start : start + count]
                same = (out.logits[row, :count] == wanted).all(axis=1)
                found += [f"sequence {number} token {start + n}" for n in columns[~same]]
                where = np.full(count, row, dtype=np.int64)
                pool.write(places[number][start : start + count], out.new_k, out.new_v, rows=where, columns=columns)
                done[number] += count
        for number, length in enumerate(LENGTHS):
            cached = pool.read(places[number][:length])
            pairs = zip(cached, self.reference[number][1], strict=True)
            if not all(np.array_equal(one, other) for one, other in pairs):
                found.append(f"sequence {number} cache")
        return found

    def _noise(self, draw: Any, batch: int, width: int, context: int) -> tuple[Any, Any, Any, Any]:
        """Fill all rows with other requests' content."""
        return (
            draw.integers(0, self.executor.config.vocab_size, (batch, width)),
            draw.integers(0, 512, (batch, width)),
            draw.integers(0, SLOTS, (batch, context)),
            draw.integers(0, context + 1, batch),
        )

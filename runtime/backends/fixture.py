"""Does a backend compute what the model computes?  One small session of prefill, chunk and decode against a reference.

The tokens come from SHA-256, so no library's generator can change them.  Every backend fills its own cache with its own
keys and values, so the difference is what a user would see and not what one isolated call shows.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.backends.comparison import TOLERANCE, Comparison
from runtime.backends.contract import Integers
from runtime.backends.eager import EagerExecutor
from runtime.backends.errors import BackendRefused, ExecutionFailed
from runtime.backends.protocol import Executor, Floats

ROWS, PROMPT, CHUNK, STEPS = 3, 12, 5, 3


def fixture_tokens(label: str, count: int, vocab_size: int) -> Integers:
    """Draw `count` token ids from SHA-256 of `label` and a counter."""
    words = [hashlib.sha256(f"replaylab fixture {label} {index}".encode()).digest() for index in range(count)]
    return np.array([int.from_bytes(word[:8], "little") % vocab_size for word in words], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class FixtureOutput:
    """Logits of every step of the fixture session."""

    names: tuple[str, ...]
    logits: tuple[Floats, ...]

    def digests(self) -> dict[str, str]:
        """Name each step's logits by their bytes."""
        return {
            name: "sha256:" + hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            for name, array in zip(self.names, self.logits, strict=True)
        }


def run_fixture(executor: Executor) -> FixtureOutput:
    """Run the session: a prefill, a second chunk over the cache, decode steps, and one wide decode batch."""
    bounds, vocab = executor.contract.bounds, executor.config.vocab_size
    rows = min(ROWS, bounds.max_batch)
    prompt, chunk = min(PROMPT, bounds.max_tokens), min(CHUNK, bounds.max_tokens)
    total = prompt + chunk + STEPS
    if total > min(bounds.max_context, executor.contract.max_positions):
        raise BackendRefused(
            f"the fixture needs a context of {total} positions", fix="declare larger bounds for context and positions"
        )
    pool = executor.new_pool(rows * total + 1)
    tokens = fixture_tokens("session", rows * total, vocab).reshape(rows, total)
    slots = np.arange(rows * total, dtype=np.int64).reshape(rows, total) + 1
    names: list[str] = []
    outputs: list[Floats] = []
    done = 0
    for size in (prompt, chunk, *([1] * STEPS)):
        reach = slice(done, done + size)
        positions = np.tile(np.arange(done, done + size, dtype=np.int64), (rows, 1))
        seen = slots[:, :done].copy() if done else np.zeros((rows, 1), dtype=np.int64)
        lengths = np.full(rows, done, dtype=np.int64)
        out = executor.step(tokens[:, reach].copy(), positions, seen, lengths, pool)
        row_index = np.repeat(np.arange(rows, dtype=np.int64), size)
        columns = np.tile(np.arange(size, dtype=np.int64), rows)
        pool.write(slots[:, reach].reshape(-1).copy(), out.new_k, out.new_v, rows=row_index, columns=columns)
        names.append(f"b{rows}_t{size}_s{max(done, 1)}")
        outputs.append(np.array(out.logits, dtype=np.float32))
        done += size
    wide = min(8, bounds.max_batch)
    pick = np.arange(wide) % rows
    out = executor.step(
        fixture_tokens("wide", wide, vocab).reshape(wide, 1),
        np.full((wide, 1), done, dtype=np.int64),
        slots[pick].copy(),
        np.full(wide, done, dtype=np.int64),
        pool,
    )
    names.append(f"wide_b{wide}_t1_s{done}")
    outputs.append(np.array(out.logits, dtype=np.float32))
    return FixtureOutput(names=tuple(names), logits=tuple(outputs))


def compare(output: FixtureOutput, reference: FixtureOutput, precision: str) -> Comparison:
    """Compare two fixture outputs; anything that is not a finite number is a failed execution."""
    worst, scale, equal, total = 0.0, 0.0, 0, 0
    difference_squares = reference_squares = 0.0
    for name, ours, theirs in zip(output.names, output.logits, reference.logits, strict=True):
        if not np.isfinite(ours).all():
            raise ExecutionFailed(
                f"step {name} of the fixture answered values that are not finite",
                fix="compare with the eager backend",
                evidence={"error_class": "not finite", "output_completeness": name},
            )
        difference = ours.astype(np.float64) - theirs
        difference_squares += float((difference**2).sum())
        reference_squares += float((theirs.astype(np.float64) ** 2).sum())
        worst = max(worst, float(np.abs(difference).max()))
        scale = max(scale, float(np.abs(theirs).max()))
        equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        total += ours.shape[0] * ours.shape[1]
    return Comparison(
        max_abs=worst,
        scale=scale,
        relative_rms=math.sqrt(difference_squares / reference_squares) if reference_squares else math.sqrt(worst),
        tolerance=TOLERANCE[precision],
        argmax_equal=equal,
        argmax_total=total,
    )


def require_within(comparison: Comparison, *, stage: str) -> None:
    """Refuse a stage's result that drifted from eager float32 beyond the stated tolerance."""
    if not comparison.within:
        raise BackendRefused(
            f"the program differs from {comparison.reference} by {comparison.relative_rms:.2e} in relative root mean "
            f"square, allowed is {comparison.tolerance:g}",
            fix="lower the optimization level, or look for the pass that rewrote it",
            evidence={"validation_output": str(comparison.document())},
            stage=stage,
        )


def reference_output(model_folder: Path, like: Executor) -> FixtureOutput:
    """Run the fixture on eager float32 from the checkpoint, under the bounds of `like`."""
    eager = EagerExecutor.from_checkpoint(model_folder, bounds=like.contract.bounds)
    return run_fixture(eager)


def compare_with_reference(executor: Executor, model_folder: Path) -> Comparison:
    """Run the fixture on `executor` and on eager float32 and compare."""
    return compare(run_fixture(executor), reference_output(model_folder, executor), executor.precision)

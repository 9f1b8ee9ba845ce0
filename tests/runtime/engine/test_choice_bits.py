"""A choice and its evidence are, bit for bit, what the formulas written out plainly give."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from runtime.engine.sampling import Choices, Draw, Scratch, choose, draw_tokens, find_peaks, stream_base

finite = (
    st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.floats(-30, 30, width=32)
    | st.sampled_from([0.0, -0.0, 1.0])
)
logit = finite | st.just(float("-inf"))


def plainly(logits: NDArray[np.float32], draws: list[Draw], allowed: NDArray[np.bool_] | None) -> Choices:
    """Every quantity by its own formula, nothing shared or overwritten."""
    scores = logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))
    tokens = scores.argmax(axis=1)
    rows = np.arange(len(tokens))
    best, peaks = scores[rows, tokens], logits.max(axis=1)
    others = scores.copy()
    others[rows, tokens] = -np.inf
    margins = best - others.max(axis=1)
    for row, draw in enumerate(draws):
        if draw.temperature > 0.0:
            tokens[row] = draw_tokens(scores[[row]], [draw])[0]
    totals = np.exp(np.ascontiguousarray(logits - peaks[:, None])).sum(axis=1)
    logprobs = (logits[rows, tokens] - peaks).astype(np.float64) - np.log(totals.astype(np.float64))
    return Choices(
        tokens.tolist(),
        [xxhash.xxh3_128_hexdigest(row.tobytes()) for row in logits],
        logprobs.tolist(),
        [None if np.isinf(margin) else margin for margin in margins.tolist()],
    )


def bits(choices: Choices) -> list[tuple[int, str, bytes, bytes | None]]:
    """All of it; only the sign of a margin of zero, where the best two are zeros of both signs, is left open."""
    return [
        (token, digest, struct.pack("d", logprob), None if margin is None else struct.pack("d", margin + 0.0))
        for token, digest, logprob, margin in zip(
            choices.tokens, choices.digests, choices.logprobs, choices.margins, strict=True
        )
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], list[Draw], NDArray[np.bool_] | None]:
    """Rows with at least one number each, some drawn at a temperature, some under a mask; not always contiguous."""
    count, vocabulary = draw(st.integers(1, 9)), draw(st.integers(1, 700))
    logits = draw(arrays.arrays(np.float32, (count, vocabulary), elements=logit, fill=logit))
    places = draw(st.lists(st.integers(0, vocabulary - 1), min_size=count, max_size=count))
    logits[np.arange(count), places] = draw(arrays.arrays(np.float32, count, elements=finite))
    temperatures = draw(st.lists(st.sampled_from([0.0, 0.0, 0.7]), min_size=count, max_size=count))
    draws = [Draw(stream_base(row, "x"), 0, temperature) for row, temperature in enumerate(temperatures)]
    allowed = None
    if draw(st.booleans()):
        allowed = draw(arrays.arrays(np.bool_, (count, vocabulary)))
        allowed[np.arange(count), places] = True
    return (np.asfortranarray(logits) if draw(st.booleans()) else logits), draws, allowed


@given(case=cases())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_shared_passes_change_no_bit(case: tuple[NDArray[np.float32], list[Draw], NDArray[np.bool_] | None]) -> None:
    """Whatever the rows; into scratch memory of earlier content; the executor's array is not written to."""
    logits, draws, allowed = case
    logits.setflags(write=False)
    scratch = Scratch()
    scratch.take(logits.shape).fill(np.nan)
    assert bits(choose(logits, draws, allowed, scratch=scratch)) == bits(plainly(logits, draws, allowed))


@given(case=cases())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_peaks_found_before_change_no_bit_and_are_not_written_to(
    case: tuple[NDArray[np.float32], list[Draw], NDArray[np.bool_] | None],
) -> None:
    logits, draws, allowed = case
    rows = list(range(len(logits)))[::2]
    found = find_peaks(logits).of(rows)
    found.places.setflags(write=False)
    some, draws, allowed = logits[rows], [draws[row] for row in rows], None if allowed is None else allowed[rows]
    assert bits(choose(some, draws, allowed, found=found)) == bits(plainly(some, draws, allowed))


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 4096), (8, 4096), (32, 4096), (8, 50_000), (3, 4097)])
def test_rows_of_models_keep_their_bits(count: int, vocabulary: int) -> None:
    """At the sizes that models have, with ties for the best, masked and drawn rows too."""
    random = np.random.default_rng(count)
    logits = (random.standard_normal((count, vocabulary)) * 4).astype(np.float32)
    logits[0, [5, 9]] = logits.max() + 1
    allowed = random.random((count, vocabulary)) < 0.3
    for temperature in (0.0, 0.8):
        draws = [Draw(stream_base(row, ""), 3, temperature, 50, 0.9) for row in range(count)]
        for mask in (None, allowed):
            assert bits(choose(logits, draws, mask)) == bits(plainly(logits, draws, mask))

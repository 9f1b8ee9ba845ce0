"""A draw depends on seed, stream and output index only; settings do what they say; evidence is that of the raw row."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.errors import EngineFailed, SamplingRefused
from runtime.engine.generation import Sampling
from runtime.engine.sampling import Draw, check_sampling, choose, mix64, stream_base, uniforms


def rows(count: int, vocabulary: int = 100, seed: int = 0) -> np.ndarray:
    """Random logits."""
    return (np.random.default_rng(seed).standard_normal((count, vocabulary)) * 3).astype(np.float32)


def test_splitmix64_equals_its_published_stream() -> None:
    """The first outputs for seed 1234567 are those of the reference implementation."""
    golden = 0x9E3779B97F4A7C15
    assert [mix64(1234567 + (i + 1) * golden) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(seed=st.integers(0, 2**64 - 1), stream=st.text(max_size=5), ordinal=st.integers(0, 5000))
def test_fractions_are_in_the_half_open_unit_interval(seed: int, stream: str, ordinal: int) -> None:
    """For every seed, stream and index."""
    (value,) = uniforms([stream_base(seed, stream)], [ordinal])
    assert 0.0 <= value < 1.0


def test_fractions_are_uniform() -> None:
    """Sixteen bins of 16,000 draws stay within four standard deviations."""
    values = uniforms([stream_base(seed, "") for seed in range(160)] * 100, [i // 160 for i in range(16_000)])
    counts, _ = np.histogram(values, bins=16, range=(0, 1))
    assert abs(counts - 1000).max() < 4 * 31


@given(order=st.permutations(range(6)), extra=st.integers(0, 3), seed=st.integers(0, 20))
def test_batch_order_and_neighbours_do_not_matter(order: list[int], extra: int, seed: int) -> None:
    """A row's token and evidence are the same alone, in any order and beside any other rows."""
    logits = rows(6 + extra, seed=seed)
    settings = [(0.0, None, 1.0), (1.0, None, 1.0), (0.7, 5, 1.0), (1.3, None, 0.8), (0.9, 9, 0.5), (2.0, 1, 1.0)]
    draws = [Draw(stream_base(seed, "x"), i, *settings[i % 6]) for i in range(6 + extra)]
    alone = [choose(logits[i : i + 1], [draws[i]]) for i in range(6)]
    together = choose(logits[[*order, *range(6, 6 + extra)]], [draws[i] for i in [*order, *range(6, 6 + extra)]])
    for place, i in enumerate(order):
        assert together.tokens[place] == alone[i].tokens[0]
        assert together.digests[place] == alone[i].digests[0]
        assert together.logprobs[place] == alone[i].logprobs[0]
        assert together.margins[place] == alone[i].margins[0]


def test_greedy_takes_the_best_and_says_by_how_much() -> None:
    """Token, log-probability, margin and digest of a row."""
    logits = rows(3)
    choices = choose(logits, [Draw(0, 0)] * 3)
    for row in range(3):
        ordered = np.sort(logits[row].astype(np.float64))
        assert choices.tokens[row] == int(logits[row].argmax())
        assert choices.margins[row] == pytest.approx(ordered[-1] - ordered[-2])
        assert choices.logprobs[row] == pytest.approx(ordered[-1] - np.log(np.exp(ordered).sum()), abs=1e-5)
        assert choices.digests[row] == xxhash.xxh3_128_hexdigest(logits[row].tobytes())


@pytest.mark.parametrize(
    ("top_k", "top_p", "allowed"), [(3, 1.0, 3), (None, 0.6, None), (5, 0.6, None), (None, 1e-9, 1)]
)
def test_top_k_and_top_p_keep_the_heaviest(top_k: int | None, top_p: float, allowed: int | None) -> None:
    """No draw leaves the set, and every member of it can be drawn."""
    logits = rows(1, vocabulary=50, seed=3)
    weights = np.exp(logits[0].astype(np.float64))
    order = np.argsort(-weights, kind="stable")[: top_k or 50]
    mass = np.cumsum(weights[order]) / weights[order].sum()
    count = allowed or int(np.searchsorted(mass, top_p)) + 1
    drawn = {choose(logits, [Draw(1, i, 1.0, top_k, top_p)]).tokens[0] for i in range(3000)}
    assert drawn == set(order[:count].tolist())


def test_draws_follow_the_distribution() -> None:
    """Frequencies of 20,000 draws at temperature 1 lie near the probabilities (70 tokens: more than one segment)."""
    logits = rows(1, vocabulary=70, seed=5)
    expected = np.exp(logits[0].astype(np.float64))
    expected /= expected.sum()
    draws = [Draw(stream_base(9, ""), i, 1.0) for i in range(20_000)]
    tokens = choose(np.repeat(logits, 20_000, axis=0), draws).tokens
    seen = np.bincount(tokens, minlength=70) / 20_000
    assert np.abs(seen - expected).max() < 0.012


def test_a_mask_moves_the_choice_but_not_the_evidence() -> None:
    """The digest is of the raw row, the margin among the allowed; a single allowed token has no margin."""
    logits = rows(2)
    allowed = np.zeros((2, 100), dtype=np.bool_)
    allowed[0, [7, 8]] = True
    allowed[1, 9] = True
    choices = choose(logits, [Draw(0, 0), Draw(0, 0, 1.0)], allowed)
    assert choices.tokens == [7 if logits[0, 7] > logits[0, 8] else 8, 9]
    assert choices.digests == choose(logits, [Draw(0, 0)] * 2).digests
    assert choices.margins == [pytest.approx(abs(float(logits[0, 7] - logits[0, 8]))), None]


def test_logits_that_are_no_numbers_are_a_model_failure() -> None:
    """NaN never becomes a token."""
    logits = rows(2)
    logits[1, 3] = np.nan
    with pytest.raises(EngineFailed):
        choose(logits, [Draw(0, 0)] * 2)


@pytest.mark.parametrize(
    "bad",
    [
        Sampling(temperature=-1.0),
        Sampling(temperature=float("nan")),
        Sampling(top_k=0),
        Sampling(top_p=0.0),
        Sampling(max_tokens=0),
        Sampling(seed=-1),
    ],
)
def test_settings_out_of_range_are_refused(bad: Sampling) -> None:
    """Each by name."""
    with pytest.raises(SamplingRefused):
        check_sampling(bad)

"""Which token comes next?  Greedy or drawn by a counter, never by a shared generator, with the evidence of the choice.

The draw for output token i is `splitmix64(stream base + (i + 1) * golden ratio)` in unsigned 64-bit arithmetic, its top
53 bits read as a fraction in [0, 1); the base mixes seed and stream name (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014).  The token is the inverse of the cumulative distribution in vocabulary order,
weights in float32 summed in float64.  So batch order, neighbours and preemptions cannot move a draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from runtime.engine.errors import AnswerNotFinite, EngineFailed, SamplingRefused
from runtime.engine.generation import Sampling

SAMPLER_ALGORITHM = "splitmix64-inverse-cdf/1"
"""For GenerationManifest.sampler_algorithm."""
DIGEST_ALGORITHM = "xxh3_128"

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SEGMENT = 64
_FEW_ROWS, _SMALL_BUFFER = 6, 512
"""Below so many rows setting the size of NumPy's buffer, in elements, costs more than it spares."""
_NOTHING = np.float32(-inf)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Draw:
    """What the choice of one output token needs besides its logits."""

    base: int
    """Stream base of the sequence, from `stream_base`."""
    ordinal: int
    """0 for the first output token."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Choices:
    """The chosen tokens of n rows and their evidence, each a list of n."""

    tokens: list[int]
    digests: list[str]
    logprobs: list[float]
    margins: list[float | None]


def check_sampling(sampling: Sampling) -> None:
    """Raise SamplingRefused for a setting outside its range."""
    wrong = [
        name
        for name, fine in (
            ("temperature", 0.0 <= sampling.temperature < float("inf")),
            ("top_k", sampling.top_k is None or sampling.top_k >= 1),
            ("top_p", 0.0 < sampling.top_p <= 1.0),
            ("max_tokens", sampling.max_tokens >= 1),
            ("seed", 0 <= sampling.seed < 1 << 64),
        )
        if not fine
    ]
    if wrong:
        raise SamplingRefused(
            f"sampling settings out of range: {', '.join(wrong)}",
            reason="sampling_settings",
            evidence={"failed_rule": wrong},
            fix="temperature >= 0, top_k >= 1 or none, 0 < top_p <= 1, max_tokens >= 1, 0 <= seed < 2**64",
        )


def mix64(value: int) -> int:
    """The splitmix64 finalizer on one unsigned 64-bit integer."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def stream_base(seed: int, stream: str) -> int:
    """Return the 64-bit base of a sequence's random stream."""
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return mix64(mix64(seed + _GOLDEN) ^ name)


def uniforms(bases: Sequence[int], ordinals: Sequence[int]) -> Doubles:
    """Return one fraction in [0, 1) for each (base, ordinal), float64 [n]."""
    fractions = [mix64(base + (ordinal + 1) * _GOLDEN) >> 11 for base, ordinal in zip(bases, ordinals, strict=True)]
    return np.array(fractions, dtype=np.float64) * 2.0**-53


class Peaks(NamedTuple):
    """Where each of n rows of logits is largest, and how large."""

    places: NDArray[np.intp]
    values: Floats

    def of(self, rows: list[int]) -> Peaks:
        """Give those of some rows."""
        return Peaks(self.places[rows], self.values[rows])


def find_peaks(logits: Floats) -> Peaks:
    """Find each row's largest logit, the first of equal ones; AnswerNotFinite where that is no finite number."""
    count, vocabulary = logits.shape
    places = logits.argmax(axis=1)
    values = logits.take(places + np.arange(0, count * vocabulary, vocabulary))  # flat places are faster than pairs
    if not isfinite(sum(values.tolist())):
        raise AnswerNotFinite()
    return Peaks(places, values)


class Scratch:
    """Working memory for choices, used again: arrays of this size cost more to map than to compute on."""

    def __init__(self) -> None:
        self._buffer: Floats = np.empty((0, 0), dtype=np.float32)

    def take(self, shape: tuple[int, int]) -> Floats:
        """Return an array of this shape with any content."""
        rows, columns = self._buffer.shape
        if rows < shape[0] or columns != shape[1]:
            self._buffer = np.empty(shape, dtype=np.float32)
        return self._buffer[: shape[0]]


def choose(
    logits: Floats,
    draws: Sequence[Draw],
    allowed: NDArray[np.bool_] | None = None,
    *,
    found: Peaks | None = None,
    scratch: Scratch | None = None,
) -> Choices:
    """Choose one token for each row.

    logits: float32 [n, vocabulary], raw; allowed: bool of the same shape, or None when nothing is forbidden.
    found: their peaks, where the caller has them.
    Raises EngineFailed when a row is not a number or allows nothing.
    """
    count, vocabulary = logits.shape
    first = np.arange(0, count * vocabulary, vocabulary)  # where each row begins
    tokens, peaks = found or find_peaks(logits)
    work = (scratch or Scratch()).take(logits.shape)
    _shift(logits, peaks, work)
    chosen = peaks
    if allowed is None:
        # Rounding keeps order, so the best but one stands here at exactly its distance from the best.
        work.put(first + tokens, _NOTHING)
        gaps = np.maximum.reduce(work, axis=1)
        work.put(first + tokens, 0.0)
        scores = logits
    else:
        scores = np.where(allowed, logits, _NOTHING)
        tokens = scores.argmax(axis=1)
        chosen = scores.take(first + tokens)
        if not isfinite(sum(chosen.tolist())):
            raise EngineFailed("the grammar allows no token", reason="grammar_dead_end")
        scores.put(first + tokens, _NOTHING)
        gaps = np.maximum.reduce(scores, axis=1) - chosen
        scores.put(first + tokens, chosen)
    sampled = [row for row, draw in enumerate(draws) if draw.temperature > 0.0]
    if sampled:
        tokens = tokens.copy()  # the peaks are the caller's
        tokens[sampled] = draw_tokens(scores[sampled], [draws[row] for row in sampled])
        chosen = logits.take(first + tokens)
    totals = np.add.reduce(np.exp(work, out=work), axis=1)
    logprobs = (chosen - peaks) - np.log(totals, dtype=np.float64)
    digest = xxhash.xxh3_128_hexdigest
    return Choices(
        tokens=tokens.tolist(),
        digests=[digest(row) for row in np.ascontiguousarray(logits)],
        logprobs=logprobs.tolist(),
        margins=[0.0 - gap if gap != -inf else None for gap in gaps.tolist()],
    )


def _shift(logits: Floats, peaks: Floats, work: Floats) -> None:
    """Subtract each row's peak from it.

    NumPy spreads the peaks out in its buffer first where several rows fit into one, which costs as much again; a buffer
    below one row spares that.  Its size is this thread's own.
    """
    if len(logits) < _FEW_ROWS:
        np.subtract(logits, peaks[:, None], out=work)
        return
    before = np.setbufsize(_SMALL_BUFFER)
    try:
        np.subtract(logits, peaks[:, None], out=work)
    finally:
        np.setbufsize(before)


def draw_tokens(scores: Floats, draws: Sequence[Draw]) -> list[int]:
    """Invert the cumulative distribution of each row at its fraction; `scores` [n, vocabulary] is overwritten."""
    scores -= scores.max(axis=1, keepdims=True)
    scores /= np.array([draw.temperature for draw in draws], dtype=np.float32)[:, None]
    weights = np.exp(scores, out=scores)
    for row, draw in enumerate(draws):
        if draw.top_k is not None and draw.top_k < weights.shape[1]:
            _keep_top_k(weights[row], draw.top_k)
        if draw.top_p < 1.0:
            _keep_top_p(weights[row], draw.top_p)
    goals = uniforms([draw.base for draw in draws], [draw.ordinal for draw in draws])
    return _invert(weights, goals)


def _invert(weights: Floats, fractions: Doubles) -> list[int]:
    """Find each row's first token whose cumulative weight exceeds its fraction of the whole, by segments of 64."""
    count, vocabulary = weights.shape
    padded = weights
    if vocabulary % _SEGMENT:
        padded = np.zeros((count, -(-vocabulary // _SEGMENT) * _SEGMENT), dtype=np.float32)
        padded[:, :vocabulary] = weights
    segments = padded.reshape(count, -1, _SEGMENT)
    edges = np.cumsum(segments.sum(axis=2, dtype=np.float64), axis=1)
    goals = fractions * edges[:, -1]
    tokens: list[int] = []
    for row in range(count):
        # A fraction that rounds up to the whole, or to a segment's edge, means the last possible token before it.
        segment = min(int(edges[row].searchsorted(goals[row], side="right")), edges.shape[1] - 1)
        before = edges[row, segment - 1] if segment else 0.0
        inside = np.cumsum(segments[row, segment], dtype=np.float64) + before
        place = int(inside.searchsorted(goals[row], side="right"))
        if place == _SEGMENT:
            place = int(np.flatnonzero(segments[row].reshape(-1)[: (segment + 1) * _SEGMENT])[-1]) - segment * _SEGMENT
        tokens.append(segment * _SEGMENT + place)
    return tokens


def _keep_top_k(weights: Floats, k: int) -> None:
    """Zero all but the k largest in place; ties with the k-th stay."""
    weights[weights < np.partition(weights, -k)[-k]] = 0.0


def _keep_top_p(weights: Floats, p: float) -> None:
    """Zero all but the smallest set of largest weights that holds p of the mass, in place; ties go to lower ids."""
    total = float(weights.sum(dtype=np.float64))
    # Everything below this cut weighs less than 1 - p together, so the set lies above it: few tokens need sorting.
    heavy = np.flatnonzero(weights >= (1.0 - p) * total / len(weights))
    # Positive floats order as their bits do: one integer sort puts the largest first and ties by ascending id.
    keys = ((np.uint64(0xFFFFFFFF) - weights[heavy].view(np.uint32)) << np.uint64(32)) | heavy.astype(np.uint64)
    keys.sort()
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), p * total)) + 1
    kept = order[:count]
    values = weights[kept]
    weights[:] = 0.0
    weights[kept] = values

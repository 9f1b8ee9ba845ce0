"""Where do two generations of tokens part, in schedule, bits, margins or tokens, and how far after that?"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from eval.records import GenerationRecord, TokenRecord, Tolerance

INTERRUPTED = frozenset({"cancelled", "deadline", "error"})
"""Finish reasons that are failures, not choices of the model."""


@dataclass(frozen=True)
class TokenDifference:
    """One way in which two tokens differ."""

    layer: str
    index: int
    """Position in the generation; the length of the shorter one where only the ends differ."""
    step: int | None
    what: str
    expected: Any
    actual: Any
    forgiven: bool = False
    """Within the tolerance."""


@dataclass(frozen=True)
class TokenCounts:
    """How much of two generations agrees."""

    compared: int
    """Positions that both have."""
    length_original: int
    length_replay: int
    bits_compared: int
    """Positions at which both have a digest of the logits."""
    bits_different: int
    tokens_different: int
    first_bit_index: int | None
    first_token_index: int | None
    """First position with another token, or at which only one side goes on."""
    max_logprob_difference: float | None
    """Over positions with the same token; None where no two log-probabilities could be compared."""


def count_tokens(original: GenerationRecord, replay: GenerationRecord) -> TokenCounts:
    """Compare two generations at every position, past the first difference too."""
    pairs = list(zip(original.tokens, replay.tokens, strict=False))
    judged = [
        (index, left.logits_digest == right.logits_digest)
        for index, (left, right) in enumerate(pairs)
        if left.logits_digest is not None and right.logits_digest is not None
    ]
    other = [index for index, (left, right) in enumerate(pairs) if left.token != right.token]
    same_length = len(original.tokens) == len(replay.tokens)
    distances = [
        distance(left.logprob, right.logprob)
        for left, right in pairs
        if left.token == right.token and left.logprob is not None and right.logprob is not None
    ]
    return TokenCounts(
        compared=len(pairs),
        length_original=len(original.tokens),
        length_replay=len(replay.tokens),
        bits_compared=len(judged),
        bits_different=sum(not same for _, same in judged),
        tokens_different=len(other),
        first_bit_index=next((index for index, same in judged if not same), None),
        first_token_index=other[0] if other else (None if same_length else len(pairs)),
        max_logprob_difference=max(distances, default=None),
    )


def token_differences(
    original: GenerationRecord,
    replay: GenerationRecord,
    *,
    layers: Collection[str],
    tolerance: Tolerance | None,
) -> Iterator[TokenDifference]:
    """Yield the differences in the given layers in causal order: by position, and at one position layer by layer.

    Without a tolerance every difference of bits counts.  With one, bits may differ where the log-probability (of the
    same token) and the margin stay within it; such differences are yielded as forgiven.
    """
    for index, (left, right) in enumerate(zip_longest(original.tokens, replay.tokens)):
        if left is None or right is None:
            if "token" in layers:
                yield _ended(index, left, right)
            return
        found = (_schedule(index, left, right), *_numbers(index, left, right, tolerance), _token(index, left, right))
        yield from (difference for difference in found if difference is not None and difference.layer in layers)
    if original.finish_reason != replay.finish_reason:
        layer = "failure" if INTERRUPTED & {original.finish_reason, replay.finish_reason} else "token"
        if layer in layers:
            step = original.tokens[-1].step if original.tokens else None
            reasons = (original.finish_reason, replay.finish_reason)
            yield TokenDifference(layer, len(original.tokens), step, "finish_reason", *reasons)


def missing_evidence(original: GenerationRecord, replay: GenerationRecord) -> str | None:
    """Say what keeps equal tokens from proving equal bits; None where nothing is missing."""
    for side, generation in (("original", original), ("replay", replay)):
        for index, token in enumerate(generation.tokens):
            if token.logits_digest is None:
                return f"the {side} has no digest of the logits at token {index}"
    return None


def distance(left: float, right: float) -> float:
    """Return how far two numbers are apart: 0 for equal ones (infinities and not-a-numbers too), else never NaN."""
    if left == right or (math.isnan(left) and math.isnan(right)):
        return 0.0
    gap = abs(left - right)
    return math.inf if math.isnan(gap) else gap


def _schedule(index: int, left: TokenRecord, right: TokenRecord) -> TokenDifference | None:
    expected, actual = left.schedule_digest, right.schedule_digest
    if expected is None or actual is None or expected == actual:
        return None
    return TokenDifference("schedule", index, left.step, "schedule_digest", expected, actual)


def _numbers(
    index: int, left: TokenRecord, right: TokenRecord, tolerance: Tolerance | None
) -> tuple[TokenDifference | None, TokenDifference | None]:
    """Compare the bits, and the numbers behind them where bits cannot decide or may differ a little."""
    expected, actual = left.logits_digest, right.logits_digest
    if expected is not None and expected == actual:
        return None, None
    beyond = _margin(index, left, right, tolerance or Tolerance())
    if expected is None or actual is None:
        return None, beyond
    forgiven = tolerance is not None and _measured(left, right)
    return TokenDifference("bits", index, left.step, "logits_digest", expected, actual, forgiven), beyond


def _measured(left: TokenRecord, right: TokenRecord) -> bool:
    """Say whether the numbers are there that a tolerance speaks about."""
    if left.margin is None or right.margin is None:
        return False
    return left.token != right.token or (left.logprob is not None and right.logprob is not None)


def _margin(index: int, left: TokenRecord, right: TokenRecord, tolerance: Tolerance) -> TokenDifference | None:
    if left.token == right.token:
        expected, actual = left.logprob, right.logprob
        if expected is not None and actual is not None and distance(expected, actual) > tolerance.logprob:
            return TokenDifference("margin", index, left.step, "logprob", expected, actual)
    expected, actual = left.margin, right.margin
    if expected is not None and actual is not None and distance(expected, actual) > tolerance.margin:
        return TokenDifference("margin", index, left.step, "margin", expected, actual)
    return None


def _token(index: int, left: TokenRecord, right: TokenRecord) -> TokenDifference | None:
    if left.token == right.token:
        return None
    return TokenDifference("token", index, left.step, "token", left.token, right.token)


def _ended(index: int, left: TokenRecord | None, right: TokenRecord | None) -> TokenDifference:
    step = left.step if left is not None else (right.step if right is not None else None)
    expected = None if left is None else left.token
    actual = None if right is None else right.token
    return TokenDifference("token", index, step, "token", expected, actual)

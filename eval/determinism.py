"""Does the same request give the same output every time, by tokens and by bits, and how far apart are the others?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from eval.records import GenerationRecord, RequestRecord, TokenRecord, Tolerance
from eval.tokens import distance

Output = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Repeatability:
    """What N runs of one request came to.  The first run is the reference for all spans."""

    repeats: int
    unique_outputs: int
    """Different sequences of tokens; 1 is a deterministic request."""
    commonest: int
    """Runs that gave the most frequent output."""
    positions_compared: int
    """Positions of later runs at which bits were compared with the first run's."""
    positions_bit_equal: int
    runs_bit_equal: int
    """Later runs of which every position was compared and equal."""
    first_spans: tuple[int, ...]
    """For each later run: tokens before the first different one; the whole length where there is none."""
    second_spans: tuple[int, ...]
    """For each later run that parted: positions between its first and second different token."""
    steps_in_step: int
    """Positions of later runs whose tokens so far were all equal to the first run's."""
    flips_in_step: int
    """Those of them at which the token was then another: flips that no earlier flip caused."""
    tolerance: Tolerance
    """Largest distances among the runs at positions with equal history: what unchanged runs may differ by."""

    @property
    def deterministic(self) -> bool:
        """Say whether all outputs were equal."""
        return self.unique_outputs == 1

    @property
    def bit_equality(self) -> float | None:
        """Return the share of compared positions with equal bits; None where nothing could be compared."""
        return self.positions_bit_equal / self.positions_compared if self.positions_compared else None

    @property
    def flip_rate(self) -> float | None:
        """Return flips per step in step; None where no step was."""
        return self.flips_in_step / self.steps_in_step if self.steps_in_step else None


def repeatability(records: Sequence[RequestRecord]) -> Repeatability:
    """Compare repeated runs of one request.

    Raises:
        ValueError: fewer than two runs, which repeat nothing.
    """
    if len(records) < 2:
        raise ValueError(f"repeatability needs at least two runs of a request, got {len(records)}")
    outputs = Counter(output_of(record) for record in records)
    first, later = _flat(records[0]), [_flat(record) for record in records[1:]]
    compared = equal = whole = in_step = flips = 0
    first_spans: list[int] = []
    second_spans: list[int] = []
    for other in later:
        judged = [
            left.logits_digest == right.logits_digest
            for left, right in zip(first, other, strict=False)
            if left.logits_digest is not None and right.logits_digest is not None
        ]
        compared += len(judged)
        equal += sum(judged)
        whole += len(judged) == len(first) == len(other) and all(judged)
        shared, second = _spans(first, other)
        first_spans.append(shared)
        parted = shared < max(len(first), len(other))
        in_step += shared + parted
        flips += parted
        if parted:
            second_spans.append(second)
    return Repeatability(
        repeats=len(records),
        unique_outputs=len(outputs),
        commonest=max(outputs.values()),
        positions_compared=compared,
        positions_bit_equal=equal,
        runs_bit_equal=whole,
        first_spans=tuple(first_spans),
        second_spans=tuple(second_spans),
        steps_in_step=in_step,
        flips_in_step=flips,
        tolerance=tolerance_of(records),
    )


def tolerance_of(records: Sequence[RequestRecord]) -> Tolerance:
    """Measure how far unchanged runs part: an A/A test, over all pairs, as long as their tokens are equal."""
    logprob = margin = 0.0
    for left, right in combinations(records, 2):
        for one, other in _in_step(_flat(left), _flat(right)):
            if one.logits_digest is not None and one.logits_digest == other.logits_digest:
                continue
            if one.token == other.token and one.logprob is not None and other.logprob is not None:
                logprob = max(logprob, distance(one.logprob, other.logprob))
            if one.margin is not None and other.margin is not None:
                margin = max(margin, distance(one.margin, other.margin))
    return Tolerance(logprob, margin, f"A/A of {len(records)} runs")


def widest(tolerances: Sequence[Tolerance], *, source: str) -> Tolerance:
    """Return the tolerance that holds for all of several requests.

    Raises:
        ValueError: there is none to take the widest of.
    """
    if not tolerances:
        raise ValueError("no tolerance was measured")
    return Tolerance(max(item.logprob for item in tolerances), max(item.margin for item in tolerances), source)


def logprob_drift(original: GenerationRecord, replay: GenerationRecord) -> tuple[float | None, ...]:
    """Return, position by position, how far the log-probabilities of equal tokens part; None where not comparable.

    Meant for a replay with forced tokens: there every position has equal history.
    """
    return tuple(
        distance(left.logprob, right.logprob)
        if left.token == right.token and left.logprob is not None and right.logprob is not None
        else None
        for left, right in zip(original.tokens, replay.tokens, strict=False)
    )


def output_of(record: RequestRecord) -> Output:
    """Return the tokens of all generations."""
    return tuple(tuple(token.token for token in generation.tokens) for generation in record.generations)


def _flat(record: RequestRecord) -> list[TokenRecord]:
    return [token for generation in record.generations for token in generation.tokens]


def _spans(left: Sequence[TokenRecord], right: Sequence[TokenRecord]) -> tuple[int, int]:
    """Count tokens up to the first difference, and from there to the second."""
    both = min(len(left), len(right))
    different = [index for index in range(both) if left[index].token != right[index].token]
    first = different[0] if different else both
    if first == both:
        return first, 0
    return first, (different[1] if len(different) > 1 else both) - first - 1


def _in_step(left: Sequence[TokenRecord], right: Sequence[TokenRecord]) -> Iterator[tuple[TokenRecord, TokenRecord]]:
    """Yield positions with equal history, the first different token included."""
    for one, other in zip(left, right, strict=False):
        yield one, other
        if one.token != other.token:
            return

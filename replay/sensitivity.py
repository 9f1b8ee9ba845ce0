"""How likely does a request's output change when requests arrive a little earlier or later, and which arrival matters?

Schedules are sampled: every arrival moves by up to `jitter` steps either way, the scheduler (a pure function) plans
again from the lengths of all sequences, and the request is replayed from its slice of that plan.  A hundred samples
cost as many replays as they have distinct slices.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from eval.statistics import wilson
from replay.replanning import Replanner

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How often something happened, with Wilson's interval."""

    count: int
    samples: int
    low: float
    high: float
    confidence: float = CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How often the output changed under jittered arrivals.

    jitter     largest move of an arrival, in engine steps either way, uniform
    bits       samples in which some token's logits had other bits
    tokens     samples in which some token was another
    distinct   distinct slices among the samples
    faithful   whether the simulation without jitter gives the recorded slice; when not, the samples are schedules like
               the recorded one, and not neighbours of it
    """

    jitter: int
    seed: int
    bits: Rate
    tokens: Rate
    distinct: int
    faithful: bool


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One arrival moved by one step, and the first output tokens that change with it.

    sequence  whose arrival, by its index in the engine's plans
    by        steps: 1 later, -1 earlier
    bits      first output token with other bits, from 0; None when all are the same
    token     first output token that is another; None when all are the same
    """

    sequence: int
    by: int
    bits: int | None
    token: int | None


def measure(
    replanner: Replanner,
    *,
    jitter: int,
    samples: int,
    seed: int,
    on_sample: Callable[[int], None] = lambda count: None,
) -> Sensitivity:
    """Replay a sequence under `samples` jittered schedules and count how often its output changes.

    Raises SequenceRefused, PlanMissing and the executor's errors.
    """
    bits = tokens = 0
    seen: set[Hashable] = set()
    for sample in range(samples):
        draw = random.Random(f"{seed}:{sample}")
        moves = {one.index: draw.randint(-jitter, jitter) for one in replanner.moving}
        schedule = replanner.schedule(lambda one, moves=moves: moves[one.index])
        seen.add(replanner.shapes(schedule))
        first_bits, first_token = replanner.outcome(schedule)
        bits += first_bits is not None
        tokens += first_token is not None
        on_sample(sample + 1)
    return Sensitivity(
        jitter=jitter,
        seed=seed,
        bits=_rate(bits, samples),
        tokens=_rate(tokens, samples),
        distinct=len(seen),
        faithful=replanner.faithful,
    )


def shift_arrivals(replanner: Replanner, neighbours: set[int]) -> list[Shift]:
    """Move the sequence's own arrival, and that of each neighbour, one step earlier and one step later.

    neighbours: indices of the sequences that shared a call with it.
    """
    shifts: list[Shift] = []
    for index in sorted({replanner.index, *neighbours}):
        for by in (-1, 1):
            schedule = replanner.schedule(lambda one, index=index, by=by: by if one.index == index else 0)
            bits, token = replanner.outcome(schedule)
            shifts.append(Shift(sequence=index, by=by, bits=bits, token=token))
    return shifts


def _rate(count: int, samples: int) -> Rate:
    low, high = wilson(count, samples, confidence=CONFIDENCE)
    return Rate(count=count, samples=samples, low=low, high=high)

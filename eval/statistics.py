"""Is a measured difference real?  Paired bootstrap intervals, and "not resolved" as an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

Conclusion = Literal["higher", "lower", "not resolved"]
FEWEST_PAIRS = 6
"""Below this, even a difference of one sign in every pair is a 1-in-16 chance: no interval can resolve it at 95 %."""
_BLOCK = 1 << 21
"""Most resampled values held at once, so that long samples do not fill the memory."""


@dataclass(frozen=True)
class PairedComparison:
    """How one measure changed between two conditions, measured on the same units."""

    pairs: int
    before: float
    """The statistic of the first condition."""
    after: float
    difference: float
    """after - before."""
    low: float
    """Lower end of the interval of the difference."""
    high: float
    p: float
    """Chance of a difference this large if the two conditions could be swapped in every pair."""
    confidence: float

    @property
    def conclusion(self) -> Conclusion:
        """Say whether the second condition is higher or lower; not resolved where the interval touches 0, where
        chance alone explains the difference, or where there are too few pairs.
        """
        crosses = self.low <= 0.0 <= self.high
        if crosses or self.p > 1.0 - self.confidence or self.pairs < FEWEST_PAIRS:
            return "not resolved"
        return "higher" if self.difference > 0 else "lower"

    @property
    def resolved(self) -> bool:
        """Say whether there is a conclusion."""
        return self.conclusion != "not resolved"


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    seed: int,
    statistic: Callable[[Array], Array] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> PairedComparison:
    """Compare two conditions on the same units (requests, seeds, machines).

    The interval is the bias-corrected and accelerated bootstrap (Efron 1987) over pairs, as in scipy.stats.bootstrap,
    which takes seconds to import.  p comes from swapping the conditions within pairs at random.

    Args:
        before: one value per unit.
        after: the same units in the same order.
        seed: of the resampling; the same seed gives the same numbers.
        statistic: from ``[..., units]`` to ``[...]``; the mean by default.
        resamples: of the bootstrap, and of the swaps.

    Raises:
        ValueError: unequal lengths, fewer than two pairs, values that are not finite, or a senseless confidence.
    """
    import numpy as np

    left, right = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    _check(left, right, confidence, resamples)

    def mean(values: Array) -> Array:
        return values.mean(axis=-1)

    measure = mean if statistic is None else statistic

    def difference(rows: Any) -> Array:
        return measure(right[rows]) - measure(left[rows])

    generator = np.random.default_rng(seed)
    count = len(left)
    observed = float(difference(np.arange(count)))
    blocks = _blocks(resamples, count)
    drawn = np.concatenate([difference(generator.integers(0, count, (size, count))) for size in blocks])
    low, high = _accelerated_interval(drawn, observed, _jackknife(difference, count), confidence)
    extreme = 0
    for size in blocks:
        swap = generator.random((size, count)) < 0.5
        gap = measure(np.where(swap, left, right)) - measure(np.where(swap, right, left))
        # equal gaps summed in another order differ in the last bits, and count as equally extreme
        extreme += int(np.count_nonzero(np.abs(gap) >= abs(observed) - 1e-9 * max(abs(observed), 1e-300)))
    return PairedComparison(
        pairs=count,
        before=float(measure(left)),
        after=float(measure(right)),
        difference=observed,
        low=low,
        high=high,
        p=(extreme + 1) / (resamples + 1),
        confidence=confidence,
    )


def quantile_statistic(share: float) -> Callable[[Array], Array]:
    """Return a statistic for ``paired_bootstrap``: the given quantile (0.95 for p95), linear between neighbours."""

    def measure(values: Array) -> Array:
        import numpy as np

        return np.quantile(values, share, axis=-1)

    return measure


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a rate (1927); it stays inside 0 to 1 and is honest for 0 and all successes.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials is no rate")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"the confidence must lie between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / scale
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, linear between neighbours.

    Raises:
        ValueError: no values (there is no silent zero), or a share outside 0 to 1.
    """
    if not values:
        raise ValueError("no values have no quantile")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a quantile's share lies between 0 and 1, got {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))


def _check(left: Array, right: Array, confidence: float, resamples: int) -> None:
    import numpy as np

    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(f"pairs need two equally long lists, got shapes {left.shape} and {right.shape}")
    if len(left) < 2:
        raise ValueError(f"a paired comparison needs at least 2 pairs, got {len(left)}")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("the values must be finite: leave a unit out of both conditions, or measure it again")
    if not 0.0 < confidence < 1.0 or resamples < 100:
        raise ValueError(f"confidence {confidence} must lie between 0 and 1, resamples {resamples} be 100 or more")


def _blocks(resamples: int, count: int) -> list[int]:
    size = max(1, min(resamples, _BLOCK // count))
    whole, rest = divmod(resamples, size)
    return [size] * whole + ([rest] if rest else [])


def _jackknife(difference: Callable[[Any], Array], count: int) -> Array:
    """Compute the difference with each pair left out in turn."""
    import numpy as np

    rows = np.arange(count)
    return np.array([float(difference(np.delete(rows, index))) for index in range(count)])


def _accelerated_interval(drawn: Array, observed: float, left_out: Array, confidence: float) -> tuple[float, float]:
    """Correct the percentile interval for bias and for a spread that depends on the value."""
    import numpy as np

    normal = NormalDist()
    below = float(np.mean(drawn < observed) + np.mean(drawn == observed) / 2)
    if not 0.0 < below < 1.0:  # all resamples on one side: nothing to correct with
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)
    bias = normal.inv_cdf(below)
    spread = left_out.mean() - left_out
    cubed, squared = float((spread**3).sum()), float((spread**2).sum())
    acceleration = cubed / (6 * squared**1.5) if squared > 0 else 0.0
    ends: list[float] = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(drawn, ends)
    return float(low), float(high)

"""How fast did tokens come?  First token, gaps and rate of one generation, and how many requests kept an objective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class TokenLatency:
    """How a request's tokens arrived, in microseconds from its scheduled arrival."""

    first_us: int
    """TTFT: from scheduled arrival to the first token, so a late client cannot hide queueing (LoadGen)."""
    end_us: int
    """End to end: to the last token."""
    gaps_us: tuple[int, ...]
    """ITL: between neighbouring tokens of one generation."""
    lag_us: int | None = None
    """From scheduled arrival until the client really sent it; None where that was not noted."""

    @property
    def first_from_send_us(self) -> int | None:
        """TTFT as the clients of vLLM and SGLang count it: from sending; None where sending was not noted."""
        return None if self.lag_us is None else self.first_us - self.lag_us

    @property
    def per_token_us(self) -> float | None:
        """TPOT: (last - first) / (tokens - 1); None for single tokens, which have no rate (vLLM, LoadGen)."""
        return sum(self.gaps_us) / len(self.gaps_us) if self.gaps_us else None


def token_latency(scheduled_us: int, emitted_us: Sequence[int], *, sent_us: int | None = None) -> TokenLatency | None:
    """Measure a generation from the times at which its tokens were emitted; None where there were none.

    sent_us: when the client sent it, which may be later than scheduled and then counts against the server all the same.

    Raises:
        ValueError: times that run backwards.
    """
    if not emitted_us:
        return None
    times = (scheduled_us, *(() if sent_us is None else (sent_us,)), *emitted_us)
    if any(later < earlier for earlier, later in pairwise(times)):
        raise ValueError("tokens were emitted before the arrival or before each other; are these times of one clock?")
    gaps = tuple(later - earlier for earlier, later in pairwise(emitted_us))
    lag = None if sent_us is None else sent_us - scheduled_us
    return TokenLatency(emitted_us[0] - scheduled_us, emitted_us[-1] - scheduled_us, gaps, lag)


def streamed_latency(
    scheduled_us: int, generations: Sequence[Sequence[tuple[int, int]]], *, sent_us: int | None = None
) -> TokenLatency | None:
    """Measure a request from the chunks of its generations; None where there were none.

    The wait between two generations (a tool, the next prefill) counts to the end, but is no gap between tokens.

    Args:
        scheduled_us: when it was to arrive.
        generations: one after another, for each chunk when it came and how many tokens it carried.
        sent_us: when the client sent it.

    Raises:
        ValueError: a chunk without tokens, or times that run backwards.
    """
    if any(count < 1 for chunks in generations for _, count in chunks):
        raise ValueError("a chunk without tokens says nothing about tokens")
    times = [[at for at, count in chunks for _ in range(count)] for chunks in generations]
    whole = token_latency(scheduled_us, [at for one in times for at in one], sent_us=sent_us)
    if whole is None:
        return None
    return replace(whole, gaps_us=tuple(later - earlier for one in times for earlier, later in pairwise(one)))


def chunk_gaps(chunks: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Return the ITL of a stream whose chunks carry several tokens: each gap divided by the tokens that ended it.

    Args:
        chunks: when each chunk came, and how many tokens it carried; the first one ends no gap.

    Raises:
        ValueError: a chunk without tokens, or times that run backwards.
    """
    if any(count < 1 for _, count in chunks):
        raise ValueError("a chunk without tokens ends no gap between tokens")
    if any(later[0] < earlier[0] for earlier, later in pairwise(chunks)):
        raise ValueError("a chunk came before the one before it; are these times of one clock?")
    return tuple((later - earlier) / count for (earlier, _), (later, count) in pairwise(chunks))


@dataclass(frozen=True)
class Objective:
    """What a request must keep to be good; None asks nothing."""

    first_us: int | None = None
    per_token_us: float | None = None
    end_us: int | None = None

    def met_by(self, latency: TokenLatency | None) -> bool:
        """Say whether all limits were kept; a request without tokens keeps none, one token has no rate to break."""
        if latency is None:
            return False
        rate = latency.per_token_us
        return (
            (self.first_us is None or latency.first_us <= self.first_us)
            and (self.per_token_us is None or rate is None or rate <= self.per_token_us)
            and (self.end_us is None or latency.end_us <= self.end_us)
        )


def attainment(latencies: Iterable[TokenLatency | None], objective: Objective) -> tuple[int, int]:
    """Count good requests and all sent ones; a request that failed (None) was sent, and is not good."""
    kept = [objective.met_by(latency) for latency in latencies]
    return sum(kept), len(kept)


def goodput(latencies: Iterable[TokenLatency | None], objective: Objective, *, duration_us: int) -> float | None:
    """Return good requests per second (vLLM's goodput); None over no time, which has no rate.

    Raises:
        ValueError: a negative duration.
    """
    if duration_us < 0:
        raise ValueError(f"{duration_us} us is no duration")
    good, _ = attainment(latencies, objective)
    return good * 1_000_000 / duration_us if duration_us else None

"""What came of a recorded run, in a few numbers?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from eval.engine_time import add_up, engine_time
from eval.token_latency import Objective, attainment, chunk_gaps, goodput, streamed_latency
from experiments.recording import Recording

if TYPE_CHECKING:
    from eval.token_latency import TokenLatency
    from experiments.arrivals import Sent
    from experiments.recording import Answered
    from traces.envelope import TraceEvent

SHARES = (50, 95, 99)
"""Which percentiles are told."""


def summarize(
    recording: Recording, events: Sequence[TraceEvent], *, objective: Objective | None = None
) -> dict[str, Any]:
    """Return the summary as a JSON document.

    Times are microseconds; a percentile is None where nothing could be measured.  By the definitions of serving
    benchmarks, as the client saw it:

    first_token_us            TTFT from the scheduled arrival, so that a late client hides no queue (LoadGen)
    first_token_from_send_us  TTFT from sending (vLLM, SGLang)
    per_output_token_us       TPOT of each generation: (last - first) / (tokens - 1), none for a single token
    inter_token_us            ITL: gaps between chunks of a generation, each divided by the tokens that ended it
    chunk_gap_us              the same gaps, whole
    end_to_end_us             from the scheduled arrival to the last token
    send_lag_us               how much later than scheduled the load generator sent

    Args:
        recording: what was sent and answered.
        events: the run's `engine.sequence` and `engine.step` events.
        objective: what a good request keeps; without one there is no goodput.
    """
    outcomes = [sent.answer.outcome for sent in recording.sent if sent.answer is not None]
    failures = Counter(str(outcome.failure["failure_class"]) for outcome in outcomes if outcome.failure is not None)
    failures.update("not_classified" for sent in recording.sent if sent.error is not None)
    ends = [
        event for event in events if event.event_type == "engine.sequence" and event.payload.get("phase") == "finished"
    ]
    steps = [event for event in events if event.event_type == "engine.step"]
    return {
        "run": recording.run_id,
        "stopped": recording.stopped,
        "requests": len(recording.sent),
        "ok": sum(outcome.status == "ok" for outcome in outcomes),
        "statuses": dict(Counter(outcome.status for outcome in outcomes)),
        "failures": dict(failures),
        "wall_us": recording.wall_us,
        "goodput": None if objective is None else _goodput(recording, objective),
        "send_lag_us": quantiles([sent.lag_us for sent in recording.sent]),
        **_token_times(recording),
        "prompt_tokens": sum(event.input_tokens or 0 for event in ends),
        "cached_tokens": sum(event.kv_hit_tokens or 0 for event in ends),
        "output_tokens": sum(event.output_tokens or 0 for event in ends),
        "generations": len(ends),
        "engine_time_us": _engine_time(ends),
        "engine_steps": len(steps),
        "largest_batch": max((event.batch_size or 0 for event in steps), default=None),
        "events_dropped": recording.dropped,
    }


def _latency(sent: Sent[Answered]) -> TokenLatency | None:
    """Measure a request from its scheduled arrival, which is time 0; None without a token."""
    if sent.answer is None:
        return None
    shifted = [[(sent.lag_us + at, count) for at, count in chunks] for chunks in sent.answer.generations]
    return streamed_latency(0, shifted, sent_us=sent.lag_us)


def _token_times(recording: Recording) -> dict[str, dict[str, int | None]]:
    """Return the percentiles of all that is measured in tokens."""
    requests = [one for one in map(_latency, recording.sent) if one is not None]
    streams = [chunks for sent in recording.sent if sent.answer is not None for chunks in sent.answer.generations]
    generations = [one for one in (streamed_latency(0, [chunks]) for chunks in streams) if one is not None]
    rates = [one.per_token_us for one in generations]
    sent_from = [one.first_from_send_us for one in requests]
    return {
        "first_token_us": quantiles([one.first_us for one in requests]),
        "first_token_from_send_us": quantiles([us for us in sent_from if us is not None]),
        "per_output_token_us": quantiles([us for us in rates if us is not None]),
        "inter_token_us": quantiles([gap for chunks in streams for gap in chunk_gaps(chunks)]),
        "chunk_gap_us": quantiles([right[0] - left[0] for chunks in streams for left, right in pairwise(chunks)]),
        "end_to_end_us": quantiles([one.end_us for one in requests]),
    }


def _goodput(recording: Recording, objective: Objective) -> dict[str, Any]:
    """Return good requests per second of the run's wall time; one that did not end well is sent, and never good."""
    judged = [
        _latency(sent) if sent.answer is not None and sent.answer.outcome.status == "ok" else None
        for sent in recording.sent
    ]
    good, sent = attainment(judged, objective)
    return {
        "objective_us": {"TTFT": objective.first_us, "TPOT": objective.per_token_us, "E2E": objective.end_us},
        "good": good,
        "sent": sent,
        "attainment": good / sent if sent else None,
        "requests_per_second": goodput(judged, objective, duration_us=recording.wall_us),
    }


def _engine_time(ends: Sequence[TraceEvent]) -> dict[str, int] | None:
    """Return owner to microseconds over all generations that were measured; None where none was."""
    total, _ = add_up(engine_time(event.payload.get("latency"), total_us=event.duration_us) for event in ends)
    return None if total is None else {name.removesuffix("_us"): us for name, us in asdict(total).items()}


def quantiles(values: Sequence[float]) -> dict[str, int | None]:
    """Return the told percentiles by nearest rank, in whole microseconds; None for no values."""
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[math.ceil(share / 100 * len(ordered)) - 1]) if ordered else None for share in SHARES
    }

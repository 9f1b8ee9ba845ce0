"""What came of a recorded run, in a few numbers?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from eval.engine_time import add_up, engine_time
from experiments.recording import Recording

if TYPE_CHECKING:
    from traces.envelope import TraceEvent


def summarize(recording: Recording, events: Sequence[TraceEvent]) -> dict[str, Any]:
    """Return the summary as a JSON document.

    Times are microseconds.  Time to first token counts from the moment the request was sent; time per output token is
    the decode time of a generation over its tokens after the first (serving benchmarks' definition); both are None
    where nothing could be measured.

    Args:
        recording: what was sent and answered.
        events: the run's `engine.sequence` and `engine.step` events.
    """
    outcomes = [sent.answer.outcome for sent in recording.sent if sent.answer is not None]
    failures = Counter(str(outcome.failure["failure_class"]) for outcome in outcomes if outcome.failure is not None)
    failures.update("not_classified" for sent in recording.sent if sent.error is not None)
    ends = [
        event for event in events if event.event_type == "engine.sequence" and event.payload.get("phase") == "finished"
    ]
    steps = [event for event in events if event.event_type == "engine.step"]
    first = [sent.answer.first_token_us for sent in recording.sent if sent.answer is not None]
    return {
        "run": recording.run_id,
        "stopped": recording.stopped,
        "requests": len(recording.sent),
        "ok": sum(outcome.status == "ok" for outcome in outcomes),
        "statuses": dict(Counter(outcome.status for outcome in outcomes)),
        "failures": dict(failures),
        "wall_us": recording.wall_us,
        "send_lag_us": quantiles([sent.lag_us for sent in recording.sent]),
        "first_token_us": quantiles([us for us in first if us is not None]),
        "per_output_token_us": quantiles(_per_token(ends)),
        "prompt_tokens": sum(event.input_tokens or 0 for event in ends),
        "cached_tokens": sum(event.kv_hit_tokens or 0 for event in ends),
        "output_tokens": sum(event.output_tokens or 0 for event in ends),
        "generations": len(ends),
        "engine_time_us": _engine_time(ends),
        "engine_steps": len(steps),
        "largest_batch": max((event.batch_size or 0 for event in steps), default=None),
        "events_dropped": recording.dropped,
    }


def _engine_time(ends: Sequence[TraceEvent]) -> dict[str, int] | None:
    """Return owner to microseconds over all generations that were measured; None where none was."""
    total, _ = add_up(engine_time(event.payload.get("latency"), total_us=event.duration_us) for event in ends)
    return None if total is None else {name.removesuffix("_us"): us for name, us in asdict(total).items()}


def quantiles(values: Sequence[int]) -> dict[str, int | None]:
    """Return the 50th and 95th percentile by nearest rank; None for no values."""
    ordered = sorted(values)
    return {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] if ordered else None for share in (50, 95)}


def _per_token(ends: Sequence[TraceEvent]) -> list[int]:
    return [
        int(event.payload["decode_us"]) // (event.output_tokens - 1)
        for event in ends
        if event.output_tokens is not None and event.output_tokens > 1
    ]

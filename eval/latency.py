"""Where did the time of a request go?  Inclusive, exclusive and critical time of each span, in integer microseconds.

Spans overlap, so their durations sum to more than the end-to-end time.  Critical time does not: at every instant the
latest-started active span owns the time (it is what is being waited for), instants that no span covers have an owner
of their own, and so the parts sum to the whole exactly.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from eval.records import SpanRecord

UNCOVERED = "uncovered"
"""Owner of the time that no span covers."""


@dataclass(frozen=True)
class SpanTime:
    """What one span took of a request's time, in microseconds."""

    span: SpanRecord
    inclusive_us: int
    """From its start to its end, inside the request."""
    exclusive_us: int
    """While nothing else ran but spans that it is nested in."""
    critical_us: int
    """While it was the latest-started active span."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the critical path."""

    start_us: int
    end_us: int
    owner: int | None
    """Index of the span; None where no span covers the time."""


@dataclass(frozen=True)
class Decomposition:
    """The whole time of a request, taken apart."""

    start_us: int
    end_us: int
    spans: tuple[SpanTime, ...]
    """In the order in which they were given."""
    uncovered_us: int
    path: tuple[Segment, ...]
    """From start to end without gap or overlap."""

    @property
    def total_us(self) -> int:
        """Return the end-to-end time."""
        return self.end_us - self.start_us

    def by_stage(self) -> dict[str, int]:
        """Sum critical time by stage (by name where a span has none); uncovered time under its own name.

        The values sum to ``total_us``.
        """
        parts: defaultdict[str, int] = defaultdict(int)
        for item in self.spans:
            parts[item.span.stage or item.span.name] += item.critical_us
        if self.uncovered_us:
            parts[UNCOVERED] += self.uncovered_us
        return dict(parts)


def decompose(spans: Sequence[SpanRecord], *, start_us: int | None = None, end_us: int | None = None) -> Decomposition:
    """Take the time of a request apart.

    Args:
        spans: in any order.
        start_us: start of the request; by default the first start.  Spans are cut to the request.
        end_us: end of the request; by default the last end.

    Raises:
        ValueError: no spans and no bounds, or an end before the start.
    """
    if not spans and (start_us is None or end_us is None):
        raise ValueError("there is no span, so the request has no time to take apart; give start_us and end_us")
    begin = min(span.start_us for span in spans) if start_us is None else start_us
    finish = max(span.end_us for span in spans) if end_us is None else end_us
    if finish < begin:
        raise ValueError(f"the request ends at {finish}, before it starts at {begin}")
    cut = [(min(max(span.start_us, begin), finish), max(min(span.end_us, finish), begin)) for span in spans]
    path = _critical_path(spans, cut, begin, finish)
    critical: defaultdict[int | None, int] = defaultdict(int)
    for segment in path:
        critical[segment.owner] += segment.end_us - segment.start_us
    exclusive = _exclusive(spans, cut)
    times = tuple(
        SpanTime(span, end - start, exclusive[index], critical[index])
        for index, (span, (start, end)) in enumerate(zip(spans, cut, strict=True))
    )
    return Decomposition(begin, finish, times, critical[None], path)


def _critical_path(
    spans: Sequence[SpanRecord], cut: Sequence[tuple[int, int]], begin: int, finish: int
) -> tuple[Segment, ...]:
    """Sweep over the starts and ends; a heap holds the active spans, latest start on top.

    Spans that start together: the one nested deeper owns, then the one that ends first, then the one given later.
    """
    depths = _depths(spans)
    starts = sorted((start, index) for index, (start, end) in enumerate(cut) if end > start)
    points = sorted({begin, finish, *(time for start, end in cut if end > start for time in (start, end))})
    active: list[tuple[int, int, int, int]] = []
    segments: list[Segment] = []
    waiting = iter([*starts, (finish + 1, -1)])
    upcoming = next(waiting)
    for left, right in pairwise(points):
        while upcoming[0] <= left:
            index = upcoming[1]
            # by the true start: a span cut at the request's start still began before it
            heapq.heappush(active, (-spans[index].start_us, -depths[index], cut[index][1], -index))
            upcoming = next(waiting)
        while active and active[0][2] <= left:
            heapq.heappop(active)
        owner = -active[0][3] if active else None
        if segments and segments[-1].owner == owner:
            segments[-1] = Segment(segments[-1].start_us, right, owner)
        else:
            segments.append(Segment(left, right, owner))
    return tuple(segments)


def _exclusive(spans: Sequence[SpanRecord], cut: Sequence[tuple[int, int]]) -> list[int]:
    """Measure, for each span, the time in which every active span is itself or one that it is nested in."""
    ancestors = _ancestors(spans)
    changes: defaultdict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, (start, end) in enumerate(cut):
        if end > start:
            changes[start][0].append(index)
            changes[end][1].append(index)
    times = [0] * len(spans)
    active: set[int] = set()
    points = sorted(changes)
    for left, right in pairwise(points):
        begun, ended = changes[left]
        active.difference_update(ended)
        active.update(begun)
        # only the innermost can be alone with its ancestors
        inner = max(active, key=lambda index: len(ancestors[index]), default=None)
        if inner is not None and len(active) <= len(ancestors[inner]) + 1 and active <= ancestors[inner] | {inner}:
            times[inner] += right - left
    return times


def _ancestors(spans: Sequence[SpanRecord]) -> list[frozenset[int]]:
    """Find the spans that each one is nested in; a circle of parents ends where it closes."""
    by_id = {span.span_id: index for index, span in enumerate(spans) if span.span_id is not None}
    found: list[frozenset[int]] = []
    for index, span in enumerate(spans):
        above: set[int] = set()
        parent = by_id.get(span.parent_span_id) if span.parent_span_id is not None else None
        while parent is not None and parent != index and parent not in above:
            above.add(parent)
            upper = spans[parent].parent_span_id
            parent = by_id.get(upper) if upper is not None else None
        found.append(frozenset(above))
    return found


def _depths(spans: Sequence[SpanRecord]) -> list[int]:
    return [len(above) for above in _ancestors(spans)]


def compare_stages(original: Decomposition, replay: Decomposition) -> Mapping[str, tuple[int, int]]:
    """Put critical time by stage side by side: original, replay; the differences sum to the whole difference."""
    left, right = original.by_stage(), replay.by_stage()
    return {name: (left.get(name, 0), right.get(name, 0)) for name in dict.fromkeys((*left, *right))}

"""In which shapes did one sequence's slice run?  Everything that reaches its bits, in a form that can be compared.

Equal shapes of two slices of one request mean equal bits, whatever stood in the other rows and wherever blocks lay.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from runtime.engine.slicing import Life, PlacedRow, Schedule


def slice_shapes(schedule: Schedule, sequence_id: str, *, tokens: int) -> Hashable:
    """Return the shapes of a sequence's rows up to its `tokens`-th output token, and of its shared blocks' lineage.

    Raises PlanMissing when the schedule does not know the slice whole.
    """
    lives = schedule.lives_of(sequence_id)
    labels: dict[tuple[int, int], int] = {}
    found: list[Hashable] = []
    left = tokens
    for life in lives:
        if left <= 0:
            break
        needs = schedule.needs(life, own=life.sequence)
        rows: list[PlacedRow] = []
        for placed in life.rows:
            if left <= 0:
                break
            rows.append(placed)
            left -= placed.row.sample
        sources = [
            (_label(labels, source), upto, _hits(schedule, labels, source), _rows(_before(source, upto)))
            for source, upto in needs.values()
            if source.sequence != life.sequence
        ]
        found.append((_label(labels, life), _hits(schedule, labels, life), _rows(rows), tuple(sources)))
    return tuple(found)


def _before(life: Life, upto: int) -> Iterable[PlacedRow]:
    """Return the rows of a life that computed its first `upto` tokens."""
    return (placed for placed in life.rows if placed.row.start < upto)


def _rows(rows: Iterable[PlacedRow]) -> tuple[Hashable, ...]:
    return tuple(
        (
            placed.call.graph,
            placed.call.batch,
            placed.call.tokens,
            placed.call.context,
            placed.position,
            placed.row.start,
            placed.row.count,
            placed.row.sample,
        )
        for placed in rows
    )


def _hits(schedule: Schedule, labels: dict[tuple[int, int], int], life: Life) -> tuple[Hashable, ...]:
    """Return whose blocks a life read, each life by a number of its own."""
    return tuple(_label(labels, schedule.source_of(hit)) for hit in life.hits)


def _label(labels: dict[tuple[int, int], int], life: Life) -> int:
    return labels.setdefault(life.key, len(labels))

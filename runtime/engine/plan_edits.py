"""Which plans lie between a recorded schedule and that of an idle engine, one edit apart from one to the next?

The rows of one sequence are a plan that can be edited: a neighbour's row leaves its call, a chunk of the prompt ends
somewhere else, a prefix hit or a preemption is undone.  What an edit touches is padded anew by the settings' own
rules; what it does not touch keeps its recorded shape.  `edit_path` lists the edits, earliest step first, that turn the
recorded plan into the one an idle engine would have made; two neighbours on that path differ in exactly one edit.

Row content is no part of a plan: a neighbour is its index, where its tokens start and how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from runtime.engine.plan import DECODE, PREFILL, Call, Hit, Row
from runtime.engine.settings import Settings
from runtime.engine.slicing import Life, PlacedRow, Schedule

EditKind = Literal["neighbour", "chunk_boundary", "prefix_hit", "preemption"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything of a call that can reach the bits of one of its rows, and how many real rows it has."""

    graph: str
    batch: int
    tokens: int
    context: int
    position: int
    start: int
    count: int
    rows: int
    """Real rows; not part of what reaches the bits."""

    @property
    def reaching(self) -> tuple[str | int, ...]:
        """The shape without what cannot reach the bits."""
        return (
            self.graph,
            self.batch,
            self.tokens,
            self.context,
            self.position,
            self.start,
            self.count,
        )


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit of a plan.

    kind      neighbour, chunk_boundary, prefix_hit or preemption
    step      recorded engine step that it touches first
    seat      number of the own row it touches first
    sequence  neighbour: whose row leaves the call
    end       chunk_boundary: where the chunk ends from now on, a position in the sequence
    """

    kind: EditKind
    step: int
    seat: int
    sequence: int | None = None
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """An edit that was made, with the shape of the own row before and after it; None where whole rows came or went."""

    edit: Edit
    before: Shape | None = None
    after: Shape | None = None

    @property
    def reaches_bits(self) -> bool:
        """Whether anything changed that can reach the sequence's bits."""
        return self.before is None or self.after is None or self.before.reaching != self.after.reaching


@dataclass(slots=True)
class Seat:
    """One own row of a plan; `recorded` is None for a row that an edit brought in, which has no company."""

    number: int
    step: int
    start: int
    count: int
    sample: bool
    recorded: PlacedRow | None

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.count


@dataclass(slots=True)
class EditedLife:
    """One admission of the sequence in a plan; hits are those that are not undone."""

    number: int
    step: int
    known: int
    hits: list[Hit]
    seats: list[Seat] = field(default_factory=list[Seat])


class EditedPlan:
    """The rows of one sequence, as recorded until they are edited.

    tokens: how many output tokens are wanted; rows past the one that gives the last of them are left out.
    Raises PlanMissing when the schedule does not know the sequence whole.
    """

    def __init__(self, schedule: Schedule, sequence_id: str, settings: Settings, *, tokens: int) -> None:
        self.settings = settings
        self.schedule = schedule
        self.gone: set[tuple[int, int]] = set()
        """(step, sequence) of rows that were taken out."""
        recorded = schedule.lives_of(sequence_id)
        self.index = recorded[0].sequence if recorded else 0
        self.prompt = recorded[0].known if recorded else 0
        self.lives = _lives(recorded, tokens)
        self._numbers = sum(len(life.seats) for life in self.lives)

    @property
    def seats(self) -> Iterator[Seat]:
        """All own rows in order."""
        return (seat for life in self.lives for seat in life.seats)

    def find(self, number: int) -> Seat | None:
        """Return the own row with this number, unless an edit merged it away."""
        return next((seat for seat in self.seats if seat.number == number), None)

    def company(self, seat: Seat) -> list[Row]:
        """Return the rows of others that share the call of an own row, in the order of the plan."""
        call, _ = self._call_of(seat)
        if call is None:
            return []
        return [row for row in call.rows if row.sequence != self.index and (seat.step, row.sequence) not in self.gone]

    def shape(self, seat: Seat) -> Shape:
        """Return the shape that an own row runs in: as recorded, or padded anew where an edit touched its call."""
        call, position = self._call_of(seat)
        others = self.company(seat)
        rows = len(others) + 1
        if call is not None and _untouched(seat, call, rows):
            return Shape(call.graph, call.batch, call.tokens, call.context, position, seat.start, seat.count, rows)
        before = [] if call is None else [row.sequence for row in call.rows][:position]
        width = self.settings.pad_tokens(seat.count)
        return Shape(
            DECODE if width == 1 else PREFILL,
            self.settings.pad_batch(rows),
            width,
            self.settings.pad_context(max([seat.start, *(row.start for row in others)])),
            sum(row.sequence in before for row in others),
            seat.start,
            seat.count,
            rows,
        )

    def signature(self) -> tuple[object, ...]:
        """Return all that reaches the bits of this sequence: equal signatures give equal bits."""
        return tuple(
            (
                life.number,
                len(life.hits),
                tuple((*self.shape(seat).reaching, seat.sample) for seat in life.seats),
            )
            for life in self.lives
        )

    def as_schedule(self) -> Schedule:
        """Return the recorded schedule with this plan in the place of the sequence's own rows."""
        lives = [
            Life(self.index, life.number, life.step, life.known, life.hits, [self._placed(seat) for seat in life.seats])
            for life in self.lives
        ]
        return self.schedule.with_lives(self.index, lives)

    def apply(self, edit: Edit) -> None:
        """Make one edit; edits of a path are made in its order."""
        if edit.kind == "neighbour":
            if edit.sequence is not None:
                self.gone.add((edit.step, edit.sequence))
        elif edit.kind == "chunk_boundary":
            if edit.end is not None:
                self._move_boundary(edit.seat, edit.end)
        elif edit.kind == "prefix_hit":
            self._undo_hits()
        else:
            self._undo_preemption()

    def _call_of(self, seat: Seat) -> tuple[Call | None, int]:
        """Return the recorded call that an own row of this length belongs to, and its place among that call's rows."""
        if seat.recorded is None:
            return None, 0
        width = self.settings.pad_tokens(seat.count)
        recorded = seat.recorded.call
        if recorded.tokens == width or seat.count == seat.recorded.row.count:
            return recorded, seat.recorded.position
        plan = self.schedule.plan(seat.step)
        joined = next((call for call in plan.calls if call.tokens == width), None) if plan else None
        return joined, 0 if joined is None else len(joined.sequences)

    def _placed(self, seat: Seat) -> PlacedRow:
        shape = self.shape(seat)
        call = Call(shape.graph, shape.batch, shape.tokens, shape.context, [self.index], [seat.start], [seat.count])
        row = Row(self.index, seat.start, seat.count, seat.sample)
        return PlacedRow(seat.step, 0, shape.position, call, row)

    def _extra(self, start: int, end: int, *, step: int) -> list[Seat]:
        """Return own rows for tokens that were read from the cache: chunks of an idle engine."""
        seats: list[Seat] = []
        while start < end:
            count = min(end - start, self.settings.longest_chunk)
            seats.append(Seat(self._numbers, step, start, count, False, None))
            self._numbers += 1
            start += count
        return seats

    def _move_boundary(self, number: int, end: int) -> None:
        """Let one chunk end at `end`; the chunks after it begin later, and those that are left empty go."""
        life = next(life for life in self.lives if any(seat.number == number for seat in life.seats))
        place = next(place for place, seat in enumerate(life.seats) if seat.number == number)
        chunk, rest = life.seats[place], life.seats[place + 1 :]
        while rest and rest[0].end <= end:
            chunk.sample = chunk.sample or rest[0].sample
            del rest[0]
        if rest:
            rest[0].count = rest[0].end - end
            rest[0].start = end
        chunk.count = end - chunk.start
        life.seats[place + 1 :] = rest

    def _undo_hits(self) -> None:
        """Let the first chunk begin at the first token, as without a cache; what it cannot hold comes before it."""
        first = self.lives[0]
        first.hits = []
        if first.seats:
            chunk, longest = first.seats[0], self.settings.longest_chunk
            late = max(0, -(-chunk.end // longest) - 1) * longest
            chunk.count, chunk.start = chunk.end - late, late
            first.seats[:0] = self._extra(0, late, step=first.step)

    def _undo_preemption(self) -> None:
        """Let the first life go on where the second began: only what was not computed before is computed."""
        first, second = self.lives[0], self.lives.pop(1)
        computed = first.seats[-1].end if first.seats else len(first.hits) * self.settings.block_size
        cached = len(second.hits) * self.settings.block_size
        first.seats += self._extra(computed, cached, step=second.step)
        for seat in second.seats:
            if seat.end > computed:
                late = max(seat.start, computed)
                seat.count, seat.start = seat.end - late, late
                first.seats.append(seat)


def edit_path(plan: EditedPlan) -> Iterator[Change]:
    """Edit a plan into what an idle engine would have planned, yielding each change after it was made.

    Neighbours leave a call in the opposite order of their arrival, so that the one that is named is the one whose
    coming made the difference.
    """
    if plan.lives and plan.lives[0].hits:
        edit = Edit("prefix_hit", plan.lives[0].step, _first_number(plan.lives[0].seats))
        plan.apply(edit)
        yield Change(edit)
    place = 0
    while plan.lives:
        seats = plan.lives[0].seats
        while place < len(seats):
            yield from _settle(plan, seats, place)
            place += 1
        if len(plan.lives) == 1:
            return
        # chunks that ended where the sequence lost its blocks may now reach on into what the next life computes
        place = next((at for at, seat in enumerate(seats) if seat.end < _target(plan, seat)), len(seats))
        second = plan.lives[1]
        edit = Edit("preemption", second.step, _first_number(second.seats))
        plan.apply(edit)
        yield Change(edit)


def _settle(plan: EditedPlan, seats: Sequence[Seat], place: int) -> Iterator[Change]:
    """Bring one own row to where an idle engine would have it."""
    seat = seats[place]
    target = _target(plan, seat)
    if seat.end < target <= seats[-1].end:
        yield _changed(plan, seat, Edit("chunk_boundary", seat.step, seat.number, end=target))
    for row in sorted(plan.company(seat), key=lambda row: -row.sequence):
        yield _changed(plan, seat, Edit("neighbour", seat.step, seat.number, sequence=row.sequence))


def _target(plan: EditedPlan, seat: Seat) -> int:
    """Return where an idle engine would end this chunk of the prompt."""
    return min(seat.start + plan.settings.longest_chunk, plan.prompt)


def _changed(plan: EditedPlan, seat: Seat, edit: Edit) -> Change:
    before = plan.shape(seat)
    plan.apply(edit)
    return Change(edit, before, plan.shape(seat))


def _first_number(seats: Sequence[Seat]) -> int:
    return seats[0].number if seats else 0


def _lives(recorded: Sequence[Life], tokens: int) -> list[EditedLife]:
    """Copy recorded lives as far as `tokens` output tokens need them."""
    lives: list[EditedLife] = []
    number = left = 0
    left = tokens
    for life in recorded:
        if left <= 0:
            break
        edited = EditedLife(life.number, life.step, life.known, list(life.hits))
        for placed in life.rows:
            if left <= 0:
                break
            row = placed.row
            edited.seats.append(Seat(number, placed.step, row.start, row.count, row.sample, placed))
            number += 1
            left -= row.sample
        lives.append(edited)
    return lives


def _untouched(seat: Seat, call: Call, rows: int) -> bool:
    """Tell whether a call is as recorded: nobody left it, nobody joined it, and the own row is the same."""
    recorded = seat.recorded
    return (
        recorded is not None
        and recorded.call is call
        and rows == len(call.sequences)
        and (seat.start, seat.count) == (recorded.row.start, recorded.row.count)
    )

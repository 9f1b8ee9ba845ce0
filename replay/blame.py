"""Which neighbour, arrival or chunk boundary changed a request's bits or tokens?  Two plans one edit apart.

The path of edits from the recorded plan to that of an idle engine (`runtime/engine/plan_edits.py`) begins where the
output is as recorded and ends where it is not.  Whatever lies between, somewhere on it two plans stand side by side of
which the first gives the recorded output and the second does not: a binary search keeps one such end at either side,
and needs no monotony for that.  Both ends are then run once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from replay.errors import ReplayFailed
from runtime.engine.edited_replays import EditedReplays
from runtime.engine.generation import TokenRecord
from runtime.engine.plan_edits import Change, EditedPlan, edit_path

Layer = Literal["bits", "tokens"]


class OutOfReplays(Exception):
    """The search would need more replays than it was given."""


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """Two plans one edit apart, and what parts them.

    layer         bits or tokens
    token_index   first output token that is not as recorded in the second plan, from 0
    step          engine step that gave that token
    change        the edit between them
    edits_before  edits before it on the path that changed nothing in this layer
    edits_after   edits after it, as far as this token's path goes
    recorded      the token as recorded
    other         the token under the second plan; None when the sequence had ended
    repeated      whether both ends gave the same again
    by_itself     whether the edits of this one call alone, on the recorded plan, change the layer; None when they
                  cannot be made alone
    """

    layer: Layer
    token_index: int
    step: int
    change: Change
    edits_before: int
    edits_after: int
    recorded: TokenRecord
    other: TokenRecord | None
    repeated: bool
    by_itself: bool | None


@dataclass(frozen=True, kw_only=True)
class Unresolved:
    """The search was cut short: the edit lies between these two engine steps."""

    layer: Layer
    token_index: int
    first_step: int
    last_step: int
    edits_left: int


@dataclass(frozen=True, kw_only=True)
class Blame:
    """What a search found; no finding at all when the schedule changed nothing.

    tokens   output tokens that were compared
    edits    edits between the recorded plan and an idle engine's, for the whole sequence
    replays  replays of the slice, or of its beginning, that were run
    """

    tokens: int
    edits: int
    replays: int
    findings: tuple[Culprit | Unresolved, ...] = ()


class Search:
    """Searches the path of one sequence within a bound on replays."""

    def __init__(self, replays: EditedReplays, recorded: Sequence[TokenRecord], *, max_replays: int) -> None:
        self._replays = replays
        self._recorded = tuple(recorded)
        self._max_replays = max_replays

    def run(self) -> Blame:
        """Compare with an idle engine, and search where bits and where tokens part.

        Raises ReplayFailed when the recorded plan does not give the recorded output here.
        """
        wanted = len(self._recorded)
        if not wanted:
            return Blame(tokens=0, edits=0, replays=0)
        control = self._replays.outcome(self._replays.recorded_plan(wanted), wanted)
        if parting("bits", self._recorded, control) is not None:
            raise ReplayFailed(
                "the recorded plan does not give the recorded bits here, so that no edit of it can be blamed",
                fix="See what stands in the way: replay check ID, replay run ID",
            )
        alone = self._replays.alone(wanted)
        findings: list[Culprit | Unresolved] = []
        for layer in ("bits", "tokens"):
            index = parting(layer, self._recorded, alone)
            if index is not None:
                findings.append(self._search(layer, index))
        edits = sum(1 for _ in edit_path(self._replays.recorded_plan(wanted)))
        return Blame(tokens=wanted, edits=edits, replays=self._replays.count, findings=tuple(findings))

    def _search(self, layer: Layer, index: int) -> Culprit | Unresolved:
        """Find two plans one edit apart of which only the second parts from the recording up to token `index`."""
        path = list(edit_path(self._replays.recorded_plan(index + 1)))
        marks = [0, *(place + 1 for place, change in enumerate(path) if change.reaches_bits)]
        low, high = 0, len(marks) - 1
        try:
            while high - low > 1:
                middle = (low + high) // 2
                if self._parts(layer, index, self._edited(path[: marks[middle]], index)):
                    high = middle
                else:
                    low = middle
            return self._culprit(layer, index, path, marks[high] - 1)
        except OutOfReplays:
            return Unresolved(
                layer=layer,
                token_index=index,
                first_step=path[marks[low]].edit.step,
                last_step=path[marks[high] - 1].edit.step,
                edits_left=marks[high] - marks[low],
            )

    def _culprit(self, layer: Layer, index: int, path: Sequence[Change], place: int) -> Culprit:
        """Run both ends once more, and the edits of this call by themselves."""
        change, wanted = path[place], index + 1
        before, after = self._edited(path[:place], index), self._edited(path[: place + 1], index)
        ends = self._outcome(before, index), self._outcome(after, index)
        again = self._again(before, index), self._again(after, index)
        same, parts = parting(layer, self._recorded[:wanted], ends[0]), parting(layer, self._recorded[:wanted], ends[1])
        if same is not None or parts is None:
            raise ReplayFailed("the ends of the search do not part: a replay did not repeat", fix="replay run ID")
        alike = [one for one in path[: place + 1] if one.edit.seat == change.edit.seat]
        simple = all(one.edit.kind == "neighbour" for one in alike)
        by_itself = self._parts(layer, index, self._edited(alike, index)) if simple else None
        recorded = self._recorded[parts]
        return Culprit(
            layer=layer,
            token_index=parts,
            step=recorded.step,
            change=change,
            edits_before=place,
            edits_after=len(path) - place - 1,
            recorded=recorded,
            other=ends[1][parts] if parts < len(ends[1]) else None,
            repeated=all(evidence(one) == evidence(two) for one, two in zip(ends, again, strict=True)),
            by_itself=by_itself,
        )

    def _edited(self, changes: Sequence[Change], index: int) -> EditedPlan:
        plan = self._replays.recorded_plan(index + 1)
        for change in changes:
            plan.apply(change.edit)
        return plan

    def _parts(self, layer: Layer, index: int, plan: EditedPlan) -> bool:
        return parting(layer, self._recorded[: index + 1], self._outcome(plan, index)) is not None

    def _outcome(self, plan: EditedPlan, index: int) -> tuple[TokenRecord, ...]:
        if not self._replays.knows(plan, index + 1):
            self._spend()
        return self._replays.outcome(plan, index + 1)

    def _again(self, plan: EditedPlan, index: int) -> tuple[TokenRecord, ...]:
        self._spend()
        return self._replays.again(plan, index + 1)

    def _spend(self) -> None:
        if self._replays.count >= self._max_replays:
            raise OutOfReplays


def parting(layer: Layer, left: Sequence[TokenRecord], right: Sequence[TokenRecord]) -> int | None:
    """Return the index of the first output token at which two generations part in a layer; None when they do not."""
    look: Callable[[TokenRecord], Any] = _bits if layer == "bits" else _token
    for index, (one, two) in enumerate(zip(left, right, strict=False)):
        if look(one) != look(two):
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def evidence(records: Sequence[TokenRecord]) -> list[tuple[int, str]]:
    """Return what must repeat: tokens and the digests of their logits."""
    return [(record.token, record.logits_digest) for record in records]


def _bits(record: TokenRecord) -> str:
    return record.logits_digest


def _token(record: TokenRecord) -> int:
    return record.token

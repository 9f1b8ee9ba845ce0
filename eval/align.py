"""Which parts of two records belong together?  Requests by reference, stages by passage, moments in order."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from eval.records import GenerationRecord, RequestRecord, RunRecord, StageRecord, ToolCallRecord

Kind = Literal["stage", "generation", "tool"]


@dataclass(frozen=True)
class RequestAlignment:
    """Requests of two runs, paired in the order of the first."""

    pairs: tuple[tuple[RequestRecord, RequestRecord], ...]
    only_original: tuple[RequestRecord, ...]
    only_replay: tuple[RequestRecord, ...]


@dataclass(frozen=True)
class StagePair:
    """The same passage through a stage on both sides; None where one side did not make it."""

    stage: str
    attempt: int
    ordinal: int
    """How many equal passages came before, from 0."""
    original: StageRecord | None
    replay: StageRecord | None


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a request at which two records can be compared."""

    kind: Kind
    stage: str
    attempt: int
    ordinal: int
    value: StageRecord | GenerationRecord | ToolCallRecord

    @property
    def key(self) -> tuple[Kind, str, int, int]:
        """Return what must be equal for two moments to be the same one."""
        return (self.kind, self.stage, self.attempt, self.ordinal)


def pair_requests(
    original: RunRecord,
    replay: RunRecord,
    *,
    key: Callable[[RequestRecord], str] = lambda request: request.parent_ref or request.request_ref,
) -> RequestAlignment:
    """Pair the requests of two runs whose keys agree; the nth of equal keys goes with the nth."""
    waiting: defaultdict[str, deque[RequestRecord]] = defaultdict(deque)
    for request in replay.requests:
        waiting[key(request)].append(request)
    pairs: list[tuple[RequestRecord, RequestRecord]] = []
    alone: list[RequestRecord] = []
    for request in original.requests:
        candidates = waiting[key(request)]
        if candidates:
            pairs.append((request, candidates.popleft()))
        else:
            alone.append(request)
    paired = {id(pair[1]) for pair in pairs}
    rest = tuple(request for request in replay.requests if id(request) not in paired)
    return RequestAlignment(tuple(pairs), tuple(alone), rest)


def align_stages(original: RequestRecord, replay: RequestRecord) -> tuple[StagePair, ...]:
    """Pair passages through stages, in the order of the original, then what only the replay has."""
    left = {(stage.stage, stage.attempt, number): stage for stage, number in _numbered(original.stages)}
    right = {(stage.stage, stage.attempt, number): stage for stage, number in _numbered(replay.stages)}
    keys = [*left, *(key for key in right if key not in left)]
    return tuple(StagePair(*key, left.get(key), right.get(key)) for key in keys)


def timeline(record: RequestRecord) -> tuple[Checkpoint, ...]:
    """List the moments of a request in causal order.

    A generation stands before the prefill stage that it ran in (or before decode, where there is no prefill), a tool
    call before its tooling stage: what happened inside a stage explains the stage's own digest.  Generations and calls
    whose stage was not recorded follow, in turns, before the stages that judge the output.
    """
    generations = deque(enumerate(record.generations))
    calls = deque(enumerate(record.tool_calls))
    begun: list[Checkpoint] = []
    judged: list[Checkpoint] = []
    prefills = {number for stage, number in _numbered(record.stages) if stage.stage == "b05"}
    for stage, ordinal in _numbered(record.stages):
        inner: Iterator[Checkpoint] = iter(())
        if stage.stage == "b05" or (stage.stage == "b06" and ordinal not in prefills):
            inner = _next_generation(generations)
        elif stage.stage == "b07":
            inner = _next_call(calls)
        target = judged if judged or stage.stage >= "b08" else begun
        target.extend(inner)
        target.append(Checkpoint("stage", stage.stage, stage.attempt, ordinal, stage))
    unplaced: list[Checkpoint] = []
    while generations or calls:
        unplaced.extend(_next_generation(generations))
        unplaced.extend(_next_call(calls))
    if any(moment.kind != "stage" for moment in judged):  # a repair ran after the first judgement
        return (*begun, *judged, *unplaced)
    return (*begun, *unplaced, *judged)


def _next_generation(waiting: deque[tuple[int, GenerationRecord]]) -> Iterator[Checkpoint]:
    if waiting:
        ordinal, generation = waiting.popleft()
        yield Checkpoint("generation", "b05", 1, ordinal, generation)


def _next_call(waiting: deque[tuple[int, ToolCallRecord]]) -> Iterator[Checkpoint]:
    if waiting:
        ordinal, call = waiting.popleft()
        yield Checkpoint("tool", "b07", 1, ordinal, call)


def _numbered(stages: tuple[StageRecord, ...]) -> Iterator[tuple[StageRecord, int]]:
    """Number equal passages (stage, attempt) in their order."""
    seen: Counter[tuple[str, int]] = Counter()
    for stage in stages:
        key = (stage.stage, stage.attempt)
        yield stage, seen[key]
        seen[key] += 1

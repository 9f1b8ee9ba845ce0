"""Are two recorded requests the same, and if not, where did they first part?"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eval.align import align_stages, pair_requests, timeline
from eval.differences import Difference, differences, parted
from eval.layers import LAYERS, STAGE_LAYERS, Layer, Verdict, known_layers
from eval.records import GenerationRecord, RequestRecord, RunRecord, Tolerance
from eval.tokens import TokenCounts, count_tokens, missing_evidence

OWN_STAGES = frozenset({"b01", "b04", "b09", "b10"})
"""Stages whose documents hold what each request has of its own: arrival, deadline, place in a queue, identifiers."""

_DERIVED = (
    "first_bit_index",
    "first_token_index",
    "request_token_index",
    "tokens_different",
    "max_logprob_difference",
)


@dataclass(frozen=True)
class Divergence:
    """What the comparison of a replay with its original found."""

    verdict: Verdict
    layer: Layer | None = None
    """The first layer that differs; None where nothing does."""
    stage: str | None = None
    step: int | None = None
    """Engine step of the original."""
    generation: int | None = None
    """Which of the request's generations, from 0."""
    token_index: int | None = None
    """Position in that generation."""
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """what, expected (the original's), actual (the replay's), and what else helps to see it."""
    counts: tuple[TokenCounts, ...] = ()
    """One for each pair of generations."""
    stages_different: tuple[str, ...] = ()
    """Stages with another status, decision or output digest, whether cause or consequence."""
    origin: str | None = None
    """First stage that emitted something else although it received the same."""
    unverified: tuple[str, ...] = ()
    """What kept the comparison from proving equality."""

    @property
    def first_bit_index(self) -> int | None:
        """Return the first position with other bits, in the first generation that has one."""
        return next((item.first_bit_index for item in self.counts if item.first_bit_index is not None), None)

    @property
    def first_token_index(self) -> int | None:
        """Return the first position with another token, in the first generation that has one."""
        return next((item.first_token_index for item in self.counts if item.first_token_index is not None), None)

    @property
    def request_token_index(self) -> int | None:
        """Return the token index counted over all generations of the original."""
        if self.token_index is None or self.generation is None:
            return None
        return self.token_index + sum(item.length_original for item in self.counts[: self.generation])

    @property
    def tokens_different(self) -> int:
        """Count positions with another token."""
        return sum(item.tokens_different for item in self.counts)

    @property
    def max_logprob_difference(self) -> float | None:
        """Return the largest difference of log-probabilities of equal tokens; None where none was compared."""
        known = [item.max_logprob_difference for item in self.counts if item.max_logprob_difference is not None]
        return max(known, default=None)

    @property
    def same(self) -> bool:
        """Say whether the replay counts as the same."""
        return self.verdict in ("exact", "within_tolerance")

    def to_document(self) -> dict[str, Any]:
        """Return everything as plain JSON values; numbers that JSON cannot write become text."""
        document = asdict(self)
        for name in _DERIVED:
            document[name] = getattr(self, name)
        return _plain(document)


@dataclass(frozen=True)
class RunComparison:
    """Every request of a run against its replay."""

    compared: tuple[tuple[RequestRecord, RequestRecord, Divergence], ...]
    only_original: tuple[RequestRecord, ...]
    only_replay: tuple[RequestRecord, ...]


def compare(
    original: RequestRecord,
    replay: RequestRecord,
    *,
    tolerance: Tolerance | None = None,
    layers: Collection[str] = LAYERS,
    stages: Collection[str] | None = None,
) -> Divergence:
    """Find the first difference between a recorded request and its replay.

    Args:
        tolerance: None lets no bit differ.
        layers: which layers are judged; what a replay changes or leaves out on purpose is not.  A request that is
            replayed alone has another schedule, so everything but ``schedule`` is judged; an audit runs no model, so
            ``tool``, ``decision`` and ``failure`` are.
        stages: which stages are judged; None judges all.

    Raises:
        ValueError: an unknown layer, or none.
    """
    wanted = known_layers(layers)
    forgiven: Difference | None = None
    first: Difference | None = None
    for found in differences(original, replay, layers=wanted, tolerance=tolerance, stages=stages):
        if not found.forgiven:
            first = found
            break
        forgiven = forgiven or found
    unverified = tuple(_unverified(original, replay, wanted, stages))
    verdict: Verdict = "exact" if forgiven is None else "within_tolerance"
    if first is not None:
        verdict = "diverged"
    elif unverified:
        verdict = "unverified"
    shown = first or forgiven
    return Divergence(
        verdict,
        None if shown is None else shown.layer,
        None if shown is None else shown.stage,
        None if shown is None else shown.step,
        None if shown is None else shown.generation,
        None if shown is None else shown.token_index,
        {} if shown is None else shown.detail,
        counts=tuple(count_tokens(left, right) for left, right in _generations(original, replay)),
        stages_different=_stages_different(original, replay),
        origin=_origin(original, replay),
        unverified=unverified,
    )


def compare_twins(one: RequestRecord, other: RequestRecord, *, tolerance: Tolerance | None = None) -> Divergence:
    """Compare two live requests that asked the same thing, neither of which replays the other.

    What each has of its own (arrival, identifiers, schedule) is not judged: the context that was found, the prompt,
    bits, tokens, tools, decisions and failures are.
    """
    layers = [layer for layer in LAYERS if layer != "schedule"]
    return compare(_shared(one), _shared(other), tolerance=tolerance, layers=layers)


def compare_runs(
    original: RunRecord,
    replay: RunRecord,
    *,
    tolerance: Tolerance | None = None,
    layers: Collection[str] = LAYERS,
) -> RunComparison:
    """Compare all requests of two runs that belong together."""
    aligned = pair_requests(original, replay)
    compared = tuple(
        (left, right, compare(left, right, tolerance=tolerance, layers=layers)) for left, right in aligned.pairs
    )
    return RunComparison(compared, aligned.only_original, aligned.only_replay)


def _shared(record: RequestRecord) -> RequestRecord:
    stages = tuple(
        replace(stage, input_digest=None, output_digest=None) if stage.stage in OWN_STAGES else stage
        for stage in record.stages
    )
    return replace(record, stages=stages, response_digest=None)


def _unverified(
    original: RequestRecord, replay: RequestRecord, layers: frozenset[str], stages: Collection[str] | None
) -> Iterator[str]:
    """Say what was not recorded and so keeps an absence of differences from being equality."""
    if not timeline(original) or not timeline(replay):
        yield "nothing of the request was recorded"
    judged = stages is None or "b05" in stages
    for number, (left, right) in enumerate(_generations(original, replay) if judged else []):
        said = missing_evidence(left, right) if "bits" in layers else None
        if said is not None:
            yield f"generation {number}: {said}"
        if "input" in layers and (left.prompt_digest is None or right.prompt_digest is None):
            yield f"generation {number}: no digest of the prompt"
    for pair in align_stages(original, replay):
        if STAGE_LAYERS.get(pair.stage, "input") not in layers or (stages is not None and pair.stage not in stages):
            continue
        left, right = pair.original, pair.replay
        if left is not None and right is not None and (left.output_digest is None) != (right.output_digest is None):
            yield f"stage {pair.stage}: only one side has a digest of what it emitted"
    if "failure" in layers and (original.terminal_status is None or replay.terminal_status is None):
        yield "no terminal status was recorded"


def _generations(original: RequestRecord, replay: RequestRecord) -> list[tuple[GenerationRecord, GenerationRecord]]:
    return list(zip(original.generations, replay.generations, strict=False))


def _stages_different(original: RequestRecord, replay: RequestRecord) -> tuple[str, ...]:
    different: dict[str, None] = {}
    for pair in align_stages(original, replay):
        left, right = pair.original, pair.replay
        if left is None or right is None or (left.status, left.decision) != (right.status, right.decision):
            different.setdefault(pair.stage)
        if left is not None and right is not None and parted(left.output_digest, right.output_digest):
            different.setdefault(pair.stage)
    return tuple(different)


def _origin(original: RequestRecord, replay: RequestRecord) -> str | None:
    for pair in align_stages(original, replay):
        left, right = pair.original, pair.replay
        if left is None or right is None or left.input_digest is None or left.input_digest != right.input_digest:
            continue
        if parted(left.output_digest, right.output_digest) or left.status != right.status:
            return pair.stage
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

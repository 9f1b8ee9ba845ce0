"""Who answers when a replayed request asks for tokens?  A plan player, or, in an audit, the record itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from replay.errors import IncompleteRecord
from replay.generations import RecordedSequence
from replay.jobs import ReplayMode
from runtime.engine.errors import PlanMissing
from runtime.engine.generation import GenerationRequest, GenerationResult, OnToken
from traces.failures import ClassifiedError

if TYPE_CHECKING:
    from runtime.engine.playback import PlanPlayer, Playback
    from runtime.engine.rerun import SliceUse


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One generation of a replay: what was asked, what came, and whether it followed the recorded rows.

    followed  the recorded generation whose plans it ran along; None when it was scheduled alone
    slice     how much of the schedule it took; None where no model ran
    """

    request: GenerationRequest
    result: GenerationResult
    followed: RecordedSequence | None
    slice: SliceUse | None = None


@dataclass(kw_only=True)
class PlayedGenerations:
    """Runs generations along the recorded plans; a GenerationService for one request and one package.

    player     gives the plan player for a recorded engine
    engine_id  the engine of the route, for what no engine recorded (one more turn)
    recorded   the request's recorded generations by sequence id
    mode       faithful, alone or forced
    done       what was generated so far, over all routes of the request
    unseen     whether the recorded caller went away before any token reached it
    obstacles  what kept the record from being replayed: never a fact about the request itself
    ready      results of generations that were computed together with others, by sequence id
    refused    generations that the recorded engine's queue did not take, by sequence id: its load is not replayed
    """

    player: Callable[[str], PlanPlayer]
    engine_id: str
    recorded: Mapping[str, RecordedSequence]
    mode: ReplayMode
    done: list[Generated]
    unseen: bool
    obstacles: list[ClassifiedError]
    ready: Mapping[str, GenerationResult]
    refused: Mapping[str, ClassifiedError] = field(default_factory=dict[str, ClassifiedError])

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        """Run one generation; plans fit only the prompt that they were made for, so another prompt runs alone."""
        if self.mode != "alone" and request.sequence_id in self.refused:
            raise self.refused[request.sequence_id]
        known = self.recorded.get(request.sequence_id)
        same = known is not None and known.request is not None and known.request.prompt == request.prompt
        known = known if same else None
        result = self.ready.get(request.sequence_id)
        if result is not None and known is not None and known.request == request and self.mode == "faithful":
            if on_token is not None and not self.unseen:
                for record in result.records:
                    on_token(record)
            self.done.append(Generated(request=request, result=result, followed=known))
            return _end(result)
        player = self.player(self.engine_id if known is None else known.engine_id)
        before = None if known is None else known.result
        told = None if self.unseen else on_token
        if known is None or self.mode == "alone" or (self.mode == "forced" and before is None):
            played = player.play(request, "alone", None, on_token=told)
            return self._note(request, played, followed=None)
        try:
            played = player.play(request, "forced" if self.mode == "forced" else "faithful", before, on_token=told)
        except PlanMissing as missing:
            self.obstacles.append(missing)
            raise
        return self._note(request, played, followed=known)

    def _note(
        self, request: GenerationRequest, played: Playback, *, followed: RecordedSequence | None
    ) -> GenerationResult:
        """Keep what was generated and what it took."""
        self.done.append(Generated(request=request, result=played.result, followed=followed, slice=played.slice))
        return _end(played.result)


@dataclass(kw_only=True)
class AuditedGenerations:
    """Answers generations from the record: no model runs; a GenerationService for one request."""

    recorded: Mapping[str, RecordedSequence]
    done: list[Generated]
    unseen: bool
    obstacles: list[ClassifiedError]
    refused: Mapping[str, ClassifiedError] = field(default_factory=dict[str, ClassifiedError])

    async def generate(self, request: GenerationRequest, on_token: OnToken | None = None) -> GenerationResult:
        """Return the recorded result; IncompleteRecord when this prompt was never run."""
        if request.sequence_id in self.refused:
            raise self.refused[request.sequence_id]
        known = self.recorded.get(request.sequence_id)
        if known is None or known.result is None or known.request is None or known.request.prompt != request.prompt:
            missing = IncompleteRecord(
                f"the record has no generation {request.sequence_id} for this prompt, and an audit runs no model",
                missing="generation",
                fix="Replay with --mode faithful: what changed reaches the model.",
            )
            self.obstacles.append(missing)
            raise missing
        for record in known.result.records:
            if on_token is not None and not self.unseen:
                on_token(record)
        self.done.append(Generated(request=request, result=known.result, followed=known))
        return _end(known.result)


def _end(result: GenerationResult) -> GenerationResult:
    """Return a result, or end as the caller ended it: who cancelled by going away sees no result."""
    if result.finish_reason == "cancelled" and result.cancel_origin == "caller":
        raise asyncio.CancelledError
    return result
